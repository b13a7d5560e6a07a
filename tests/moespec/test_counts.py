"""What a step's routing comes to equals the definitions, written out with sets and fp64 loops."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from moespec import counts
from moespec.counts import RoutingCounts, count_routing
from moespec.step_router import StepRouting

L, T, E, K, B = 3, 5, 16, 4, 6


def routing(seed: int, policy: str) -> StepRouting:
    """Random routers, and what a policy of this kind makes of them with a random shortlist."""
    torch.manual_seed(seed)
    logits_LTE = torch.randn(L, T, E)
    weights_LTK, ids_LTK = logits_LTE.softmax(-1).topk(K)
    kept_LE = torch.zeros(L, E, dtype=torch.bool)
    for layer in range(L):
        kept_LE[layer, torch.randperm(E)[:B]] = True
    run_ids, run_weights = ids_LTK, weights_LTK
    if policy == "substitution":
        run_weights, run_ids = logits_LTE.softmax(-1).masked_fill(~kept_LE[:, None], -1).topk(K)
    elif policy == "truncation":
        run_weights = weights_LTK * kept_LE[:, None].expand(L, T, E).gather(2, ids_LTK)
    elif policy == "rounding":  # an expert policy that keeps all, up to rounding
        run_weights, kept_LE = weights_LTK * (1 + 1e-7), torch.ones(L, E, dtype=torch.bool)
    return StepRouting(logits_LTE, ids_LTK, weights_LTK, run_ids, run_weights, kept_LE)


def check(found: RoutingCounts, given: StepRouting, is_natural: bool) -> None:
    changed = False
    for layer in range(L):
        score, missing, survives, whole = np.zeros(E), [], 0.0, 0.0
        natural, active = set(), set()
        for row in range(T):
            logits = given.logits_LTE[layer, row].double().numpy()
            score += np.exp(logits) / np.exp(logits).sum()
            chosen = dict(zip(*_pairs(given.natural_ids_LTK, given.natural_weights_LTK, layer, row), strict=True))
            ran = dict(zip(*_pairs(given.ids_LTK, given.weights_LTK, layer, row), strict=True))
            ran = {expert: weight for expert, weight in ran.items() if weight}
            natural |= set(chosen)
            active |= set(ran)
            missing.append(len(set(chosen) - set(ran)))
            whole += sum(chosen.values())
            survives += sum(weight for expert, weight in chosen.items() if expert in ran)
            changed |= any(abs(chosen.get(e, 0) - ran.get(e, 0)) > 1e-6 for e in range(E))
        kept = natural if is_natural else set(given.kept_LE[layer].nonzero().flatten().tolist())
        mass = 1.0 if is_natural else score[sorted(kept)].sum() / score.sum()
        assert found.score_LE[layer].numpy() == pytest.approx(score, abs=1e-5)
        for name, expected in (("natural_LE", natural), ("kept_LE", kept), ("active_LE", active)):
            assert set(getattr(found, name)[layer].nonzero().flatten().tolist()) == expected, name
        assert found.missing_LT[layer].tolist() == missing
        assert float(found.mass_kept_L[layer]) == pytest.approx(mass, abs=1e-5)
        assert float(found.natural_weight_kept_L[layer]) == pytest.approx(survives / whole, abs=1e-5)
    assert found.changed == changed


def _pairs(ids: torch.Tensor, weights: torch.Tensor, layer: int, row: int) -> tuple[list, list]:
    return ids[layer, row].tolist(), weights[layer, row].double().tolist()


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("policy", ["none", "substitution", "truncation", "rounding"])
def test_counts_equal_the_definitions(monkeypatch, policy, compiled):
    if not compiled:
        monkeypatch.setattr(counts, "kernels_for", lambda *tensors: None)
    for seed in range(5):
        given = routing(seed, policy)
        check(count_routing(given, is_natural=policy == "none"), given, policy == "none")


def test_ids_of_no_expert_are_refused():
    given = routing(0, "truncation")
    given.ids_LTK[1, 2, 3] = E
    with pytest.raises(ValueError, match="outside 0 to 15"):
        count_routing(given, is_natural=False)
