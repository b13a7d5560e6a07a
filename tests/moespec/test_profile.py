"""Profiling: what is measured of a tiny pair. Never how long anything took."""

from __future__ import annotations

import pytest

from moespec import Engine, GenerationConfig, profile
from moespec.profile import measure_costs
from tests.conftest import VOCAB, tiny_model
from tests.drafters import PlantingDrafter


def pair(seed=0):
    model = tiny_model("olmoe", seed)
    return Engine.from_model(model, drafter=PlantingDrafter(list(range(VOCAB)) * 3, VOCAB), backend="reference")


def test_a_profile_says_what_real_steps_were(monkeypatch):
    monkeypatch.setattr(profile, "ROWS", (2, 5))
    engine, generation = pair(), GenerationConfig(max_new_tokens=8)
    *_, before = engine.generate([3, 1, 4], generation)
    costs = measure_costs(engine, seconds=0)
    assert (costs.num_experts, costs.top_k) == (12, 3)
    plain, *trees = costs.steps
    assert (plain.num_rows, plain.budget, plain.experts_read, plain.mass_kept) == (1, None, 3, 1)
    assert {tree.budget for tree in trees} == {3, 4, 6, 9, None}
    for tree in trees:
        assert tree.num_rows >= 2 and tree.num_accepted <= tree.num_rows - 1
        assert 3 <= tree.experts_read <= (tree.budget or 12)
        assert (tree.mass_kept == 1) == (tree.budget is None)
        assert tree.experts_read == tree.experts_natural or tree.budget is not None
        assert 0 < tree.verify_ms.p20 <= tree.verify_ms.median <= tree.verify_ms.p80
        assert tree.verify_ms.p20 < tree.total_ms.p20
    # Every kind has its turn in every round, and the first step of a turn does not count.
    assert sum(tree.num_steps for tree in trees) == profile.LEAST_ROUNDS * 2 * 5 * profile.NUM_TIMED
    assert {(draft.num_levels, draft.top_k) for draft in costs.drafts} == {(8, 8), *profile.DRAFTS}
    shortest, longest = costs.prefix
    assert 0 < shortest < longest < shortest + profile.NUM_TOKENS + profile.DEPTH + max(map(len, profile.PROMPTS))
    *_, after = engine.generate([3, 1, 4], generation)
    assert after.summary.token_ids == before.summary.token_ids


def test_without_a_drafter_there_is_nothing_to_measure():
    with pytest.raises(ValueError, match="drafter none drafts no trees"):
        measure_costs(Engine.from_model(tiny_model("olmoe")))


def test_a_model_that_answers_nothing_is_refused(monkeypatch):
    engine = pair()
    monkeypatch.setattr("moespec.run.end_ids", lambda model, tokenizer: frozenset(range(VOCAB)))
    with pytest.raises(ValueError, match="ends every answer at once"):
        measure_costs(engine)
