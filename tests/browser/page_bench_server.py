"""The page as it is, with what `page_bench.py` measures it by: when every step was made, recorded answers at a steady
rate, and answers that nobody watches."""

from __future__ import annotations

import os
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from fastapi import APIRouter

import serve  # noqa: F401  first: it sets the environment that the page is started in
from app.main import serve as serve_at
from app.recordings import Recording
from app.service import Service
from app.settings import Settings
from app.stepping import Stepper
from moespec import StepTrace, read_trace

STORY = Path(__file__).resolve().parents[2] / "assets" / "traces" / "story.jsonl"
RATE_HZ, NUM_FRAMES = 20, 200
STEADY = "steady"  # asked for this, the page is shown recorded steps
own_add, own_steps, own_stream = Recording.add, Stepper.steps, Service.stream
made_at_ms: defaultdict[str, list[float]] = defaultdict(list)  # by recording


def steps_with_times(stepper: Stepper, *asked: Any) -> Iterator[StepTrace]:
    """The steps as they are made, each with the time."""
    for step in own_steps(stepper, *asked):
        stamped: Any = step
        stamped.made_at_ms = 1e3 * time.time()
        yield step


def add(recording: Recording, steps: Iterable[StepTrace]) -> None:
    """Keeps those times; of recorded steps, when they were shown as new."""
    steps = list(steps)
    made_at_ms[recording.id] += [getattr(step, "made_at_ms", 1e3 * time.time()) for step in steps]
    own_add(recording, steps)


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
changed: Any = Recording
changed.add = add
timed: Any = Stepper
timed.steps = steps_with_times


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
