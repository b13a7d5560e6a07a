"""OpenAI-compatible routes: /v1/models and /v1/chat/completions. Owns statuses, streams and clients that go away.

The forms are `openai_form.py`'s. The service's steps are taken by threads: the event loop is the page's, too.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator
from typing import Any
from uuid import uuid4

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.concurrency import run_in_threadpool

from app.limits import TooManyError
from app.openai_form import Asked, RefusedError, Reply, read_request, unknown_model
from app.programs import defaults
from app.service import Service, Step
from app.zero import CutOffError

MAX_BODY_BYTES = 1 << 20
MAX_WORDS = 2000  # characters of a refusal, which may quote what was sent
LOADING_S = 5  # after which to ask again


def openai_router(service: Service) -> APIRouter:
    """Any key is taken: who may ask is not decided here."""
    router = APIRouter(prefix="/v1")

    @router.get("/models")
    def models() -> Response:
        try:
            return JSONResponse({"object": "list", "data": [_card(service)]})
        except ValueError as error:
            return refusal(error)

    @router.get("/models/{name:path}")
    def model(name: str) -> Response:
        try:
            card = _card(service)
            if name != card["id"]:
                raise unknown_model(name, card["id"])
            return JSONResponse(card)
        except ValueError as error:
            return refusal(error)

    @router.post("/chat/completions")
    async def complete(request: Request) -> Response:
        try:
            name = _card(service)["id"]
            reply = Reply(name, read_request(await _body(request), name, defaults(service.info, service.limits)))
            frames = _frames(request, service, reply.asked)
            first = await anext(frames)  # with it comes whatever is refused, in time for a status
            if reply.asked.is_streamed:
                return StreamingResponse(_events(first, frames, reply), media_type="text/event-stream")
            reply.add(first)
            steps = first
            async for steps in frames:
                reply.add(steps)
            assert steps[-1].summary is not None, "the last step of an answer has its summary"
            return JSONResponse(reply.completion(steps[-1].summary))
        except Exception as error:
            return refusal(error)

    return router


def refusal(error: Exception) -> JSONResponse:
    """The status that says whose turn it is, and OpenAI's error form."""
    status, kind, code, param, headers = 400, "invalid_request_error", None, None, {}
    if isinstance(error, RefusedError):
        status, code, param = error.status, error.code, error.param
        if status >= 500:
            kind, headers = "server_error", {"Retry-After": str(LOADING_S)}
    elif isinstance(error, CutOffError):
        status, kind, code = 503, "server_error", "cut_off"
    elif isinstance(error, TooManyError):
        status, kind, code = 429, "rate_limit_error", "rate_limit_exceeded"
        headers = {"Retry-After": str(error.retry_after_s)}
    elif not isinstance(error, ValueError):
        logging.error("a request failed", exc_info=error)
        status, kind = 500, "server_error"
        error = RuntimeError(f"The answer failed ({type(error).__name__}): ask again.")
    form = {"message": str(error)[:MAX_WORDS], "type": kind, "param": param, "code": code}
    return JSONResponse({"error": form}, status, headers)


async def _body(request: Request) -> Any:
    """JSON, and said to be: a page of another site cannot send that without being asked whether it may."""
    if not request.headers.get("content-type", "").startswith("application/json"):
        raise RefusedError("Send JSON, with Content-Type: application/json.", 415)
    body = b""
    async for part in request.stream():
        body += part
        if len(body) > MAX_BODY_BYTES:
            raise RefusedError(f"The body has more than {MAX_BODY_BYTES >> 10} kB: send less.", 413)
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as error:
        raise RefusedError(f"The body is no JSON: {error}.") from error


def _card(service: Service) -> dict[str, Any]:
    """The one model. RefusedError while there is none."""
    if service.unready:
        raise RefusedError(service.unready, 503, "model_not_ready")
    info = service.info
    own = {"drafter": info.drafter_name, "num_experts": info.num_experts, "top_k": info.top_k}
    return {
        "id": info.model_name.replace(" ", "-"),
        "object": "model",
        "created": 0,
        "owned_by": "moe-spec-studio",
        "moespec": own | {"num_moe_layers": info.num_moe_layers, "max_context": info.max_context},
    }


async def _frames(request: Request, service: Service, asked: Asked) -> AsyncIterator[Step]:
    """The service's frames. Whoever goes away leaves the queue, or ends the answer with its next step."""
    session = f"program {uuid4().hex}"
    place = service.queue.enter(session, service.limits.visitor(request))
    watch = asyncio.create_task(_leave_with(request, service, session))
    frames = service.stream(session, place.ticket, asked.messages, asked.settings, asked.stop)
    try:
        while (steps := await run_in_threadpool(next, frames, None)) is not None:
            yield steps
    finally:
        watch.cancel()
        service.queue.leave(session)


async def _leave_with(request: Request, service: Service, session: str) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
    service.queue.leave(session)


async def _events(first: Step, frames: AsyncIterator[Step], reply: Reply) -> AsyncIterator[str]:
    """Server-sent events. An error in mid-answer is an event: the status has been sent."""
    try:
        for chunk in reply.chunks(first):
            yield _event(chunk)
        async for steps in frames:
            for chunk in reply.chunks(steps):
                yield _event(chunk)
        yield "data: [DONE]\n\n"
    except Exception as error:
        yield f"data: {bytes(refusal(error).body).decode()}\n\n"


def _event(chunk: dict[str, Any]) -> str:
    return f"data: {json.dumps(chunk)}\n\n"
