"""Every expert policy against its formula in plain Python and fp64, row by row, for every router family."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from moespec import ExpertPlan
from moespec.policies.accept_moe import AcceptMoELike
from moespec.policies.oea import OEA
from moespec.policies.oracle import Oracle
from moespec.policies.profiles import MEASURES
from moespec.policies.random_set import RandomSet
from moespec.policies.sere import Sere
from moespec.policies.top_s import TopS
from moespec.routing import FAMILIES
from tests.moespec.policies import (
    EDGES,
    LAYERS,
    WHERE,
    acceptance,
    by_weight,
    each_family,
    expect_rows,
    inside,
    kept_by,
    routed,
    similarity,
)
from tests.moespec.test_budget import NUM_EXPERTS, NUM_ROWS, TOP_K, brute_force_weights, random_scores


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
