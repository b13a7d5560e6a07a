"""A table of measured costs as governors ask it: thousands of times a second, and of the machine as it is now.

Owns the lists, and their correction by what a governor's own steps take. Knows nothing of how a table is measured.
"""

from __future__ import annotations

import itertools

from moespec.config import MAX_TREE_TOKENS
from moespec.cost_table import CostTable

NUM_SIZES = MAX_TREE_TOKENS.bit_length()
NEARNESS = 0.25  # how much a step tells of steps of half or twice as many rows
# Shares of what was seen that are kept at each step: of how slow the machine is, which changes in moments; of what a
# size takes more than others, which hardly does, and the last hundred steps are too noisy to tell.
QUICK, SLOW = 0.95, 0.997
PRIOR = 8.0  # steps that the table counts for


class StepCosts:
    """Milliseconds of verifying and the rest, by rows and budget, and of drafting, by levels and nodes."""

    def __init__(self, table: CostTable) -> None:
        self.table = table
        self._by_budget: dict[int | None, list[float]] = {}
        self._growth_ms = table.growth_ms

    @property
    def plain_ms(self) -> float:
        return self.table.plain_ms

    def by_rows(self, budget: int | None) -> list[float]:
        """Of 1 row, of 2, and so on: verifying and what comes after, without drafting; never falling with rows."""
        if budget not in self._by_budget:
            found = [self.table.predict_ms(rows, budget) for rows in range(1, MAX_TREE_TOKENS + 1)]
            self._by_budget[budget] = list(itertools.accumulate(found, max))
        return self._by_budget[budget]

    def draft_ms(self, num_levels: int, num_expanded: int) -> float:
        """Growing so many levels, for which so many nodes below the root are expanded."""
        first_ms, level_ms, node_ms = self._growth_ms
        return first_ms + level_ms * (num_levels - 1) + node_ms * num_expanded


class StepTimes:
    """What steps take of what the table says, learnt from one step after the other.

    `slowness` is how slow the machine is now, for steps of all sizes; `ratio` what steps of a size take more or less.
    A step tells of sizes near its own, of plain steps only if it is one. Single steps are held to half or twice what
    was expected: others disturb the machine for moments.
    """

    def __init__(self) -> None:
        self.slowness = 1.0
        self._weights, self._seen = [PRIOR] * NUM_SIZES, [PRIOR] * NUM_SIZES

    def ratio(self, num_rows: int) -> float:
        size = _size_of(num_rows)
        return self._seen[size] / self._weights[size]

    def observe(self, num_rows: int, ms: float, table_ms: float) -> None:
        """A step of so many rows took so long, drafting aside, where the table has `table_ms`."""
        ratio, own = self.ratio(num_rows), _size_of(num_rows)
        surprise = min(max(ms / (table_ms * ratio * self.slowness), 0.5), 2.0)
        for size in range(1, NUM_SIZES) if own else (0,):
            nearness = NEARNESS ** abs(size - own)
            kept = 1 - nearness * (1 - SLOW)
            self._weights[size] = kept * self._weights[size] + nearness
            self._seen[size] = kept * self._seen[size] + nearness * surprise * ratio
        self.slowness *= QUICK + (1 - QUICK) * surprise


def _size_of(num_rows: int) -> int:
    """1 row, 2 to 3, 4 to 7 and so on."""
    return num_rows.bit_length() - 1
