"""Budgets that differ from layer to layer: the best of all splits, by brute force."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace

import numpy as np
import pytest

from moespec import BudgetConfig
from moespec.budget import MoESpec
from moespec.policies.layer_budgets import AllocMoELike, allocate
from tests.moespec.policies import LAYERS, WHERE, each_family, expect_rows, kept_by, routed, sensitivity
from tests.moespec.test_budget import NUM_EXPERTS, TOP_K, random_scores


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
