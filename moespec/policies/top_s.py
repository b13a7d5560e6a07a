"""Naive top-S: the yardstick for every method that drops experts by looking at more than one row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from moespec.policies.method import Method, RoutedModel, best_slots, natural_plan
from moespec.types import ExpertPlan, RouterScores, TreeContext


@dataclass(frozen=True)
class TopS(Method):
    """Every row keeps its `s` best slots and drops the rest; weights are renormalised where the family does."""

    method: ClassVar[str] = "top-s"
    s: int

    def __post_init__(self) -> None:
        self.require(self.s >= 1, "s", "1 or more")

    def check(self, model: RoutedModel) -> None:
        self.require_slots("s", model)

    def plan(self, scores: RouterScores, context: TreeContext) -> ExpertPlan:
        if self.s >= scores.top_k:
            return natural_plan(scores)
        ids_TK = scores.natural_ids_TK
        weights_TK = scores.family.weights(scores.logits_TE, scores.probs_TE, ids_TK, best_slots(scores, self.s))
        return ExpertPlan(ids_TK=ids_TK, weights_TK=weights_TK.to(scores.natural_weights_TK.dtype))
