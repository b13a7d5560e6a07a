"""Profiling: what is measured of a tiny pair, and when a kept table is used. Never how long anything took."""

from __future__ import annotations

from dataclasses import replace

import pytest

from moespec import Engine, GenerationConfig, profile
from moespec.cost_table import CostTable, DraftPoint, Spread, StepPoint
from moespec.profile import cache_folder, costs_key, measure_costs, profile_costs
from tests.conftest import VOCAB, tiny_model
from tests.drafters import PlantingDrafter


def pair(seed=0):
    model = tiny_model("olmoe", seed)
    return Engine.from_model(model, drafter=PlantingDrafter(list(range(VOCAB)) * 3, VOCAB), backend="reference")


@pytest.fixture
def measured(monkeypatch, tmp_path):
    """The engines that were measured, in a home of its own: what is kept are tables of nothing."""
    engines = []

    def measure(engine, seconds):
        engines.append(engine)
        steps = [point(1, None), *(point(rows, budget) for rows in (2, 4) for budget in (3, None))]
        return CostTable.of(costs_key(engine), (12, 3), (0, 9), steps, [DraftPoint(8, 8, 1, ONE)])

    monkeypatch.setattr(profile, "measure_costs", measure)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return engines


ONE = Spread(1.0, 1.0, 1.0)


def point(num_rows, budget):
    return StepPoint(num_rows, budget, 1, ONE, ONE, ONE, 3.0, 3.0, 1.0, 0.0)


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


def test_a_kept_table_is_used_again(measured):
    first = profile_costs(pair())
    assert profile_costs(pair()) == first and len(measured) == 1
    (path,) = cache_folder().iterdir()
    assert CostTable.load(path) == first


def test_a_table_of_a_disturbed_machine_is_used_but_not_kept(measured, monkeypatch):
    engine, steady = pair(), profile.measure_costs

    def disturbed(engine, seconds):
        return replace(steady(engine, seconds), held_out_error=0.3)

    monkeypatch.setattr(profile, "measure_costs", disturbed)
    assert profile_costs(engine).held_out_error == 0.3
    monkeypatch.setattr(profile, "measure_costs", steady)
    assert profile_costs(engine).held_out_error < 0.1
    profile_costs(engine)
    assert len(measured) == 2


def test_another_model_drafter_or_machine_is_measured(measured, monkeypatch):
    for engine in (pair(), pair(seed=1), Engine.from_model(tiny_model("olmoe"), drafter="ngram")):
        profile_costs(engine)
    monkeypatch.setattr("torch.get_num_threads", lambda: 77)
    profile_costs(pair())
    assert len(measured) == len(list(cache_folder().iterdir())) == 4


@pytest.mark.parametrize("text", ["", "{}", "no json"])
def test_a_broken_file_is_measured_anew(text, measured):
    first = profile_costs(pair())
    (path,) = cache_folder().iterdir()
    path.write_text(text)
    assert profile_costs(pair()) == first == CostTable.load(path) and len(measured) == 2


def test_a_table_of_something_else_in_its_place_is_measured_anew(measured):
    first = profile_costs(pair())
    (path,) = cache_folder().iterdir()
    path.write_text(path.read_text().replace(first.about["model"], "another"))
    assert profile_costs(pair()) == first and len(measured) == 2


def test_where_nothing_can_be_kept_the_table_is_still_measured(measured, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    profile_costs(pair())
    profile_costs(pair())
    assert len(measured) == 2


def test_without_a_drafter_there_is_nothing_to_measure(measured):
    with pytest.raises(ValueError, match="drafter none drafts no trees"):
        profile_costs(Engine.from_model(tiny_model("olmoe")))
    with pytest.raises(ValueError, match="drafter none drafts no trees"):
        measure_costs(Engine.from_model(tiny_model("olmoe")))


def test_a_model_that_answers_nothing_is_refused(monkeypatch):
    engine = pair()
    monkeypatch.setattr("moespec.run.end_ids", lambda model, tokenizer: frozenset(range(VOCAB)))
    with pytest.raises(ValueError, match="ends every answer at once"):
        measure_costs(engine)
