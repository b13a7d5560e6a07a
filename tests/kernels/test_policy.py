"""The select kernel against the engine's own MoE-Spec, written in torch by other hands: the same plan."""

from __future__ import annotations

import pytest
import torch

from kernels.select import Rule, Settings, select
from moespec import BudgetConfig, RouterScores, TreeContext
from moespec.budget import MoESpec, row_weights
from moespec.routing import FAMILIES
from tests.kernels.cases import DEVICE, random

RULES = {
    "softmax, top-k, renormalised": Rule.RENORMALISED,
    "softmax, top-k": Rule.SOFTMAX,
    "top-k, softmax": Rule.SOFTMAX_OF_CHOSEN,
}
# (rows, experts, k): OLMoE's routing, Mixtral's with a larger tree, sizes that are no powers of two
SIZES = [(12, 64, 8), (17, 8, 2), (7, 12, 3)]
SETTINGS = [
    {"budget": 9},
    {"budget": 5, "protect_root": True, "row_weight": "path"},
    {"budget": 8, "row_weight": "depth", "depth_decay": 0.3, "score": "natural"},
    {"coverage": 0.5, "row_weight": "path"},
    {"coverage": 0.4, "protect_root": True, "score": "natural"},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("policy", ["substitution", "truncation"])
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_the_kernel_plans_what_the_engine_plans(family, policy, settings):
    for seed, (num_rows, num_experts, top_k) in enumerate(SIZES):
        logits_TE = random(num_rows, num_experts, seed=seed) * 2
        probs_TE = logits_TE.softmax(dim=-1)
        natural_ids_TK = family.selection(logits_TE, probs_TE).topk(top_k).indices
        natural_weights_TK = family.weights(logits_TE, probs_TE, natural_ids_TK, None)
        depths_T = (torch.arange(num_rows, device=DEVICE) + 1) // 2  # one root
        context = TreeContext(depths_T, -0.3 * depths_T.float() - 0.01, layer=0)
        config = BudgetConfig(policy=policy, **settings)
        scores = RouterScores(logits_TE, probs_TE, natural_ids_TK, natural_weights_TK, family)
        plan = MoESpec(config).plan(scores, context)
        row_weights_T = row_weights(config.row_weight, config.depth_decay, context)
        if row_weights_T is None:
            row_weights_T = torch.ones(num_rows, device=DEVICE)
        moved = Settings.on(
            *(DEVICE, num_rows, config.budget or num_experts),
            truncates=policy == "truncation",
            natural=config.score == "natural",
            protect_root=config.protect_root,
            coverage=config.coverage or 0.0,
        )
        found = select(logits_TE, row_weights_T, moved, top_k, RULES[family.name], torch.float32)
        assert torch.equal(found.kept_E, plan.kept_E)
        assert torch.equal(found.natural_ids_TK, natural_ids_TK) and torch.equal(found.ids_TK, plan.ids_TK)
        torch.testing.assert_close(found.weights_TK, plan.weights_TK, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(found.natural_weights_TK, natural_weights_TK, atol=1e-6, rtol=1e-5)
