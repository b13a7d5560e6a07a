"""Our governor: rows and budget of every step together, for the most tokens per measured second.

Over a whole answer the most tokens per second come from steps that each maximise tokens - price * ms, where the price
of a millisecond is the tokens that it brings anyway: what recent steps got, and what plain decoding gets at the least.
A row is worth verifying while it is likelier to be reached than its time is worth elsewhere. So:

1. Before drafting, rows below the probability that pays for a row are not even grown.
2. After drafting, the rows are taken in the order of their probability, as many as make the most, each number of rows
   under the smallest budget that keeps the floor of router mass.
3. Plain decoding is always a candidate: when speculation has lost more than a few tokens against it, it pauses, and is
   tried again after a while, at ever longer intervals.

Probabilities are the drafter's, costs and router mass the table's; all are corrected by what steps brought, took and
kept. Without a floor no budget is chosen: lossless where the caller is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from moespec.config import MAX_TREE_TOKENS, BudgetConfig, TreeConfig
from moespec.cost_table import CostTable
from moespec.governors.base import Outcome
from moespec.governors.costs import StepCosts
from moespec.tree import most_likely_rows
from moespec.types import DraftTree

MEMORY = 0.95  # share of what was seen that is kept at each step: about the last twenty count
MIN_PATH_P, MAX_PATH_P = 0.02, 0.9  # of the least likely row that is drafted
SMALL_TREE = 16  # rows
LOSS_ALLOWED = 4.0  # tokens that plain decoding would have been ahead, at which speculation pauses
NUM_PAUSED = (16, 256)  # plain steps of a pause: the first, and the most
NUM_GOOD = 64  # speculative steps without a pause, after which pauses are short again


class Utility:
    """`mass_floor`: the least share of router mass to keep, mean over layers; None leaves the budget as asked."""

    def __init__(self, table: CostTable, mass_floor: float | None = None) -> None:
        if mass_floor is not None and not 0 < mass_floor <= 1:
            raise ValueError(f"floor={mass_floor} is not allowed: use above 0 and at most 1, or leave it out.")
        self.name = "utility" if mass_floor is None else f"utility:floor={mass_floor:g}"
        self._table, self._costs, self._floor = table, StepCosts(table), mass_floor
        self._tokens, self._ms = 1.0, table.plain_ms  # of recent speculative steps, fading
        self._accepted, self._promised = 1.0, 1.0  # draft tokens of theirs, and what the drafter made of the same rows
        self._slowness = 1.0  # how long steps take, of what the table says
        self._mass_gap = 0.0  # what more of the mass steps keep than the table says
        self._expected = _Expected(table.plain_ms, 1.0, 0.0)
        self._lost = 0.0  # tokens against plain decoding, since speculation was last ahead of it
        self._num_good, self._num_paused, self._pause = 0, 0, NUM_PAUSED[0]
        self._candidates: dict[object, _Candidates] = {}

    def settings(self, tree: TreeConfig, budget: BudgetConfig) -> tuple[TreeConfig, BudgetConfig]:
        self._expected = _Expected(self._costs.plain_ms, 1.0, 0.0)
        if self._num_paused > 0:
            return replace(tree, total_tokens=1), budget
        least_p = self._price * self._candidates_for(budget).a_row_ms / self._honesty
        return replace(tree, min_path_p=min(max(least_p, MIN_PATH_P), MAX_PATH_P)), budget

    def choose(self, tree: DraftTree, budget: BudgetConfig) -> tuple[DraftTree, BudgetConfig]:
        candidates, price, honesty = self._candidates_for(budget), self._price, self._honesty
        path_p = sorted(tree.draft_logp_T.exp().tolist(), reverse=True)
        best, num_rows, promised, gain = -math.inf, 1, 0.0, 0.0
        for number, (p, cost_ms) in enumerate(zip(path_p, candidates.costs_ms, strict=False), start=1):
            gain += p  # the root's probability of 1 stands for the bonus token
            value = 1 + honesty * (gain - 1) - price * cost_ms
            if value > best:
                best, num_rows, promised = value, number, gain - 1
        chosen = candidates.budgets[num_rows - 1]
        self._expected = _Expected(
            step_ms=candidates.costs_ms[num_rows - 1] + self._costs.draft_ms(int(tree.depths_T[-1])),
            mass_kept=1.0 if num_rows == 1 else self._table.mass_kept(num_rows, chosen),
            num_accepted=promised,
        )
        if self._floor is not None:
            budget = replace(budget, budget=chosen, coverage=None)
        return (tree if num_rows == tree.num_rows else most_likely_rows(tree, num_rows)), budget

    def observe(self, outcome: Outcome) -> None:
        expected = self._expected
        self._slowness = _faded(self._slowness, outcome.step_ms / expected.step_ms)
        if expected.mass_kept < 1:
            self._mass_gap = _faded(self._mass_gap, outcome.mass_kept - expected.mass_kept)
        if self._num_paused > 0:
            self._num_paused -= 1
            return
        self._tokens = _faded(self._tokens, outcome.num_tokens)
        self._ms = _faded(self._ms, outcome.step_ms)
        self._accepted = _faded(self._accepted, outcome.num_tokens - 1)
        self._promised = _faded(self._promised, expected.num_accepted)
        self._lost = max(0.0, self._lost + outcome.step_ms * self._plain_rate - outcome.num_tokens)
        self._num_good += 1
        if self._lost > LOSS_ALLOWED:
            if self._num_good > NUM_GOOD:
                self._pause = NUM_PAUSED[0]
            self._num_paused, self._num_good, self._lost = self._pause, 0, 0.0
            self._pause = min(2 * self._pause, NUM_PAUSED[1])

    @property
    def _plain_rate(self) -> float:
        """Tokens per ms of plain decoding, as slow as steps are now."""
        return 1 / (self._costs.plain_ms * self._slowness)

    @property
    def _price(self) -> float:
        """Tokens that a ms of the table's is worth."""
        return max(self._tokens / self._ms, self._plain_rate) * self._slowness

    @property
    def _honesty(self) -> float:
        """What of the draft tokens that the drafter expects is accepted."""
        return min(max(self._accepted / self._promised, 0.2), 2.0)

    def _candidates_for(self, budget: BudgetConfig) -> _Candidates:
        """With a floor the cheapest budgets that keep it; else the one asked for."""
        key = budget.budget if self._floor is None else round(self._floor - self._mass_gap, 2)
        if key not in self._candidates:
            sizes = range(1, MAX_TREE_TOKENS + 1)
            budgets = [budget.budget if self._floor is None else self._least_budget(rows) for rows in sizes]
            costs_ms = [self._costs.by_rows(chosen)[rows - 1] for rows, chosen in zip(sizes, budgets, strict=True)]
            self._candidates[key] = _Candidates(budgets, costs_ms)
        return self._candidates[key]

    def _least_budget(self, num_rows: int) -> int | None:
        """The smallest that keeps the floor, which reads least; None where only all experts do."""
        assert self._floor is not None
        budgets = range(self._table.top_k, self._table.num_experts)
        kept = (budget for budget in budgets if self._table.mass_kept(num_rows, budget) + self._mass_gap >= self._floor)
        return next(kept, None)


@dataclass(frozen=True)
class _Expected:
    """What the table says of the step under way."""

    step_ms: float
    mass_kept: float
    num_accepted: float


@dataclass(frozen=True)
class _Candidates:
    """For 1 row, 2, and so on: the budget it would be verified under and what that costs, without drafting."""

    budgets: list[int | None]
    costs_ms: list[float]

    @property
    def a_row_ms(self) -> float:
        """What a row costs on the average of the small trees, which are the cheapest."""
        return (self.costs_ms[SMALL_TREE - 1] - self.costs_ms[1]) / (SMALL_TREE - 2)


def _faded(memory: float, seen: float) -> float:
    return MEMORY * memory + (1 - MEMORY) * seen
