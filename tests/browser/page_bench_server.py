"""The page as it is, with what `page_bench.py` measures it by: when every step was made, recorded answers at a steady
rate, and answers that nobody watches."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastapi import APIRouter

import serve  # noqa: F401  first: it sets the environment that the page is started in
from app.main import serve as serve_at
from app.recordings import Recording, Recordings
from app.service import Service
from app.settings import Settings
from app.stepping import Tell
from moespec import StepTrace, TraceHeader, read_trace

STORY = Path(__file__).resolve().parents[2] / "assets" / "traces" / "story.jsonl"
RATE_HZ, NUM_FRAMES = 20, 200
STEADY = "steady"  # asked for this, the page is shown recorded steps
own_begin, own_stream = Recordings.begin, Service.stream
made_at_ms: dict[str, list[float]] = {}  # by recording


class TimedSteps(list[StepTrace]):
    """A recording's, and when each was made: the thread that makes them adds them."""

    def __init__(self) -> None:
        super().__init__()
        self.at_ms: list[float] = []

    def append(self, step: StepTrace) -> None:
        self.at_ms.append(1e3 * time.time())
        super().append(step)


def begin(recordings: Recordings, header: TraceHeader, promised: str | None = None) -> Recording:
    recording = own_begin(recordings, header, promised)
    recording.steps = steps = TimedSteps()
    made_at_ms[recording.id] = steps.at_ms
    return recording


def stream(
    service: Service, session: str, ticket: int, messages: list, *asked: Any, tell: Tell = lambda step: None
) -> Iterator[list]:
    if messages[-1]["content"] != STEADY:
        yield from own_stream(service, session, ticket, messages, *asked, tell=tell)
        return
    try:
        for step in _steady():
            tell(step)
            yield [step]
    finally:
        service.queue.leave(session, ticket)


def _steady() -> Iterator[StepTrace]:
    """The recorded story over and over, one step a frame."""
    _, steps = read_trace(STORY)
    began = time.monotonic()
    for number in range(NUM_FRAMES):
        time.sleep(max(0.0, began + number / RATE_HZ - time.monotonic()))
        step = steps[1 + number % (len(steps) - 2)]
        yield StepTrace(**{**vars(step), "step": number, "kind": "tree" if number else "prefill"})
    yield StepTrace(**{**vars(steps[-1]), "step": NUM_FRAMES})


patched: Any = Service
patched.stream = stream
changed: Any = Recordings
changed.begin = begin


def measures(service: Service) -> APIRouter:
    router = APIRouter()

    @router.get("/made/{recording_id}")
    def made(recording_id: str) -> list[float]:
        """When each of its steps was there, in ms since 1970."""
        return made_at_ms[recording_id]

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
    page.app.router.routes[:0] = measures(served).routes
    served.stepper.start()
    page.block_thread()
