"""Our governor: tree and budget of every step together, for the most tokens per measured second.

Over a whole answer the most tokens per second come from steps that each maximise tokens - price * ms, where the price
of a millisecond is the tokens that it brings anyway: what recent steps got, and what plain decoding gets at the least.

1. The tree stops growing at the probability that would have brought the most so far, and is a chain where that would
   have brought more: no row is drafted to be thrown away. A usual tree is kept to where that would have brought hardly
   less. Where plain decoding would have brought more, nothing is drafted. `hindsight.py` keeps the account.
2. Now and then a tree is grown further, to see whether that would pay. Where nothing is drafted, that is done ever more
   rarely; but a tree that paid there is followed by some more at once, and the past counts for less. To learn takes
   time, too: the longer a plan stays as it is, the fewer steps are learnt from.
3. Every number of rows has its budget: the smallest that keeps the floor of router mass. Without a floor no budget is
   chosen: lossless where the caller is.

What verifying costs and keeps starts as the table's, and is corrected by what steps took and kept.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

from moespec.config import MAX_TREE_TOKENS, BudgetConfig, TreeConfig
from moespec.cost_table import CostTable
from moespec.governors.base import Outcome
from moespec.governors.costs import StepCosts, StepTimes
from moespec.governors.hindsight import PLAIN, THRESHOLDS, USUAL, Account, Shape, ShapeCosts, Tree
from moespec.types import DraftTree

MEMORY = 0.99  # share of what was seen that is kept at each step: about the last hundred count
MASS_MEMORY = 0.95  # of the mass that was kept, at each step that is learnt from
NUM_LOWER = 3  # thresholds below the best, or the usual one, to which trees are grown to see further
LOOK_EVERY = 64, 256  # steps: as a rule, and at the most where nothing is drafted
FIRST_ATTENDED = 24  # steps that are learnt from; then some, ever fewer as long as the plan stays as it is
ATTEND_EVERY, ATTEND_LESS, LONGEST_UNATTENDED = 4, 1.5, 24
NUM_UNLEARNT = 3  # steps that are learnt from in one go; then there is a new plan
NUM_CLOSE_LOOKS, LOOK_COST = 6, 2.0  # that follow one that paid; at the most, in plain steps, where nothing is drafted
ROOT = Tree((1.0,), (0,), (-1,))


class Utility:
    """`mass_floor`: the least share of router mass to keep, mean over layers; None leaves the budget as asked."""

    def __init__(self, table: CostTable, mass_floor: float | None = None) -> None:
        if mass_floor is not None and not 0 < mass_floor <= 1:
            raise ValueError(f"floor={mass_floor} is not allowed: use above 0 and at most 1, or leave it out.")
        self.name = "utility" if mass_floor is None else f"utility:floor={mass_floor:g}"
        self._table, self._costs, self._floor = table, StepCosts(table), mass_floor
        self._times, self._account = StepTimes(), Account()
        self._tokens, self._ms = 1.0, table.plain_ms  # of recent steps, fading
        self._mass_gap = 0.0  # what more of the mass steps keep than the table says
        self._candidates: dict[object, _Candidates] = {}
        self._num_steps, self._look_every, self._next_look = 0, LOOK_EVERY[0], LOOK_EVERY[0]
        self._attend_every, self._next_attended = float(ATTEND_EVERY), 0
        self._num_close_looks = 0
        self._plan = self._planned(TreeConfig(), BudgetConfig())
        self._grown, self._tree, self._is_attended = Shape(PLAIN, is_chain=False), ROOT, True  # of the step under way
        self._unlearnt: list[_Seen] = []
        self._is_due = False

    def settings(self, tree: TreeConfig, budget: BudgetConfig) -> tuple[TreeConfig, BudgetConfig]:
        plan = self._plan
        is_other = (tree is not plan.tree or budget is not plan.budget) and (tree, budget) != (plan.tree, plan.budget)
        if is_other and self._floor is not None and not isinstance(budget.policy, str):
            raise ValueError(
                f"governor={self.name!r} chooses MoE-Spec's budget: use substitution or truncation with it."
            )
        if is_other or self._is_due:
            self._learn()
            if is_other:
                self._account = Account()  # what is asked for has changed, and with it what steps cost and bring
            before, plan = plan, self._planned(tree, budget)
            is_same = plan.usual == before.usual and plan.candidates is before.candidates
            longer = min(self._attend_every * ATTEND_LESS, LONGEST_UNATTENDED)
            self._attend_every = longer if is_same and self._num_steps >= FIRST_ATTENDED else ATTEND_EVERY
            self._plan = plan
        is_look = self._num_close_looks > 0 or self._num_steps >= self._next_look
        if is_look:
            self._num_close_looks = max(0, self._num_close_looks - 1)
            self._look_every = min(2 * self._look_every, LOOK_EVERY[1]) if plan.is_plain else LOOK_EVERY[0]
            self._next_look = self._num_steps + self._look_every
        self._is_attended = is_look or self._num_steps < FIRST_ATTENDED or self._num_steps >= self._next_attended
        if self._is_attended:
            self._next_attended = self._num_steps + round(self._attend_every)
        self._num_steps += 1
        self._grown, config = plan.looking if is_look else plan.usual
        self._tree = ROOT
        return config, budget

    def choose(self, tree: DraftTree, budget: BudgetConfig) -> tuple[DraftTree, BudgetConfig]:
        if self._is_attended:
            path_p = [math.exp(logp) for logp in tree.draft_logp_T.tolist()]
            self._tree = Tree(path_p, tree.depths_T.tolist(), tree.parents_T.tolist())
        if self._floor is not None:
            budget = replace(budget, budget=self._plan.candidates.budgets[tree.num_rows - 1], coverage=None)
        return tree, budget

    def observe(self, outcome: Outcome) -> None:
        self._tokens += (1 - MEMORY) * (outcome.num_tokens - self._tokens)
        self._ms += (1 - MEMORY) * (outcome.step_ms - self._ms)
        if self._is_attended:
            self._unlearnt.append(_Seen(self._grown, self._tree, outcome))
            may_have_paid = self._plan.is_plain and self._grown.place < PLAIN
            self._is_due = may_have_paid or len(self._unlearnt) >= NUM_UNLEARNT

    def _learn(self) -> None:
        """Of steps in one go. Between the forwards of steps Python's code is not in the processor's caches: thinking at
        every step took ten times as long."""
        for seen in self._unlearnt:
            self._learn_of(seen)
        self._unlearnt.clear()
        self._is_due = False

    def _learn_of(self, seen: _Seen) -> None:
        (grown, tree, outcome), plan = seen, self._plan
        last = len(tree.path_p) - 1
        self._times.observe(last + 1, outcome.rest_ms, plan.candidates.costs_ms[last])
        if self._floor is not None and last > 0:
            gap = outcome.mass_kept - plan.candidates.mass_kept[last]
            self._mass_gap += (1 - MASS_MEMORY) * (gap - self._mass_gap)
        if grown.place < PLAIN:
            if plan.is_plain:
                self._account.shorten()
            # An end of the answer may have cut the path short.
            paid = self._account.observe(grown, tree, outcome.path[: outcome.num_tokens], plan.costs)
            if plan.is_plain and paid and not self._num_close_looks:
                self._num_close_looks, self._look_every = NUM_CLOSE_LOOKS, LOOK_EVERY[0]

    @property
    def _price(self) -> float:
        """Tokens that a ms of the table's is worth."""
        plain_ms = self._costs.plain_ms * self._times.ratio(1)
        return max(self._tokens / self._ms * self._times.slowness, 1 / plain_ms)

    def _planned(self, tree: TreeConfig, budget: BudgetConfig) -> _Plan:
        """What the next steps go by, from what is known now."""
        candidates = self._candidates_for(budget)
        known_ms = candidates.costs_ms[: tree.total_tokens]  # of more rows nobody asks
        rows_ms = [ms * self._times.ratio(num_rows) for num_rows, ms in enumerate(known_ms, start=1)]

        def tree_ms(num_rows: int, num_levels: int, num_expanded: int) -> float:
            most = min(num_rows, len(rows_ms))  # a drafter of one's own may have drafted more than it was asked for
            return rows_ms[most - 1] + self._costs.draft_ms(num_levels, num_expanded)

        best = self._account.best(self._price)
        if best.place == PLAIN:  # to see at all, of few rows where rows are dear; those left out count as worth nothing
            num_rows = max(2, sum(ms <= LOOK_COST * rows_ms[0] for ms in rows_ms))
            looking = _grown(replace(tree, total_tokens=min(tree.total_tokens, num_rows)), USUAL)
        else:  # to see further
            looking = _grown(tree, Shape(max(0, min(best.place, USUAL.place) - NUM_LOWER), False))
        costs = ShapeCosts(tree_ms, rows_ms[0], tree)
        return _Plan(tree, budget, _grown(tree, best), looking, candidates, costs)

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


