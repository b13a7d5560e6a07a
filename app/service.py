"""The only file that talks to the engine: a few answers side by side, settings that move while text streams.

One thread loads the engine and then steps it; visitors' streams take their steps from queues.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from moespec import EMBEDDED_TARGET, BudgetConfig, Control, GenerationConfig, Request, StepTrace, TreeConfig

if TYPE_CHECKING:
    from moespec import Batch, Engine, EngineInfo

MAX_TOGETHER = 4  # answers that are written side by side
MAX_WAITING = 12  # those included
FRAME_S = 0.05  # 20 frames a second is what a page keeps up with
Step = list[StepTrace]


@dataclass
class Place:
    """A visitor's place in the queue: a ticket that no other has, and how many stood before."""

    ticket: int
    num_before: int
    control: Control = field(default_factory=Control)
    begun: bool = False


class Service:
    """Loads the engine in the background; hands out coalesced steps and each visitor's place in the queue.

    Loading begins with `start`, or with the first who asks for the engine: a page is served before its model is there.
    """

    def __init__(self, target: str | Path = EMBEDDED_TARGET) -> None:
        self._target = target
        self._engine: Engine | None = None
        self._batch: Batch | None = None
        self._error = ""
        self._ready, self._asked = threading.Event(), threading.Event()
        self._lock = threading.Lock()
        self._places: dict[str, Place] = {}  # of everyone whose answer is being written or waited for, in order
        self._tickets = 0
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin to load, once."""
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, daemon=True)
                self._thread.start()

    def _run(self) -> None:
        self._load()
        while self._batch is not None:
            self._asked.wait()
            self._asked.clear()
            try:
                while self._batch.step():
                    pass
            except Exception:
                logging.exception("a step failed")  # those whose step it was have been told

    def _load(self) -> None:
        try:
            from moespec import Batch, Engine  # here, because torch and transformers take seconds

            engine = Engine.from_pretrained(self._target)
            for _ in engine.generate("Hello", GenerationConfig(max_new_tokens=4), BudgetConfig(budget=16)):
                pass  # the first steps are the slow ones: let them be ours
            self._engine, self._batch = engine, Batch(engine, MAX_TOGETHER)
        except ValueError as error:
            self._error = str(error)
        except Exception as error:
            logging.exception("the model could not be loaded")
            self._error = f"{type(error).__name__}: {error}"
        finally:
            self._ready.set()

    @property
    def engine(self) -> Engine:
        """The engine, waited for. ValueError says why there is none."""
        self.start()
        self._ready.wait()
        if self._engine is None:
            raise ValueError(self._error)
        return self._engine

    @property
    def info(self) -> EngineInfo:
        return self.engine.info

    @property
    def piece(self) -> Callable[[int], str]:
        """Token id to its text."""
        return self.engine.pieces

    def enter(self, session: str) -> Place:
        """Join the queue. ValueError if this visitor's answer is being written, or if too many wait."""
        with self._lock:
            if session in self._places:
                raise ValueError("Your last answer is still being written: stop it, or wait for its end.")
            if len(self._places) >= MAX_WAITING:
                raise ValueError(f"{MAX_WAITING} visitors are waiting already: try again in a minute.")
            self._tickets += 1
            place = self._places[session] = Place(self._tickets, len(self._places))
            return place

    def num_beside(self, session: str) -> int:
        """How many others' answers are being written."""
        return sum(place.begun for name, place in list(self._places.items()) if name != session)

    def expects(self, session: str, ticket: int) -> bool:
        """Whether this visitor has joined the queue with this ticket and not left it."""
        place = self._places.get(session)
        return place is not None and place.ticket == ticket

    def leave(self, session: str, ticket: int | None = None) -> None:
        """Stop this visitor's answer, wherever it stands, or the one of a ticket, if it is still that one's turn."""
        with self._lock:
            place = self._places.get(session)
            if place is None or ticket not in (None, place.ticket):
                return
            del self._places[session]
        place.control.stop()

    def update(self, session: str, budget: BudgetConfig, tree: TreeConfig) -> None:
        """Move a visitor's settings: they act from the next step of their answer on. ValueError leaves them alone."""
        place = self._places.get(session)
        if place is not None and self._ready.is_set():  # not while the model loads: nothing is written yet
            self.engine.check_budget(budget)
            place.control.update(budget=budget, tree=tree)

    def stop(self, session: str) -> None:
        """End this visitor's answer; one that has not begun loses its place."""
        place = self._places.get(session)
        if place is not None and place.begun:
            place.control.stop()
        elif place is not None:
            self.leave(session)

    def fit(self, messages: list[dict], generation: GenerationConfig) -> list[dict]:
        """The newest messages that leave room for an answer. ValueError if the last one alone is too long."""
        limit = self.info.max_context
        room = min(generation.max_new_tokens, limit // 2)
        while len(messages) > 1:
            try:
                if len(self.engine.encode(messages)) + room <= limit:
                    return messages
            except ValueError:  # longer than the context by itself
                pass
            messages = messages[1:]
            while len(messages) > 1 and messages[0]["role"] == "assistant":
                messages = messages[1:]
        self.engine.encode(messages)
        return messages

    def stream(
        self,
        session: str,
        ticket: int,
        messages: list[dict],
        generation: GenerationConfig,
        budget: BudgetConfig,
        tree: TreeConfig,
    ) -> Iterator[Step]:
        """The steps since the last frame, at most 20 times a second, the last ones always. Closing it stops the run.

        Nothing for a ticket that was given back.
        """
        with self._lock:
            place = self._places.get(session)
            if place is None or place.ticket != ticket:
                return
            place.begun = True
        try:
            self.engine.check_budget(budget)
            yield from _frames(self._ask(Request(messages, generation, budget, tree, place.control)))
        finally:
            self.leave(session, place.ticket)

    def _ask(self, request: Request) -> Iterator[StepTrace]:
        """The steps of an answer, as the engine's thread makes them."""
        assert self._batch is not None, "the engine has been waited for"
        outcomes: queue.SimpleQueue[StepTrace | BaseException] = queue.SimpleQueue()
        self._batch.join(request, outcomes.put)
        self._asked.set()
        while True:
            outcome = outcomes.get()
            if isinstance(outcome, BaseException):
                raise outcome
            yield outcome
            if outcome.summary is not None:
                return


def _frames(steps: Iterator[StepTrace]) -> Iterator[Step]:
    """The steps as they are shown: a frame's at a time, the last ones always."""
    pending: Step = []
    shown = 0.0
    for step in steps:
        pending.append(step)
        if step.summary is not None or time.monotonic() - shown >= FRAME_S:
            yield pending
            pending, shown = [], time.monotonic()
