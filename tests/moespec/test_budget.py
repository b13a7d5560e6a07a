"""The paper's formulas against brute force in fp64, row by row, for every router family."""

from __future__ import annotations

import pytest
import torch

from moespec import BudgetConfig, RouterScores, TreeContext
from moespec.budget import MoESpec, cover, row_weights, score_experts, select_experts
from moespec.routing import FAMILIES

NUM_ROWS, NUM_EXPERTS, TOP_K = 9, 16, 4


def random_scores(family, seed: int = 0) -> RouterScores:
    logits_TE = torch.randn(NUM_ROWS, NUM_EXPERTS, generator=torch.Generator().manual_seed(seed)) * 2
    probs_TE = logits_TE.softmax(-1)
    ids_TK = family.selection(logits_TE, probs_TE).topk(TOP_K).indices
    return RouterScores(logits_TE, probs_TE, ids_TK, family.weights(logits_TE, probs_TE, ids_TK, None), family)


def context() -> TreeContext:
    depths_T = torch.tensor([0, 1, 1, 2, 2, 2, 3, 3, 4])
    return TreeContext(depths_T, -0.7 * depths_T.float() - 0.01 * torch.arange(NUM_ROWS), layer=0)


def brute_force_weights(name: str, logits: list[float], chosen: list[int], survivors: set[int]) -> dict[int, float]:
    """One row, fp64, from the family's definition in words."""
    values = torch.tensor(logits, dtype=torch.float64)
    alive = [expert for expert in chosen if expert in survivors]
    if name == "top-k, softmax":
        total = sum(values[expert].exp() for expert in alive)
        return {expert: float(values[expert].exp() / total) for expert in alive}
    probabilities = values.exp() / values.exp().sum()
    total = sum(probabilities[expert] for expert in alive) if name.endswith("renormalised") else 1.0
    return {expert: float(probabilities[expert] / total) for expert in alive}


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
@pytest.mark.parametrize("policy", ["substitution", "truncation"])
@pytest.mark.parametrize("budget", [4, 6, 11])
def test_plan_equals_brute_force(family, policy, budget):
    scores = random_scores(family)
    plan = MoESpec(BudgetConfig(budget=budget, policy=policy)).plan(scores, context())
    mass = scores.logits_TE.double().softmax(-1).sum(0).tolist()
    shortlist = set(sorted(range(NUM_EXPERTS), key=lambda expert: (-mass[expert], expert))[:budget])
    assert set(plan.kept_E.nonzero()[:, 0].tolist()) == shortlist
    for row in range(NUM_ROWS):
        logits = scores.logits_TE[row].tolist()
        candidates = shortlist if policy == "substitution" else range(NUM_EXPERTS)
        chosen = sorted(candidates, key=lambda expert: -logits[expert])[:TOP_K]
        expected = brute_force_weights(family.name, logits, chosen, shortlist)
        pairs = zip(plan.ids_TK[row].tolist(), plan.weights_TK[row].tolist(), strict=True)
        actual = {expert: weight for expert, weight in pairs if weight != 0}
        assert actual == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_a_row_with_every_expert_dropped_is_zero_not_nan(family):
    scores = random_scores(family)
    kept_E = torch.zeros(NUM_EXPERTS, dtype=torch.bool)
    weights_TK = family.weights(scores.logits_TE, scores.probs_TE, scores.natural_ids_TK, kept_E[scores.natural_ids_TK])
    assert torch.equal(weights_TK, torch.zeros(NUM_ROWS, TOP_K))


@pytest.mark.parametrize("coverage", [0.3, 0.6, 0.9, 1.0])
def test_cover_is_the_smallest_set_with_the_mass(coverage):
    score_E = torch.rand(NUM_EXPERTS, generator=torch.Generator().manual_seed(3)).double()
    kept_E = cover(score_E, coverage, min_experts=1)
    share = float(score_E[kept_E].sum() / score_E.sum())
    assert share >= coverage - 1e-9
    weakest = float(score_E[kept_E].min() / score_E.sum())
    assert share - weakest < coverage or coverage == 1.0


def test_cover_never_keeps_fewer_than_asked():
    score_E = torch.tensor([100.0] + [1.0] * 15)
    assert cover(score_E, 0.1, min_experts=4).sum() == 4


def test_ties_go_to_the_lower_id():
    assert select_experts(torch.tensor([1.0, 2.0, 1.0, 1.0]), 2).tolist() == [True, True, False, False]


@pytest.mark.parametrize("kind", ["uniform", "depth", "path"])
@pytest.mark.parametrize("score", ["softmax", "natural"])
def test_scores_weigh_rows_as_said(kind, score):
    scores, where = random_scores(FAMILIES[0]), context()
    expected = [0.0] * NUM_EXPERTS
    for row in range(NUM_ROWS):
        depth, logp = float(where.depths_T[row]), float(where.draft_logp_T[row])
        weight = {"uniform": 1.0, "depth": 0.6**depth, "path": torch.tensor(logp).double().exp().item()}[kind]
        if score == "softmax":
            pairs = enumerate(scores.logits_TE[row].double().softmax(-1).tolist())
        else:
            pairs = zip(scores.natural_ids_TK[row].tolist(), scores.natural_weights_TK[row].tolist(), strict=True)
        for expert, value in pairs:
            expected[expert] += weight * value
    actual_E = score_experts(scores, score, row_weights(kind, 0.6, where))
    assert actual_E.tolist() == pytest.approx(expected, abs=1e-5)


def test_a_protected_root_keeps_its_experts_within_the_budget():
    scores = random_scores(FAMILIES[0], seed=5)
    plan = MoESpec(BudgetConfig(budget=TOP_K, protect_root=True)).plan(scores, context())
    assert set(plan.kept_E.nonzero()[:, 0].tolist()) == set(scores.natural_ids_TK[0].tolist())
    assert sorted(plan.ids_TK[0].tolist()) == sorted(scores.natural_ids_TK[0].tolist())
