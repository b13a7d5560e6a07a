"""A table of measured costs as governors ask it: thousands of times a second, so that answers are kept.

Owns nothing but the lists. Knows nothing of how a table is measured.
"""

from __future__ import annotations

from functools import cached_property

from moespec.config import MAX_TREE_TOKENS
from moespec.cost_table import CostTable

MAX_LEVELS = 16


class StepCosts:
    """Milliseconds of verifying and the rest, by rows and budget, and of drafting, by levels."""

    def __init__(self, table: CostTable) -> None:
        self.table = table
        self._by_budget: dict[int | None, list[float]] = {}

    @property
    def plain_ms(self) -> float:
        return self.table.plain_ms

    def by_rows(self, budget: int | None) -> list[float]:
        """Of 1 row, of 2, and so on: verifying and what comes after, without drafting; never falling with rows."""
        if budget not in self._by_budget:
            found = [self.table.predict_ms(rows, budget) for rows in range(1, MAX_TREE_TOKENS + 1)]
            self._by_budget[budget] = [max(found[: n + 1]) for n in range(len(found))]
        return self._by_budget[budget]

    def draft_ms(self, num_levels: int) -> float:
        """Growing so many levels with the least branching that was measured."""
        return self._draft_ms[min(num_levels, MAX_LEVELS)]

    @cached_property
    def _draft_ms(self) -> list[float]:
        top_k = min(point.top_k for point in self.table.drafts)
        return [self.table.draft_ms(levels, top_k) for levels in range(MAX_LEVELS + 1)]
