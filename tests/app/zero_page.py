"""A page's process on ZeroGPU: it loads the embedded model, never runs it, and prints what visitors got from workers.

In a process of its own, because what torch and OpenMP have run before a fork cannot be relied on after it.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from typing import Any

from app.hosting import HostedModel, Hosting
from app.service import Service
from app.settings import Settings
from app.zero import ChangeFile
from moespec import EMBEDDED_TARGET
from tests.app import fake_spaces

EMBEDDED = HostedModel("tiny", str(EMBEDDED_TARGET), 28_000_000, 1e8, str(EMBEDDED_TARGET.parent / "drafter"))
SHORT = Settings(max_new_tokens=40, ignore_eos=True)
LONG = replace(SHORT, max_new_tokens=1500)


def said(prompt: str) -> list[dict]:
    return [{"role": "user", "content": prompt}]


def visit(
    service: Service, prompt: str, settings: Settings = SHORT, act: Callable[[Any], None] | None = None
) -> dict[str, Any]:
    """What a visitor who acts on the first frame gets."""
    place = service.queue.enter("visitor")
    seen: dict[str, Any] = {"steps": [], "error": None}
    frames: Iterator = service.stream("visitor", place.ticket, said(prompt), settings)
    try:
        for frame in frames:
            seen["steps"] += frame
            if act is not None:
                act(frames)
                act = None
    except Exception as error:
        seen["error"] = [type(error).__name__, str(error)]
    steps = seen.pop("steps")
    seen["text"] = "".join(step.text for step in steps)
    seen["budgets"] = sorted({step.settings.budget or 0 for step in steps})
    seen["summary"] = asdict(steps[-1].summary) if steps and steps[-1].summary else None
    seen["num_layers"] = sorted({len(step.layers) for step in steps if step.kind == "tree"})
    seen["is_deaf"] = place.is_deaf
    seen["left"] = bool(service.queue.places)
    seen["worker"] = fake_spaces.workers[-1].exitcode
    return seen


def kill_a_worker() -> None:
    os.kill(fake_spaces.workers[-1].pid, signal.SIGKILL)


def kill_the_next_worker() -> None:
    num_workers = len(fake_spaces.workers)
    while len(fake_spaces.workers) == num_workers:
        time.sleep(0.001)
    kill_a_worker()


def refused(ask: Callable[[], Any]) -> str:
    try:
        return str(ask())
    except ValueError as error:
        return str(error)


def no_disk() -> ChangeFile:
    raise OSError("no space left on device")


def main() -> None:
    sys.modules["spaces"] = fake_spaces  # as on ZeroGPU's image
    service = Service(hosting=Hosting.ZERO_GPU, wanted=EMBEDDED)
    service.stepper.prepare()
    found: dict[str, Any] = {"notice": service.notice, "before": asdict(service.info), "card": service.engine.card()}
    found["lossless"] = visit(service, "Tell me a short story.", replace(SHORT, budget=None))
    found["asked_for"] = fake_spaces.asked_for[-1]
    found["after"], found["header"] = asdict(service.info), asdict(service.header(said("Hi"), SHORT))
    found["moved"] = visit(service, "Who are you?", act=lambda _: service.update("visitor", replace(SHORT, budget=20)))
    found["stopped"] = visit(service, "Who are you?", LONG, act=lambda _: service.queue.stop("visitor"))
    found["closed"] = visit(service, "Who are you?", LONG, act=lambda frames: frames.close())
    found["late"] = fake_spaces.late[-1]
    found["died"] = visit(service, "Who are you?", LONG, act=lambda _: kill_a_worker())
    threading.Thread(target=kill_the_next_worker).start()
    found["died_early"] = visit(service, "Who are you?")
    found["too_long"] = visit(service, "word " * 9000)
    new, ChangeFile.new = ChangeFile.new, staticmethod(no_disk)  # type: ignore[assignment]
    told: list[str] = []

    def listen_and_stop(frames: Iterator) -> None:
        told.append(service.queue.remark("visitor"))
        service.queue.stop("visitor")

    found["deaf"] = visit(service, "Who are you?", LONG, listen_and_stop)
    found["told"] = told
    ChangeFile.new = new  # type: ignore[method-assign]
    found["next"] = visit(service, "What is 12 + 30?")
    found["refused"] = [
        refused(lambda: service.check(Settings(budget=7))),
        refused(lambda: service.check(Settings(governor="evict"))),
        refused(lambda: service.check(Settings(governor="cascade-like"))),
        refused(service.advise),
    ]
    print(json.dumps(found))


if __name__ == "__main__":
    main()
