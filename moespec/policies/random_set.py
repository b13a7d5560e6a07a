"""A random set of experts: the yardstick for every choice of B experts."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import ClassVar

import torch

from moespec.budget import substitute
from moespec.policies.method import Method, RoutedModel, natural_plan
from moespec.types import ExpertPlan, RouterScores, TreeContext


@dataclass(frozen=True)
class RandomSet(Method):
    """MoE-Spec's substitution into `b` experts drawn by seed, layer and position of the root; runs repeat.

    Nothing is protected, the root's experts neither. Clamped to [k, E] like a budget.
    """

    method: ClassVar[str] = "random"
    b: int
    seed: int = 0

    def __post_init__(self) -> None:
        self.require(self.b >= 1, "b", "1 or more")
        self.require(self.seed >= 0, "seed", "0 or more")

    def check(self, model: RoutedModel) -> None:
        self.require_experts("b", model)

    def plan(self, scores: RouterScores, context: TreeContext) -> ExpertPlan:
        if self.b >= scores.num_experts:
            return natural_plan(scores)
        rng = random.Random(f"{self.seed}:{context.layer}:{context.position}")
        drawn = rng.sample(range(scores.num_experts), max(self.b, scores.top_k))
        kept_E = torch.zeros(scores.num_experts, dtype=torch.bool)
        kept_E[drawn] = True
        kept_E = kept_E.to(scores.logits_TE.device)
        ids_TK, weights_TK = substitute(scores, kept_E)
        return ExpertPlan(ids_TK=ids_TK, weights_TK=weights_TK, kept_E=kept_E)
