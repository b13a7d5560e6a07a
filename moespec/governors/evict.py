"""EVICT (arXiv 2605.00342): cut the drafted tree where more rows would cost more than they bring. Lossless.

Owns the rule k* = argmax_k E[accepted(T_k)] / C(k): T_k are the k rows most likely to be reached, and what they bring
is one token, the target's own, and every other row with its path probability by the drafter. C comes from a table of
measured costs. The public record says no more of C; ours is the whole step, the draft that is already paid included.
"""

from __future__ import annotations

import itertools

from moespec.config import BudgetConfig, TreeConfig
from moespec.cost_table import CostTable
from moespec.governors.base import Outcome
from moespec.governors.costs import StepCosts
from moespec.tree import most_likely_rows
from moespec.types import DraftTree


class Evict:
    """Cuts; everything else stays as it is asked for."""

    name = "evict"

    def __init__(self, table: CostTable) -> None:
        self._costs, self._top_k = StepCosts(table), TreeConfig().top_k

    def settings(self, tree: TreeConfig, budget: BudgetConfig) -> tuple[TreeConfig, BudgetConfig]:
        self._top_k = tree.top_k
        return tree, budget

    def choose(self, tree: DraftTree, budget: BudgetConfig) -> tuple[DraftTree, BudgetConfig]:
        path_p = sorted(tree.draft_logp_T.exp().tolist(), reverse=True)
        costs_ms = self._costs.by_rows(budget.budget)
        num_levels = int(tree.depths_T[-1])
        # As of a tree that is grown to its full width, level by level.
        draft_ms = self._costs.draft_ms(num_levels, (num_levels - 1) * self._top_k)
        gains = itertools.accumulate(path_p)  # the root's probability of 1 stands for the bonus token
        rates = [gain / (draft_ms + cost_ms) for gain, cost_ms in zip(gains, costs_ms, strict=False)]
        num_rows = rates.index(max(rates)) + 1
        return (tree if num_rows == tree.num_rows else most_likely_rows(tree, num_rows)), budget

    def observe(self, outcome: Outcome) -> None:
        """Nothing is learnt: the rule has no memory."""
