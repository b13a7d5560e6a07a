"""OEA, opportunistic expert activation (arXiv 2511.02237): what some row needs, every row may use for nothing.

The paper's batch of requests is the tree's rows here. Its simplified form: one parameter, k0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from moespec.budget import substitute
from moespec.policies.method import Method, RoutedModel, best_slots, experts_in, natural_plan
from moespec.types import ExpertPlan, RouterScores, TreeContext


@dataclass(frozen=True)
class OEA(Method):
    """Every row keeps its `k0` best experts; S is their union; then each row fills up to k with its best inside S.

    A row's k0 are its best experts anywhere and lie in S, so that its choice is its top-k inside S: MoE-Spec's
    substitution with another S. (A family that chooses groups of experts first does so inside S as well.) Where S has
    fewer than k experts, rows have fewer. Weights are the family's own for the chosen. k0 = k changes nothing.
    """

    method: ClassVar[str] = "oea"
    k0: int

    def __post_init__(self) -> None:
        self.require(self.k0 >= 1, "k0", "1 or more")

    def check(self, model: RoutedModel) -> None:
        self.require_slots("k0", model)

    def plan(self, scores: RouterScores, context: TreeContext) -> ExpertPlan:
        if self.k0 >= scores.top_k:
            return natural_plan(scores)
        kept_E = experts_in(scores, best_slots(scores, self.k0))
        ids_TK, weights_TK = substitute(scores, kept_E)
        return ExpertPlan(ids_TK=ids_TK, weights_TK=weights_TK, kept_E=kept_E)
