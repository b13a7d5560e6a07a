"""The page as it is, with what `page_bench.py` measures it by: stamped frames, recorded answers at a steady rate, and
answers that nobody watches."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastapi import APIRouter

import serve  # noqa: F401  first: it sets the environment that the page is started in
from app.main import serve as serve_at
from app.service import Service
from app.settings import Settings
from app.tabs import answering
from moespec import StepTrace, read_trace

STORY = Path(__file__).resolve().parents[2] / "assets" / "traces" / "story.jsonl"
RATE_HZ, NUM_FRAMES = 20, 200
STEADY = "steady"  # asked for this, the page is shown recorded steps
own_frame, own_stream = answering.live_frame, Service.stream


def stamped_frame(*args: Any, message: str, **values: Any) -> dict[str, Any]:
    """Says when it was made, where a visitor would read a remark."""
    return own_frame(*args, message=f"{message} at {1e3 * time.time():.1f}", **values)


def stream(service: Service, session: str, ticket: int, messages: list, settings: Settings) -> Iterator[list]:
    if messages[-1]["content"] != STEADY:
        yield from own_stream(service, session, ticket, messages, settings)
        return
    try:
        yield from _steady()
    finally:
        service.queue.leave(session, ticket)


def _steady() -> Iterator[list[StepTrace]]:
    """The recorded story over and over, one step a frame."""
    _, steps = read_trace(STORY)
    began = time.monotonic()
    for number in range(NUM_FRAMES):
        time.sleep(max(0.0, began + number / RATE_HZ - time.monotonic()))
        step = steps[1 + number % (len(steps) - 2)]
        yield [StepTrace(**{**vars(step), "step": number, "kind": "tree" if number else "prefill"})]
    yield [StepTrace(**{**vars(steps[-1]), "step": NUM_FRAMES})]


patched: Any = Service
patched.stream = stream
changed: Any = answering
changed.live_frame = stamped_frame


def unwatched(service: Service) -> APIRouter:
    router = APIRouter()

    @router.get("/unwatched")
    def answer(prompt: str, num_tokens: int) -> dict[str, float]:
        settings = Settings(max_new_tokens=num_tokens, ignore_eos=True)
        place = service.queue.enter("nobody")
        asked = "nobody", place.ticket, [{"role": "user", "content": prompt}], settings
        *_, last = own_stream(service, *asked)
        return {"tokens_per_s": last[-1].summary.tokens_per_s}

    return router


if __name__ == "__main__":
    served = Service()
    page = serve_at(served, "127.0.0.1", int(os.environ["PORT"]))
    page.app.router.routes[:0] = unwatched(served).routes
    served.stepper.start()
    page.block_thread()
