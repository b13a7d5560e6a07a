"""The only file that talks to the engine: one engine, one visitor at a time, settings that move while text streams."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

from moespec import EMBEDDED_TARGET, BudgetConfig, Control, Engine, GenerationConfig, StepTrace, TreeConfig

FRAME_S = 0.05  # 20 frames a second is what a page keeps up with


class Service:
    """Loads the engine in the background; hands out coalesced steps and each visitor's Control."""

    def __init__(self) -> None:
        self._engine: Engine | None = None
        self._error: BaseException | None = None
        self._ready = threading.Event()
        self._controls: dict[str, Control] = {}
        threading.Thread(target=self._load, daemon=True).start()

    def _load(self) -> None:
        try:
            engine = Engine.from_pretrained(EMBEDDED_TARGET)
            for _ in engine.generate("Hello", GenerationConfig(max_new_tokens=4)):
                pass  # the first steps are the slow ones: let them be ours
            self._engine = engine
        except Exception as error:
            self._error = error
        self._ready.set()

    @property
    def engine(self) -> Engine:
        """The engine, waited for. ValueError says why there is none."""
        self._ready.wait()
        if self._engine is None:
            raise ValueError(str(self._error))
        return self._engine

    def update(self, session: str, budget: BudgetConfig) -> None:
        """Move a visitor's budget: it acts from the next step of their running answer on."""
        if session in self._controls:
            self._controls[session].update(budget=budget)

    def stop(self, session: str) -> None:
        if session in self._controls:
            self._controls[session].stop()

    def stream(
        self, session: str, messages: list[dict], generation: GenerationConfig, budget: BudgetConfig, tree: TreeConfig
    ) -> Iterator[list[StepTrace]]:
        """The steps since the last frame, at most 20 times a second, the last ones always. Closing it stops the run."""
        control = self._controls[session] = Control()
        pending: list[StepTrace] = []
        shown = 0.0
        steps = self.engine.generate(messages, generation, budget, tree, control)
        try:
            for step in steps:
                pending.append(step)
                if step.summary is not None or time.monotonic() - shown >= FRAME_S:
                    yield pending
                    pending, shown = [], time.monotonic()
        finally:
            control.stop()
            del self._controls[session]
