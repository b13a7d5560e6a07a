"""Every expert policy against its formula in plain Python and fp64, row by row, for every router family."""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from moespec import BudgetConfig, ExpertPlan, RouterScores
from moespec.budget import MoESpec
from moespec.policies.accept_moe import AcceptMoELike
from moespec.policies.layer_budgets import AllocMoELike, allocate
from moespec.policies.method import RoutedModel
from moespec.policies.oea import OEA
from moespec.policies.oracle import Oracle
from moespec.policies.profiles import MEASURES, Profile
from moespec.policies.random_set import RandomSet
from moespec.policies.sere import Sere
from moespec.policies.top_s import TopS
from moespec.routing import FAMILIES, Groups, RouterFamily, Weighing
from tests.moespec.test_budget import NUM_EXPERTS, NUM_ROWS, TOP_K, brute_force_weights, context, random_scores

LAYERS = (1, 2, 4)  # of a model whose other layers are dense
WHERE = replace(context(), layer=LAYERS[1], position=7)
MODEL = RoutedModel(LAYERS, NUM_EXPERTS, TOP_K)
EDGES = [0.1, 0.2, 0.4]

each_family = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)


def profile(kind: str, **tensors: torch.Tensor) -> Profile:
    return Profile(kind, MODEL, tensors)


def similarity() -> Profile:
    halves = torch.rand(
        len(MEASURES), len(LAYERS), NUM_EXPERTS, NUM_EXPERTS, generator=torch.Generator().manual_seed(3)
    )
    whole = (halves + halves.transpose(2, 3)) / 2
    for one in range(0, NUM_EXPERTS, 2):  # every expert is the same as itself, and as another
        whole[..., [one, one, one + 1, one + 1], [one, one + 1, one, one + 1]] = 1
    return profile("similarity", **dict(zip(MEASURES, whole, strict=True)))


def acceptance() -> Profile:
    rate_NP = torch.rand(4, len(EDGES) + 1, generator=torch.Generator().manual_seed(4))  # fewer depths than the tree
    rate_NP[0] = 1
    return profile("acceptance", edges=torch.tensor(EDGES), rate=rate_NP)


def sensitivity() -> Profile:
    kl_LG = torch.tensor([[0.5, 0.3, 0.1, 0.01], [0.9, 0.1, 0.05, 0.0], [0.2, 0.19, 0.12, 0.1]])
    return profile("sensitivity", budgets=torch.tensor([4.0, 5.0, 8.0, 13.0]), kl=kl_LG)


def by_weight(scores: RouterScores, row: int) -> list[int]:
    """A row's natural experts, best first."""
    pairs = zip(scores.natural_weights_TK[row].tolist(), scores.natural_ids_TK[row].tolist(), strict=True)
    return [expert for _, expert in sorted(pairs, key=lambda pair: -pair[0])]


def routed(plan: ExpertPlan) -> list[dict[int, float]]:
    """Per row, what each expert that is touched counts for in all its slots."""
    rows = []
    for ids, weights in zip(plan.ids_TK.tolist(), plan.weights_TK.tolist(), strict=True):
        row: dict[int, float] = {}
        for expert, weight in zip(ids, weights, strict=True):
            if weight != 0:
                row[expert] = row.get(expert, 0.0) + weight
        rows.append(row)
    return rows


def expect_rows(plan: ExpertPlan, expected: list[dict[int, float]]) -> None:
    for actual, wanted in zip(routed(plan), expected, strict=True):
        assert actual == pytest.approx(wanted, abs=1e-6)


def inside(scores: RouterScores, kept: set[int]) -> list[dict[int, float]]:
    """Substitution: every row's best k of `kept`, or all of it where it has fewer."""
    rows = []
    for logits in scores.logits_TE.tolist():
        chosen = sorted(kept, key=lambda expert: (-logits[expert], expert))[:TOP_K]
        rows.append(brute_force_weights(scores.family.name, logits, chosen, set(chosen)))
    return rows


def kept_by(plan: ExpertPlan) -> set[int]:
    return set(plan.kept_E.nonzero()[:, 0].tolist())


@each_family
@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("rho", [0.0, 0.55, 0.75, 1.5])
@pytest.mark.parametrize("s", [1, 2, 3])
def test_sere_is_the_released_rule(family, s, rho, measure):
    scores, known = random_scores(family), similarity()
    sim = known.tensors[measure][LAYERS.index(WHERE.layer)].tolist()
    primary = {expert for row in range(NUM_ROWS) for expert in by_weight(scores, row)[:s]}
    expected = []
    for ids, weights in zip(scores.natural_ids_TK.tolist(), scores.natural_weights_TK.tolist(), strict=True):
        row: dict[int, float] = {}
        for expert, weight in zip(ids, weights, strict=True):
            nearest = max(sorted(primary), key=lambda other, sim=sim[expert]: sim[other])
            stays = expert in primary or (rho > 0 and sim[expert][nearest] < rho)
            goes_to = expert if stays else nearest
            row[goes_to] = row.get(goes_to, 0.0) + weight
        expected.append(row)
    plan = Sere(s, rho, measure, profile=known).plan(scores, WHERE)
    expect_rows(plan, expected)
    assert torch.equal(plan.weights_TK, scores.natural_weights_TK), "weights are never touched"
    used = {expert for row in routed(plan) for expert in row}
    if rho == 0:
        assert used == primary
    if rho > 1:
        assert torch.equal(plan.ids_TK, scores.natural_ids_TK)


