"""After Alloc-MoE (arXiv 2604.08133): one budget for all layers together, split by how sensitive each of them is.

The paper splits a budget of activations by sensitivity and dynamic programming, and across tokens by score. What is
measured and minimised here is ours: MoE-Spec's shortlist sizes, for a tree's rows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np

from moespec.budget import MoESpec
from moespec.config import BudgetConfig
from moespec.policies.method import Method, RoutedModel, natural_plan
from moespec.policies.profiles import Profile, read_profile
from moespec.types import ExpertPlan, RouterScores, TreeContext


@dataclass(frozen=True)
class AllocMoELike(Method):
    """MoE-Spec with a budget B_l per layer: sum_l B_l at most L * `b`, sum_l KL_l(B_l) the least that can be.

    KL_l(B): divergence of the final logits from the unbudgeted ones with layer l alone budgeted at B, measured by
    `inspect sensitivity` under the paper's setting; straight lines between the measured budgets, 0 at B = E. The other
    parameters are MoE-Spec's.
    """

    method: ClassVar[str] = "alloc-moe-like"
    b: int
    policy: str = "substitution"
    score: str = "softmax"
    row_weight: str = "uniform"
    root: bool = False
    profile: Profile = field(kw_only=True, compare=False, repr=False)

    def __post_init__(self) -> None:
        self._config(self.b)  # refuses what MoE-Spec refuses

    @classmethod
    def read(cls, values: dict[str, Any], profiles: Path | None) -> Self:
        return cls(**values, profile=read_profile(profiles, "sensitivity", cls.method))

    def check(self, model: RoutedModel) -> None:
        self.require_experts("b", model)
        self.profile.check(model)

    def plan(self, scores: RouterScores, context: TreeContext) -> ExpertPlan:
        method = None if self.b >= scores.num_experts else self.by_layer[context.layer]
        return natural_plan(scores) if method is None else method.plan(scores, context)

    @cached_property
    def by_layer(self) -> Mapping[int, MoESpec | None]:
        """Decoder layer -> its MoE-Spec; None where every expert is kept."""
        model, tensors = self.profile.model, self.profile.tensors
        top_k, num_experts = model.top_k, model.num_experts
        sizes = np.arange(top_k, num_experts + 1)
        measured = [*tensors["budgets"].tolist(), num_experts]
        kl_LX = np.array([np.interp(sizes, measured, [*kl_G, 0.0]) for kl_G in tensors["kl"].tolist()])
        num_extra = len(model.layers) * (max(self.b, top_k) - top_k)
        budgets = [top_k + extra for extra in allocate(kl_LX, num_extra)]
        return {
            layer: MoESpec(self._config(budget)) if budget < num_experts else None
            for layer, budget in zip(model.layers, budgets, strict=True)
        }

    def _config(self, budget: int) -> BudgetConfig:
        return BudgetConfig(
            budget, policy=self.policy, score=self.score, row_weight=self.row_weight, protect_root=self.root
        )


def allocate(cost_LX: np.ndarray, num_extra: int) -> list[int]:
    """x_l, 0 <= x_l < X, with sum_l x_l <= num_extra and the least sum_l cost[l, x_l]; the smallest x_l of equals.

    Dynamic programming over layers: least[r] is the least cost so far with at most r in use.
    """
    num_choices = cost_LX.shape[1]
    least_R = np.zeros(num_extra + 1)
    chosen = []
    for cost_X in cost_LX:
        total_XR = np.full((num_choices, num_extra + 1), math.inf)
        for x, cost in enumerate(cost_X[: num_extra + 1]):
            total_XR[x, x:] = least_R[: num_extra + 1 - x] + cost
        chosen.append(total_XR.argmin(axis=0))
        least_R = total_XR.min(axis=0)
    left, allocation = num_extra, []
    for chosen_R in reversed(chosen):
        allocation.append(int(chosen_R[left]))
        left -= allocation[-1]
    return allocation[::-1]
