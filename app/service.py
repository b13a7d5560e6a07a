"""The only file that talks to the engine: one engine, one answer at a time, settings that move while text streams."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from moespec import EMBEDDED_TARGET, BudgetConfig, Control, GenerationConfig, StepTrace, TreeConfig

if TYPE_CHECKING:
    from moespec import Engine, EngineInfo

FRAME_S = 0.05  # 20 frames a second is what a page keeps up with
Step = list[StepTrace]


class Service:
    """Loads the engine in the background; hands out coalesced steps and each visitor's Control.

    Loading begins with `start`, or with the first who asks for the engine: a page is served before its model is there.
    """

    def __init__(self, target: str | Path = EMBEDDED_TARGET) -> None:
        self._target = target
        self._engine: Engine | None = None
        self._error: BaseException | None = None
        self._ready = threading.Event()
        self._lock = threading.Lock()
        self._controls: dict[str, Control] = {}  # of everyone whose answer is being written or waited for, in order
        self._loader: threading.Thread | None = None

    def start(self) -> None:
        """Begin to load, once."""
        with self._lock:
            if self._loader is None:
                self._loader = threading.Thread(target=self._load, daemon=True)
                self._loader.start()

    def _load(self) -> None:
        try:
            from moespec import Engine  # here, because torch and transformers take seconds

            engine = Engine.from_pretrained(self._target)
            for _ in engine.generate("Hello", GenerationConfig(max_new_tokens=4), BudgetConfig(budget=16)):
                pass  # the first steps are the slow ones: let them be ours
            self._engine = engine
        except Exception as error:
            self._error = error
        self._ready.set()

    @property
    def engine(self) -> Engine:
        """The engine, waited for. ValueError says why there is none."""
        self.start()
        self._ready.wait()
        if self._engine is None:
            raise ValueError(str(self._error))
        return self._engine

    @property
    def info(self) -> EngineInfo:
        return self.engine.info

    @property
    def piece(self) -> Callable[[int], str]:
        """Token id to its text."""
        return self.engine.pieces

    def enter(self, session: str) -> int:
        """Join the queue; how many are before you. ValueError if this visitor's last answer is not finished."""
        with self._lock:
            if session in self._controls:
                raise ValueError("Your last answer is still being written: stop it, or wait for its end.")
            self._controls[session] = Control()
            return len(self._controls) - 1

    def expects(self, session: str) -> bool:
        """Whether this visitor has joined the queue and not left it."""
        return session in self._controls

    def leave(self, session: str) -> None:
        """Stop this visitor's answer, wherever it stands; for someone who is gone."""
        self.stop(session)
        with self._lock:
            self._controls.pop(session, None)

    def update(self, session: str, budget: BudgetConfig, tree: TreeConfig) -> None:
        """Move a visitor's settings: they act from the next step of their answer on. ValueError leaves them alone."""
        if (control := self._controls.get(session)) is not None:
            self.engine.check_budget(budget)
            control.update(budget=budget, tree=tree)

    def stop(self, session: str) -> None:
        if (control := self._controls.get(session)) is not None:
            control.stop()

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
            messages = messages[2:]
        self.engine.encode(messages)
        return messages

    def stream(
        self, session: str, messages: list[dict], generation: GenerationConfig, budget: BudgetConfig, tree: TreeConfig
    ) -> Iterator[Step]:
        """The steps since the last frame, at most 20 times a second, the last ones always. Closing it stops the run."""
        control = self._controls.get(session)
        if control is None:
            return
        pending: Step = []
        shown = 0.0
        try:
            self.engine.check_budget(budget)
            for step in self.engine.generate(messages, generation, budget, tree, control):
                pending.append(step)
                if step.summary is not None or time.monotonic() - shown >= FRAME_S:
                    yield pending
                    pending, shown = [], time.monotonic()
        finally:
            self.leave(session)
