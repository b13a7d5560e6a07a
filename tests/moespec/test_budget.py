"""The paper's formulas against brute force in fp64, row by row, for every router family: torch's and the compiled."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from moespec import BudgetConfig, DraftTree, ExpertPlan, RouterScores, TreeContext
from moespec.budget import MoESpec, cover, select_experts
from moespec.native import load_kernels
from moespec.recorder import StepRecorder
from moespec.routing import FAMILIES

NUM_ROWS, NUM_EXPERTS, TOP_K = 9, 16, 4


def random_scores(family, logits_TE: torch.Tensor | None = None, seed: int = 0) -> RouterScores:
    if logits_TE is None:
        logits_TE = torch.randn(NUM_ROWS, NUM_EXPERTS, generator=torch.Generator().manual_seed(seed)) * 2
    probs_TE = logits_TE.softmax(-1)
    ids_TK = family.selection(logits_TE, probs_TE).topk(TOP_K).indices
    return RouterScores(logits_TE, probs_TE, ids_TK, family.weights(logits_TE, probs_TE, ids_TK, None), family)


ONE = [0, 1, 1, 2, 2, 2, 3, 3, 4]  # depths of the rows
THREE = [0, 1, 1, 2, 0, 0, 1, 2, 2]  # of three requests' trees


def context(depths: list[int] = ONE) -> TreeContext:
    depths_T = torch.tensor(depths)
    requests_T = None if depths == ONE else (depths_T == 0).cumsum(0) - 1
    return TreeContext(depths_T, -0.7 * depths_T.float() - 0.01 * torch.arange(NUM_ROWS), 0, requests_T)


def torch_plan(config: BudgetConfig, scores: RouterScores, where: TreeContext) -> ExpertPlan:
    return MoESpec(config).plan(scores, where)


def trees_of(where: TreeContext) -> list[DraftTree]:
    """One for every root."""
    starts = (where.depths_T == 0).nonzero()[:, 0].tolist()
    sizes = [end - start for start, end in zip(starts, [*starts[1:], NUM_ROWS], strict=True)]
    parts = zip(where.depths_T.split(sizes), where.draft_logp_T.split(sizes), sizes, strict=True)
    rows = [(torch.arange(size), depths_T, logp_T) for depths_T, logp_T, size in parts]
    return [DraftTree(T, T - 1, depths_T, logp_T, torch.eye(len(T), dtype=torch.bool)) for T, depths_T, logp_T in rows]


def compiled_plan(config: BudgetConfig, scores: RouterScores, where: TreeContext) -> ExpertPlan:
    """As a step hands a budget to the compiled decoder, for all requests together."""
    trees = trees_of(where)
    budget = StepRecorder([], trees, MoESpec(config), is_shared=True).compiled_budget()
    bounds = np.cumsum([0, *(tree.num_rows for tree in trees)])
    routed = scores.logits_TE, scores.probs_TE, scores.natural_ids_TK, scores.natural_weights_TK, budget.row_weights_T
    settings = budget.natural, budget.protect_root, budget.size, budget.coverage, budget.truncates
    arrays, kind, kernels = [part.numpy() for part in routed], FAMILIES.index(scores.family), load_kernels().routing
    found = kernels.plan_requests(*arrays, bounds, budget.is_shared, settings, kind)
    ids_TK, weights_TK, kept_RE = (torch.from_numpy(part) for part in found)
    assert len(kept_RE) == len(trees) and (kept_RE == kept_RE[0]).all()
    *_, score = kernels.plan(*arrays, bounds[:-1], *settings, kind)
    return ExpertPlan(ids_TK=ids_TK, weights_TK=weights_TK, kept_E=kept_RE[0], score_E=torch.from_numpy(score))


each_plan = pytest.mark.parametrize("plan_of", [torch_plan, compiled_plan], ids=["torch", "compiled"])


def brute_force_score(scores: RouterScores, where: TreeContext, config: BudgetConfig) -> list[float]:
    """fp64 [E], one row and expert at a time."""
    total = [0.0] * NUM_EXPERTS
    for row in range(NUM_ROWS):
        depth, logp = float(where.depths_T[row]), where.draft_logp_T[row].double()
        weight = {"uniform": 1.0, "depth": config.depth_decay**depth, "path": logp.exp().item()}[config.row_weight]
        if config.score == "softmax":
            pairs = enumerate(scores.logits_TE[row].double().softmax(-1).tolist())
        else:
            pairs = zip(scores.natural_ids_TK[row].tolist(), scores.natural_weights_TK[row].tolist(), strict=True)
        for expert, value in pairs:
            total[expert] += weight * value
    return total


def brute_force_shortlist(scores: RouterScores, where: TreeContext, config: BudgetConfig) -> set[int]:
    score = brute_force_score(scores, where, config)
    roots = (where.depths_T == 0).nonzero()[:, 0] if config.protect_root else []
    root = {expert for row in roots for expert in scores.natural_ids_TK[row].tolist()}
    order = sorted(range(NUM_EXPERTS), key=lambda expert: (-score[expert], expert))
    if config.budget is not None:
        order.sort(key=lambda expert: expert not in root)
        return set(order[: config.budget])
    size = TOP_K
    while sum(score[expert] for expert in order[:size]) < config.coverage * sum(score):
        size += 1
    return root | set(order[:size])


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


SETTINGS = [
    {"budget": TOP_K},  # the smallest: substitution leaves every row the same experts
    {"budget": 6},
    {"budget": 11, "score": "natural"},
    {"budget": NUM_EXPERTS},  # every expert is kept, so nothing may change
    {"budget": TOP_K, "protect_root": True},  # the root's experts fill the whole budget, those of several more than it
    {"budget": 7, "protect_root": True, "row_weight": "path"},
    {"budget": 6, "row_weight": "depth", "depth_decay": 0.3, "score": "natural"},
    {"coverage": 0.05},  # held by fewer than top-k experts: top-k are kept all the same
    {"coverage": 0.6, "row_weight": "path"},
    {"coverage": 0.4, "protect_root": True},  # the root's experts come on top
    {"coverage": 0.9, "score": "natural"},
]


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
@pytest.mark.parametrize("policy", ["substitution", "truncation"])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("depths", [ONE, THREE], ids=["one request", "three requests"])
@each_plan
def test_plan_equals_brute_force(family, policy, settings, depths, plan_of):
    scores, config = random_scores(family), BudgetConfig(policy=policy, **settings)
    plan = plan_of(config, scores, context(depths))
    shortlist = brute_force_shortlist(scores, context(depths), config)
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
@each_plan
def test_a_row_truncated_to_nothing_gets_zeros(family, plan_of):
    logits_TE = torch.zeros(NUM_ROWS, NUM_EXPERTS)
    logits_TE[:, :TOP_K] = 5.0  # all rows but the last want the first experts
    logits_TE[-1] = logits_TE[-1].flip(0)
    plan = plan_of(BudgetConfig(budget=TOP_K, policy="truncation"), random_scores(family, logits_TE), context())
    assert torch.equal(plan.weights_TK[-1], torch.zeros(TOP_K))
    assert (plan.weights_TK[:-1] > 0).all()


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_compiled_routing_is_each_rows_best_experts(family):
    scores = random_scores(family)
    found = load_kernels().routing.route(scores.logits_TE.numpy(), TOP_K, FAMILIES.index(family))
    probs_TE, ids_TK, weights_TK = (torch.from_numpy(part) for part in found)
    torch.testing.assert_close(probs_TE.double(), scores.logits_TE.double().softmax(-1), atol=1e-6, rtol=1e-5)
    for row in range(NUM_ROWS):
        logits = scores.logits_TE[row].tolist()
        chosen = sorted(range(NUM_EXPERTS), key=lambda expert: -logits[expert])[:TOP_K]
        assert ids_TK[row].tolist() == chosen
        expected = brute_force_weights(family.name, logits, chosen, set(chosen))
        assert weights_TK[row].tolist() == pytest.approx([expected[expert] for expert in chosen], abs=1e-6)


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


@pytest.mark.parametrize("row_weight", ["uniform", "depth", "path"])
@pytest.mark.parametrize("score", ["softmax", "natural"])
@each_plan
def test_scores_weigh_rows_as_said(row_weight, score, plan_of):
    config = BudgetConfig(budget=8, row_weight=row_weight, score=score)
    plan = plan_of(config, random_scores(FAMILIES[0]), context())
    expected = brute_force_score(random_scores(FAMILIES[0]), context(), config)
    assert plan.score_E.tolist() == pytest.approx(expected, abs=1e-5)


@each_plan
def test_a_protected_root_keeps_its_experts_within_the_budget(plan_of):
    scores = random_scores(FAMILIES[0], seed=5)
    plan = plan_of(BudgetConfig(budget=TOP_K, protect_root=True), scores, context())
    assert set(plan.kept_E.nonzero()[:, 0].tolist()) == set(scores.natural_ids_TK[0].tolist())
    assert sorted(plan.ids_TK[0].tolist()) == sorted(scores.natural_ids_TK[0].tolist())
