"""What the policies' tests share: profiles, router families, every policy once, and what a plan comes to."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from moespec import ExpertPlan, RouterScores
from moespec.policies.accept_moe import AcceptMoELike
from moespec.policies.layer_budgets import AllocMoELike
from moespec.policies.method import RoutedModel
from moespec.policies.oea import OEA
from moespec.policies.oracle import Oracle
from moespec.policies.profiles import MEASURES, Profile
from moespec.policies.random_set import RandomSet
from moespec.policies.sere import Sere
from moespec.policies.top_s import TopS
from moespec.routing import FAMILIES, Groups, RouterFamily, Weighing
from tests.moespec.test_budget import NUM_EXPERTS, TOP_K, brute_force_weights, context

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


# Biased sigmoid scores, two of four groups, scaled: DeepSeek-V3's kind; and one whose chosen take turns in a softmax.
GROUPED = RouterFamily(
    "grouped", "sigmoid", Weighing.RENORMALISED, torch.linspace(0.2, -0.2, 16), groups=Groups(4, 2, 2, 0.0), scale=2.5
)
MIXER = RouterFamily("mixer", "softmax", Weighing.SPARSE_MIXER, threshold=0.02)

EVERY_POLICY = {
    "sere": lambda: Sere(2, 0.6, profile=similarity()),
    "oea": lambda: OEA(1),
    "top-s": lambda: TopS(2),
    "random": lambda: RandomSet(5),
    "oracle": lambda: Oracle(5).informed([0, 1]),
    "accept-moe-like": lambda: AcceptMoELike(0.5, "profile", profile=acceptance()),
    "alloc-moe-like": lambda: AllocMoELike(5, profile=sensitivity()),
}
