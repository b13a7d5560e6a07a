"""How much each layer minds a budget: the model's divergence from itself with that layer alone budgeted.

Owns which budgets are tried. The trees, and the row that is read, are those of `bench.agreement.root_logits`. Letters:
L MoE layers, G budgets tried.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from moespec.bench.agreement import root_logits
from moespec.bench.arms import LARGE, Arm
from moespec.budget import MoESpec
from moespec.config import BudgetConfig
from moespec.engine import Engine
from moespec.policies.method import natural_plan
from moespec.types import ExpertPlan, RouterScores, TreeContext

STEPS_PER_DOUBLING = 3  # of the budgets tried: divergence falls fast where budgets are small
TREE = LARGE  # as in the paper, every step is as large as the last


@dataclass(frozen=True)
class OneLayer:
    """MoE-Spec, the paper's setting, in one decoder layer; the others route as they do."""

    layer: int
    budget: int

    def plan(self, scores: RouterScores, context: TreeContext) -> ExpertPlan:
        if context.layer != self.layer:
            return natural_plan(scores)
        return MoESpec(BudgetConfig(self.budget)).plan(scores, context)


def budgets_to_try(top_k: int, num_experts: int) -> list[int]:
    """From top-k up to below E."""
    steps = range(1 + int(STEPS_PER_DOUBLING * math.log2(num_experts / top_k)))
    sizes = (round(top_k * 2 ** (step / STEPS_PER_DOUBLING)) for step in steps)
    return sorted({size for size in sizes if size < num_experts})


@torch.inference_mode()
def sensitivity(engine: Engine, texts: list[list[int]], budgets: list[int], progress: Callable[[str], None]) -> Tensor:
    """Mean KL(unbudgeted || budgeted) of the next token in nats, fp64 [L, G], over every position of the texts."""
    layers = [moe.layer for moe in engine.target.moe_layers]
    arms = [
        Arm("one layer", TREE, BudgetConfig(policy=OneLayer(layer, budget))) for layer in layers for budget in budgets
    ]
    total_A, num_positions = torch.zeros(len(arms), dtype=torch.float64), 0
    for number, token_ids in enumerate(texts, start=1):
        for position in root_logits(engine, arms, token_ids, first_root=1):
            natural_V = position.natural_V.double().log_softmax(dim=-1)
            budgeted_AV = torch.stack(position.by_arm).double().log_softmax(dim=-1)
            kl_AV = F.kl_div(budgeted_AV, natural_V.expand_as(budgeted_AV), reduction="none", log_target=True)
            total_A += kl_AV.sum(dim=-1).cpu()
            num_positions += 1
        progress(f"sensitivity: text {number} of {len(texts)}")
    return (total_A / num_positions).view(len(layers), len(budgets))
