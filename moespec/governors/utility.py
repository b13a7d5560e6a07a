"""Our governor: tree and budget of every step together, for the most tokens per measured second.

Over a whole answer the most tokens per second come from steps that each maximise tokens - price * ms, where the price
of a millisecond is the tokens that it brings anyway: what recent steps got, and what plain decoding gets at the least.

1. The tree stops growing at the probability that would have brought the most so far (`hindsight.py`): no row is
   drafted to be thrown away. Where nothing brings more than plain decoding does, nothing is drafted. Text that goes
   better than usual has an account of its own: unlikely rows are worth more where the drafter is at a loss.
2. Now and then a tree is grown further, to see whether that would pay; where nothing is drafted, ever more rarely.
3. Every number of rows has its budget: the smallest that keeps the floor of router mass. Without a floor no budget is
   chosen: lossless where the caller is.

What steps cost and keep starts as the table's, and is corrected by what they took and kept.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from moespec.config import MAX_TREE_TOKENS, BudgetConfig, TreeConfig
from moespec.cost_table import CostTable
from moespec.governors.base import Outcome
from moespec.governors.costs import StepCosts, StepTimes
from moespec.governors.hindsight import PLAIN, START, THRESHOLDS, Hindsight
from moespec.types import DraftTree

MEMORY, LONG_MEMORY = 0.97, 0.995  # share of what was seen that is kept at each step: the last 30 count, or 200
NUM_LOWER = 3  # thresholds below the best, to which trees are grown to see further
LOOK_EVERY = 48, 256  # steps: as a rule, and at the most where nothing is drafted
FIRST_ATTENDED, ATTEND_EVERY = 24, 3  # steps that are learnt from: the first ones, then some: thinking takes time, too
PLAN_EVERY = 6  # steps


class Utility:
    """`mass_floor`: the least share of router mass to keep, mean over layers; None leaves the budget as asked."""

    def __init__(self, table: CostTable, mass_floor: float | None = None) -> None:
        if mass_floor is not None and not 0 < mass_floor <= 1:
            raise ValueError(f"floor={mass_floor} is not allowed: use above 0 and at most 1, or leave it out.")
        self.name = "utility" if mass_floor is None else f"utility:floor={mass_floor:g}"
        self._table, self._costs, self._floor = table, StepCosts(table), mass_floor
        self._times, self._of_hard_text, self._of_easy_text = StepTimes(), Hindsight(), Hindsight()
        self._tokens, self._ms = 1.0, table.plain_ms  # of recent steps, fading
        self._usual_tokens = 1.0  # of steps as a rule
        self._mass_gap = 0.0  # what more of the mass steps keep than the table says
        self._candidates: dict[object, _Candidates] = {}
        self._num_steps, self._look_every, self._next_look = 0, LOOK_EVERY[0], LOOK_EVERY[0]
        self._best = START  # place in THRESHOLDS
        self._plan = self._planned(TreeConfig(), BudgetConfig())
        self._step = _Step(PLAIN, is_attended=True)

    def settings(self, tree: TreeConfig, budget: BudgetConfig) -> tuple[TreeConfig, BudgetConfig]:
        if self._num_steps % PLAN_EVERY == 0 or (self._plan.tree, self._plan.budget) != (tree, budget):
            self._best = self._hindsight.best(self._price)
            self._plan = self._planned(tree, budget)
        is_look = self._num_steps >= self._next_look
        if is_look:
            self._look_every = min(2 * self._look_every, LOOK_EVERY[1]) if self._best == PLAIN else LOOK_EVERY[0]
            self._next_look = self._num_steps + self._look_every
        is_attended = is_look or self._num_steps < FIRST_ATTENDED or self._num_steps % ATTEND_EVERY == 0
        self._num_steps += 1
        self._step = _Step(_lower(self._best) if is_look else self._best, is_attended)
        return (self._plan.looking if is_look else self._plan.usual), budget

    def choose(self, tree: DraftTree, budget: BudgetConfig) -> tuple[DraftTree, BudgetConfig]:
        if self._floor is None and not self._step.is_attended:
            return tree, budget
        path_p = [math.exp(logp) for logp in tree.draft_logp_T.tolist()]
        self._step = replace(self._step, path_p=path_p, depths=tree.depths_T.tolist())
        if self._floor is not None:
            budget = replace(budget, budget=self._plan.candidates.budgets[len(path_p) - 1], coverage=None)
        return tree, budget

    def observe(self, outcome: Outcome) -> None:
        if self._step.is_attended:
            self._learn(outcome)
        self._tokens = _faded(self._tokens, outcome.num_tokens)
        self._ms = _faded(self._ms, outcome.step_ms)
        self._usual_tokens = _faded(self._usual_tokens, outcome.num_tokens, LONG_MEMORY)

    def _learn(self, outcome: Outcome) -> None:
        """Before the outcome counts for what text is like: else lucky steps would be easy text's."""
        step, plan = self._step, self._plan
        last = len(step.path_p) - 1
        self._times.observe(last + 1, outcome.rest_ms, plan.candidates.costs_ms[last])
        if self._floor is not None and last > 0:
            self._mass_gap = _faded(self._mass_gap, outcome.mass_kept - plan.candidates.mass_kept[last])
        if step.place < PLAIN:
            self._hindsight.observe(step.place, step.path_p, step.depths, outcome.path, plan.cost_ms, plan.rows_ms[0])

    @property
    def _hindsight(self) -> Hindsight:
        """The account of text like this."""
        return self._of_easy_text if self._tokens > self._usual_tokens else self._of_hard_text

    @property
    def _price(self) -> float:
        """Tokens that a ms of the table's is worth."""
        plain_ms = self._costs.plain_ms * self._times.ratio(1)
        return max(self._tokens / self._ms * self._times.slowness, 1 / plain_ms)

    def _planned(self, tree: TreeConfig, budget: BudgetConfig) -> _Plan:
        """What the next steps go by, from what is known now."""
        candidates = self._candidates_for(budget)
        rows_ms = [ms * self._times.ratio(num_rows) for num_rows, ms in enumerate(candidates.costs_ms, start=1)]
        levels_ms = [self._costs.draft_ms(min(depth + 1, tree.depth)) for depth in range(tree.depth + 1)]
        usual, looking = (_narrowed(tree, place) for place in (self._best, _lower(self._best)))
        return _Plan(tree, budget, usual, looking, candidates, rows_ms, levels_ms)

    def _candidates_for(self, budget: BudgetConfig) -> _Candidates:
        """With a floor the cheapest budgets that keep it; else the one asked for."""
        key = budget.budget if self._floor is None else round(self._floor - self._mass_gap, 2)
        if key not in self._candidates:
            sizes = range(1, MAX_TREE_TOKENS + 1)
            budgets = [budget.budget if self._floor is None else self._least_budget(rows) for rows in sizes]
            pairs = list(zip(sizes, budgets, strict=True))
            self._candidates[key] = _Candidates(
                budgets=budgets,
                costs_ms=[self._costs.by_rows(chosen)[rows - 1] for rows, chosen in pairs],
                mass_kept=[self._table.mass_kept(rows, chosen) for rows, chosen in pairs],
            )
        return self._candidates[key]

    def _least_budget(self, num_rows: int) -> int | None:
        """The smallest that keeps the floor, which reads least; None where only all experts do."""
        assert self._floor is not None
        budgets = range(self._table.top_k, self._table.num_experts)
        kept = (budget for budget in budgets if self._table.mass_kept(num_rows, budget) + self._mass_gap >= self._floor)
        return next(kept, None)