def test_sere_sends_two_slots_of_a_row_to_one_expert():
    scores = random_scores(FAMILIES[0])
    plan = Sere(1, profile=similarity()).plan(scores, WHERE)
    assert any(len(set(ids)) < TOP_K for ids in plan.ids_TK.tolist())


@each_family
@pytest.mark.parametrize("k0", [1, 2, 3])
def test_oea_keeps_each_rows_best_and_fills_up_from_the_union(family, k0):
    scores = random_scores(family)
    union = {expert for row in range(NUM_ROWS) for expert in by_weight(scores, row)[:k0]}
    expected = []
    for row, logits in enumerate(scores.logits_TE.tolist()):
        chosen = by_weight(scores, row)[:k0]
        for expert in sorted(union, key=lambda expert, logits=logits: -logits[expert]):
            if len(chosen) < TOP_K and expert not in chosen:
                chosen.append(expert)
        expected.append(brute_force_weights(family.name, logits, chosen, set(chosen)))
    plan = OEA(k0).plan(scores, WHERE)
    expect_rows(plan, expected)
    assert kept_by(plan) == union


@each_family
def test_oea_leaves_slots_empty_where_the_union_is_smaller_than_k(family):
    scores = random_scores(family, torch.arange(NUM_EXPERTS).float().expand(NUM_ROWS, -1))
    plan = OEA(2).plan(scores, WHERE)
    assert [set(row) for row in routed(plan)] == [{NUM_EXPERTS - 1, NUM_EXPERTS - 2}] * NUM_ROWS
    expect_rows(plan, inside(scores, {NUM_EXPERTS - 1, NUM_EXPERTS - 2}))


@each_family
@pytest.mark.parametrize("s", [1, 3])
def test_top_s_drops_each_rows_weakest_slots(family, s):
    scores = random_scores(family)
    chosen = [by_weight(scores, row)[:s] for row in range(NUM_ROWS)]
    rows = zip(scores.logits_TE.tolist(), chosen, strict=True)
    expected = [brute_force_weights(family.name, logits, best, set(best)) for logits, best in rows]
    expect_rows(TopS(s).plan(scores, WHERE), expected)


@each_family
def test_slots_are_ranked_by_weight_whatever_their_order(family):
    scores = random_scores(family)
    order = torch.tensor([2, 0, 3, 1])
    shuffled = replace(
        scores,
        natural_ids_TK=scores.natural_ids_TK[:, order].contiguous(),
        natural_weights_TK=scores.natural_weights_TK[:, order].contiguous(),
    )
    for policy in (Sere(2, profile=similarity()), OEA(2), TopS(2)):
        expect_rows(policy.plan(shuffled, WHERE), routed(policy.plan(scores, WHERE)))


@each_family
@pytest.mark.parametrize("scale", [0.2, 0.6, 1.0, 3.0])
@pytest.mark.parametrize("commitment", ["path", "profile"])
def test_accept_moe_like_is_the_stated_formula(family, commitment, scale):
    scores, known = random_scores(family), acceptance()
    demand = [0.0] * NUM_EXPERTS
    for row in range(NUM_ROWS):
        depth, path_p = int(WHERE.depths_T[row]), math.exp(float(WHERE.draft_logp_T[row]))
        place = sum(path_p > edge for edge in EDGES)
        rate = known.tensors["rate"][min(depth, 3), place].item()
        committed = path_p if commitment == "path" else rate
        for expert, weight in zip(
            scores.natural_ids_TK[row].tolist(), scores.natural_weights_TK[row].tolist(), strict=True
        ):
            demand[expert] += committed * weight
    shares = [value / sum(demand) for value in demand]
    rank = math.exp(-sum(share * math.log(share) for share in shares if share > 0))
    size = min(max(math.ceil(scale * rank), TOP_K), NUM_EXPERTS)
    root = scores.natural_ids_TK[0].tolist()
    others = sorted(set(range(NUM_EXPERTS)) - set(root), key=lambda expert: (-demand[expert], expert))
    kept = {*root, *others[: size - TOP_K]}
    plan = AcceptMoELike(scale, commitment, profile=known).plan(scores, WHERE)
    assert kept_by(plan) == kept
    expect_rows(plan, inside(scores, kept))
    expect_rows(replace_root(plan), [dict(zip(root, scores.natural_weights_TK[0].tolist(), strict=True))])


def replace_root(plan: ExpertPlan) -> ExpertPlan:
    return ExpertPlan(plan.ids_TK[:1], plan.weights_TK[:1])


