"""The engines of this process: one thread loads the first and then steps them all, another loads a larger one beside.

On ZeroGPU the larger one is lent to worker processes instead. Owns threads and batches; knows nothing of visitors.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import queue
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from app.hosting import HostedModel, Hosting, Room, check_room
from app.loading import Serving, answers_in_worker, lend, load_hosted, warm_up
from app.models import Models
from app.zero import worker_function
from moespec import Request, StepTrace

if TYPE_CHECKING:
    from moespec import Batch, Engine

MAX_TOGETHER = 4  # answers that are written side by side
FRAME_S = 0.05  # 20 frames a second, for the page and for programs
NICENESS = 4  # more, of what makes steps: a browser on the same cores is let in sooner, and shows them sooner
Tell = Callable[[StepTrace], None]


class Stepper:
    """Loads into `models` and steps what is asked of them. `loaded` is called when the larger one is there."""

    def __init__(
        self,
        models: Models,
        target: str | Path,
        hosting: Hosting,
        wanted: HostedModel | None,
        loaded: Callable[[], None],
    ) -> None:
        self._models, self._target, self._hosting, self._wanted = models, target, hosting, wanted
        self._loaded = loaded
        self.batches: list[Batch] = []
        self._asked = threading.Event()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def prepare(self) -> None:
        """What must be done before the page is launched, by the main thread: ZeroGPU lends what is loaded then."""
        if self._hosting is Hosting.ZERO_GPU:
            lent: list[tuple[Any, Any]] = []
            run = worker_function(answers_in_worker(self._wanted, lent), self._wanted)
            if self._wanted is not None:
                self._load_wanted(self._wanted, lambda wanted: lend(wanted, lent, run))

    def start(self) -> None:
        """Begin to load, once."""
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, daemon=True)
                self._thread.start()

    def steps(self, batch: Batch, request: Request, tell: Tell) -> Iterator[list[StepTrace]]:
        """The steps of a request that joins others', FRAME_S of them at a time, its end at once; `tell` hears each from
        the thread that makes it. Who waits here is not woken for each: it would take the interpreter from that thread.
        """
        outcomes: queue.SimpleQueue[StepTrace | BaseException] = queue.SimpleQueue()
        ended = threading.Event()

        def deliver(outcome: StepTrace | BaseException) -> None:
            if isinstance(outcome, StepTrace):
                tell(outcome)
            outcomes.put(outcome)
            if isinstance(outcome, BaseException) or outcome.summary is not None:
                ended.set()

        batch.join(request, deliver)
        self._asked.set()
        return _paced(outcomes, ended)

    def _run(self) -> None:
        if self._models.now is not None:
            return  # in a worker of ZeroGPU's
        _let_others_in()
        self._models.load_first(self._first)
        if self._wanted is not None and self._hosting is not Hosting.ZERO_GPU:
            threading.Thread(target=self._load_wanted, args=(self._wanted, self._beside), daemon=True).start()
        while self.batches:
            self._asked.wait()
            self._asked.clear()
            try:
                while any([batch.step() for batch in self.batches]):
                    pass
            except Exception:
                logging.exception("a step failed")  # those whose step it was have been told
                self._asked.set()  # the others go on

    def _first(self) -> Serving:
        from moespec import Engine  # here, because torch and transformers take seconds
        from moespec.native import share_work

        share_work()  # beside a browser
        # The GPU is for the named model: no graph can be captured while weights move there. ZeroGPU only pretends.
        device = "auto" if self._wanted is None and self._hosting is not Hosting.ZERO_GPU else "cpu"
        return self._batched(Engine.from_pretrained(self._target, device=device), self._target)

    def _beside(self, wanted: HostedModel) -> Serving:
        return self._batched(load_hosted(wanted), wanted.hub_id)

    def _batched(self, engine: Engine, target: str | Path) -> Serving:
        """The engine, warm, with the batch that is stepped here."""
        from moespec import Batch

        warm_up(engine)
        # Half a million objects of the libraries, which stay: a full collection that looked at them, too, would stop
        # every answer and every page for a third of a second.
        gc.collect()
        gc.freeze()
        batch = Batch(engine, MAX_TOGETHER)
        self.batches.append(batch)
        return Serving(engine, target, batch)

    def _load_wanted(self, wanted: HostedModel, load: Callable[[HostedModel], Serving]) -> None:
        def checked() -> Serving:
            check_room(self._hosting, wanted, Room.of(self._hosting, wanted, os.environ))
            return load(wanted)

        self._models.load_wanted(wanted.name, checked)
        self._loaded()


def _let_others_in() -> None:
    """This thread and those that it starts from now on, where threads have a niceness of their own."""
    if sys.platform == "linux":
        thread = threading.get_native_id()
        with contextlib.suppress(OSError):  # some sandboxes allow none
            os.setpriority(os.PRIO_PROCESS, thread, os.getpriority(os.PRIO_PROCESS, thread) + NICENESS)


def _paced(outcomes: queue.SimpleQueue[StepTrace | BaseException], ended: threading.Event) -> Iterator[list[StepTrace]]:
    """What was delivered since the last time; what ended with an error raises it."""
    while True:
        made = [outcomes.get()]
        made += [outcomes.get() for _ in range(outcomes.qsize())]
        steps = [outcome for outcome in made if isinstance(outcome, StepTrace)]
        if steps:
            yield steps
        last = made[-1]
        if isinstance(last, BaseException):
            raise last
        if last.summary is not None:
            return
        ended.wait(FRAME_S)
