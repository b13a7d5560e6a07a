"""What may change while a run is under way: budget, tree, stop. Thread-safe; the engine reads it between steps."""

from __future__ import annotations

import threading

from moespec.config import BudgetConfig, TreeConfig


class Control:
    """Handed to `Engine.generate(control=...)` and updated from any other thread.

    A setting given here replaces the run's from the next step on; `stop()` ends the run after the step under way.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._budget: BudgetConfig | None = None
        self._tree: TreeConfig | None = None
        self._stopped = threading.Event()

    def update(self, *, budget: BudgetConfig | None = None, tree: TreeConfig | None = None) -> None:
        """Replace what is given; None leaves that part as it is."""
        with self._lock:
            self._budget = budget or self._budget
            self._tree = tree or self._tree

    def stop(self) -> None:
        self._stopped.set()

    @property
    def stopped(self) -> bool:
        return self._stopped.is_set()

    def settings(self, budget: BudgetConfig, tree: TreeConfig) -> tuple[BudgetConfig, TreeConfig]:
        """The settings in force: this object's where it has some, else the run's own."""
        with self._lock:
            return self._budget or budget, self._tree or tree