@each_family
def test_a_random_set_is_drawn_by_seed_layer_and_position(family):
    scores = random_scores(family)

    def drawn(seed: int = 0, layer: int = 0, position: int = 0) -> set[int]:
        plan = RandomSet(6, seed).plan(scores, replace(WHERE, layer=layer, position=position))
        kept = kept_by(plan)
        assert len(kept) == 6
        expect_rows(plan, inside(scores, kept))
        return kept

    assert drawn() == drawn()
    others = [drawn(seed=1), drawn(layer=1), drawn(position=1)]
    assert len({frozenset(kept) for kept in [drawn(), *others]}) == 4
    hits = [0] * NUM_EXPERTS
    for position in range(400):
        for expert in drawn(position=position):
            hits[expert] += 1
    assert all(100 < count < 200 for count in hits), "150 expected of each: all are drawn alike"


@each_family
@pytest.mark.parametrize("b", [None, 4, 6])
def test_the_oracle_keeps_the_experts_of_the_accepted_path(family, b):
    scores, path = random_scores(family), [0, 2, 5]
    mass = [0.0] * NUM_EXPERTS
    for row in path:
        for expert, weight in zip(
            scores.natural_ids_TK[row].tolist(), scores.natural_weights_TK[row].tolist(), strict=True
        ):
            mass[expert] += weight
    order = sorted((e for e in range(NUM_EXPERTS) if mass[e] > 0), key=lambda expert: -mass[expert])
    plan = Oracle(b).informed(path).plan(scores, WHERE)
    assert kept_by(plan) == set(order[:b])
    expect_rows(plan, inside(scores, set(order[:b])))
    if b is None:
        for row in path:
            assert set(routed(plan)[row]) == set(scores.natural_ids_TK[row].tolist())


def test_allocation_is_the_best_of_all():
    rng = random.Random(5)
    for _ in range(30):
        num_layers, num_choices, num_extra = rng.randint(1, 4), rng.randint(1, 5), rng.randint(0, 14)
        cost = [[rng.choice([0.0, rng.random()]) for _ in range(num_choices)] for _ in range(num_layers)]
        found = allocate(np.array(cost), num_extra)
        allowed = [x for x in itertools.product(range(num_choices), repeat=num_layers) if sum(x) <= num_extra]
        least = min(sum(cost[layer][x] for layer, x in enumerate(choice)) for choice in allowed)
        assert tuple(found) in allowed
        assert sum(cost[layer][x] for layer, x in enumerate(found)) == pytest.approx(least)


@pytest.mark.parametrize("b", [4, 6, 9, NUM_EXPERTS])
def test_alloc_moe_like_spends_one_budget_over_all_layers(b):
    known = sensitivity()
    budgets_G, sizes = [*known.tensors["budgets"].tolist(), NUM_EXPERTS], range(TOP_K, NUM_EXPERTS + 1)

    def kl(layer: int, size: int) -> float:
        """Between two measured budgets, on the straight line."""
        kl_G = [*known.tensors["kl"][layer].tolist(), 0.0]
        for place, (low, high) in enumerate(itertools.pairwise(budgets_G)):
            if low <= size <= high:
                return kl_G[place] + (size - low) / (high - low) * (kl_G[place + 1] - kl_G[place])
        raise AssertionError

    allowed = [split for split in itertools.product(sizes, repeat=3) if sum(split) <= 3 * b]
    least = min(sum(kl(layer, size) for layer, size in enumerate(split)) for split in allowed)
    by_layer = AllocMoELike(b, profile=known).by_layer
    split = [NUM_EXPERTS if method is None else method.config.budget for method in by_layer.values()]
    assert sum(split) <= 3 * b and tuple(by_layer) == LAYERS
    assert sum(kl(layer, size) for layer, size in enumerate(split)) == pytest.approx(least)


@each_family
def test_alloc_moe_like_is_moe_spec_at_the_layers_budget(family):
    scores = random_scores(family)
    method = AllocMoELike(6, "truncation", "natural", "path", root=True, profile=sensitivity())
    sizes = set()
    for layer in LAYERS:
        plan = method.plan(scores, replace(WHERE, layer=layer))
        size = len(kept_by(plan))
        config = BudgetConfig(size, policy="truncation", score="natural", row_weight="path", protect_root=True)
        expect_rows(plan, routed(MoESpec(config).plan(scores, WHERE)))
        sizes.add(size)
    assert len(sizes) > 1


# Biased sigmoid scores, two of four groups, scaled: DeepSeek-V3's kind; and one whose chosen take turns in a softmax.
GROUPED = RouterFamily(
    "grouped", "sigmoid", Weighing.RENORMALISED, torch.linspace(0.2, -0.2, 16), groups=Groups(4, 2, 2, 0.0), scale=2.5
)
MIXER = RouterFamily("mixer", "softmax", Weighing.SPARSE_MIXER, threshold=0.02)


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


EVERY_POLICY = {
    "sere": lambda: Sere(2, 0.6, profile=similarity()),
    "oea": lambda: OEA(1),
    "top-s": lambda: TopS(2),
    "random": lambda: RandomSet(5),
    "oracle": lambda: Oracle(5).informed([0, 1]),
    "accept-moe-like": lambda: AcceptMoELike(0.5, "profile", profile=acceptance()),
    "alloc-moe-like": lambda: AllocMoELike(5, profile=sensitivity()),
}


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
