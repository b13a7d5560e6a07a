"""What all expert policies keep to, for every router family."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from moespec.policies.layer_budgets import AllocMoELike
from moespec.policies.oea import OEA
from moespec.policies.random_set import RandomSet
from moespec.policies.sere import Sere
from moespec.policies.top_s import TopS
from moespec.routing import FAMILIES
from tests.moespec.policies import (
    EVERY_POLICY,
    GROUPED,
    MIXER,
    WHERE,
    kept_by,
    routed,
    sensitivity,
    similarity,
)
from tests.moespec.test_budget import NUM_EXPERTS, NUM_ROWS, TOP_K, random_scores

IDENTITIES = {
    "sere, S = k": lambda: Sere(TOP_K, profile=similarity()),
    "sere, rho above 1": lambda: Sere(1, 1.01, profile=similarity()),
    "oea, k0 = k": lambda: OEA(TOP_K),
    "top-s, S = k": lambda: TopS(TOP_K),
    "random, B = E": lambda: RandomSet(NUM_EXPERTS),
    "alloc-moe-like, B = E": lambda: AllocMoELike(NUM_EXPERTS, profile=sensitivity()),
}


@pytest.mark.parametrize("family", [*FAMILIES, GROUPED, MIXER], ids=lambda family: family.name)
@pytest.mark.parametrize("make", IDENTITIES.values(), ids=IDENTITIES)
def test_what_changes_nothing_is_bit_identical(family, make):
    # Weights that the family's formula would not give again bit for bit.
    scores = random_scores(family)
    scores = replace(scores, natural_weights_TK=(scores.natural_weights_TK * 1.0001).bfloat16())
    plan = make().plan(scores, WHERE)
    assert torch.equal(plan.ids_TK, scores.natural_ids_TK)
    assert plan.weights_TK.dtype == torch.bfloat16 and torch.equal(plan.weights_TK, scores.natural_weights_TK)


@pytest.mark.parametrize("family", [*FAMILIES, GROUPED, MIXER], ids=lambda family: family.name)
@pytest.mark.parametrize("make", EVERY_POLICY.values(), ids=EVERY_POLICY)
def test_plans_name_valid_experts_with_weights_of_the_models_type(family, make):
    scores = random_scores(family, seed=2)
    scores = replace(scores, natural_weights_TK=scores.natural_weights_TK.bfloat16())
    plan = make().plan(scores, WHERE)
    assert plan.ids_TK.dtype == torch.int64 and plan.ids_TK.shape == (NUM_ROWS, TOP_K)
    assert ((plan.ids_TK >= 0) & (plan.ids_TK < NUM_EXPERTS)).all()
    assert plan.weights_TK.dtype == torch.bfloat16 and (plan.weights_TK >= 0).all()
    assert not torch.equal(plan.ids_TK, scores.natural_ids_TK) or (plan.weights_TK == 0).any()
    if plan.kept_E is not None:
        assert {expert for row in routed(plan) for expert in row} <= kept_by(plan)