@dataclass(frozen=True)
class _Step:
    """The step under way: how far its tree was to grow, a place in THRESHOLDS, whether it is learnt from, and its rows,
    the root first."""

    place: int
    is_attended: bool
    path_p: Sequence[float] = (1.0,)
    depths: Sequence[int] = (0,)


@dataclass(frozen=True)
class _Candidates:
    """For 1 row, 2, and so on: the budget it would be verified under, what that costs without drafting, and keeps."""

    budgets: list[int | None]
    costs_ms: list[float]
    mass_kept: list[float]


@dataclass(frozen=True)
class _Plan:
    """What steps go by until the next plan.

    tree, budget      what is asked for
    usual, looking    what is drafted with of that, as a rule and to see further
    rows_ms           verifying 1 row, 2, and so on, and the rest
    levels_ms         drafting a tree whose deepest row is at 0, 1, and so on
    """

    tree: TreeConfig
    budget: BudgetConfig
    usual: TreeConfig
    looking: TreeConfig
    candidates: _Candidates
    rows_ms: list[float]
    levels_ms: list[float]

    def cost_ms(self, num_rows: int, depth: int) -> float:
        return self.rows_ms[num_rows - 1] + self.levels_ms[depth]


def _lower(place: int) -> int:
    """From where one sees further, also where nothing was drafted for long."""
    return max(0, min(place, START) - NUM_LOWER)


def _narrowed(tree: TreeConfig, place: int) -> TreeConfig:
    return replace(tree, total_tokens=1) if place == PLAIN else replace(tree, min_path_p=THRESHOLDS[place])


def _faded(value: float, seen: float, memory: float = MEMORY) -> float:
    return memory * value + (1 - memory) * seen