class _Seen(NamedTuple):
    """A step that is learnt from: what its tree was to be, the tree, and what it came to."""

    grown: Shape
    tree: Tree
    outcome: Outcome


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
    usual, looking    what is grown of that, and the configuration for it: as a rule, and to see further
    costs             of what could have been grown
    """

    tree: TreeConfig
    budget: BudgetConfig
    usual: tuple[Shape, TreeConfig]
    looking: tuple[Shape, TreeConfig]
    candidates: _Candidates
    costs: ShapeCosts

    @property
    def is_plain(self) -> bool:
        return self.usual[0].place == PLAIN


@lru_cache(maxsize=256)  # asked for often, of few
def _grown(tree: TreeConfig, shape: Shape) -> tuple[Shape, TreeConfig]:
    """The shape within the tree asked for, which is the limit: no row less likely, no wider, none if it is a root."""
    if tree.total_tokens == 1 or shape.place == PLAIN:
        return Shape(PLAIN, shape.is_chain), replace(tree, total_tokens=1)
    place = max(shape.place, min(bisect_left(THRESHOLDS, tree.min_path_p), PLAIN - 1))
    least_p = max(THRESHOLDS[place], tree.min_path_p)
    return Shape(place, shape.is_chain), replace(tree, min_path_p=least_p, top_k=1 if shape.is_chain else tree.top_k)
