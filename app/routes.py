"""Addresses beside the page: the panels' script, an answer's steps as they are made, its exports. Added to the app that
Gradio has launched.
"""

from __future__ import annotations

from fastapi import APIRouter, Response
from fastapi.responses import JSONResponse

from app.export import replay_page, trace_file
from app.live import added_frame
from app.live.live import script, script_name
from app.recordings import Recordings

FRESH = {"Cache-Control": "no-store"}


def page_router(recordings: Recordings) -> APIRouter:
    """The script that `live_panels` names; `live/ID?after=N`, what is new behind the first N steps (`added_frame`;
    `is_end` alone where it has not begun);
    `recordings/ID.jsonl` and `recordings/ID.html`, both as downloads. 404 with a sentence where there is none."""
    router = APIRouter()

    @router.get(f"/{script_name()}")
    def panels_script() -> Response:
        forever = {"Cache-Control": "public, max-age=31536000, immutable"}
        return Response(script(), media_type="text/javascript", headers=forever)

    # Not by the event that writes the answer: each message of an event takes a browser several times as long as drawing
    # all panels. By the server's own thread: a step's frame takes it a millisecond, handing that to another several.
    @router.get("/live/{recording_id}")
    async def added(recording_id: str, after: int) -> Response:
        if recordings.is_promised(recording_id):
            return JSONResponse({"is_end": False}, headers=FRESH)
        try:
            steps = recordings.of(recording_id).steps
        except ValueError as error:
            return Response(f"{error}\n", 404, media_type="text/plain")
        return JSONResponse(added_frame(after, steps[max(0, after) :]), headers=FRESH)

    @router.get("/recordings/{name}")
    def export(name: str) -> Response:
        recording_id, _, form = name.rpartition(".")
        makers = {"jsonl": (trace_file, "application/jsonl"), "html": (replay_page, "text/html")}
        if form not in makers:
            return Response("An answer is exported as .jsonl or .html.\n", 404, media_type="text/plain")
        make, kind = makers[form]
        try:
            text = make(recordings.of(recording_id))
        except ValueError as error:
            return Response(f"{error}\n", 404, media_type="text/plain")
        disposition = {"Content-Disposition": f'attachment; filename="moe-spec-answer.{form}"'}
        return Response(text, media_type=kind, headers=disposition)

    return router
