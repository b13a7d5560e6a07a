"""The kept table of costs: when it is used, and when it is measured anew. Never how long anything took."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest

from moespec import Engine, kept_costs
from moespec.cost_table import CostTable, DraftPoint, Spread, StepPoint
from moespec.kept_costs import PROBED_ROWS, cache_folder, profile_costs, still_holds
from moespec.profile import PLAIN, costs_key
from tests.conftest import tiny_model
from tests.moespec.test_governors import table
from tests.moespec.test_profile import pair


@pytest.fixture
def measured(monkeypatch, tmp_path):
    """The engines that were measured, in a home of its own: what is kept are tables of nothing."""
    engines = []

    def measure(engine, seconds):
        engines.append(engine)
        steps = [point(1, None), *(point(rows, budget) for rows in (2, 4) for budget in (3, None))]
        return CostTable.of(costs_key(engine), (12, 3), (0, 9), steps, [DraftPoint(8, 8, 1, ONE)])

    monkeypatch.setattr(kept_costs, "measure_costs", measure)
    monkeypatch.setattr(kept_costs, "still_holds", lambda engine, table: True)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return engines


ONE = Spread(1.0, 1.0, 1.0)


def point(num_rows, budget):
    return StepPoint(num_rows, budget, 1, ONE, ONE, ONE, 3.0, 3.0, 1.0, 0.0)


def test_a_kept_table_is_used_again(measured):
    first = profile_costs(pair())
    assert profile_costs(pair()) == first and len(measured) == 1
    (path,) = cache_folder().iterdir()
    assert CostTable.load(path) == first


def test_a_table_of_a_disturbed_machine_is_used_but_not_kept(measured, monkeypatch):
    steady = kept_costs.measure_costs

    def disturbed(engine, seconds):
        return replace(steady(engine, seconds), held_out_error=0.3)

    monkeypatch.setattr(kept_costs, "measure_costs", disturbed)
    assert profile_costs(pair()).held_out_error == 0.3
    monkeypatch.setattr(kept_costs, "measure_costs", steady)
    assert profile_costs(pair()).held_out_error < 0.1
    profile_costs(pair())
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


def test_without_a_drafter_there_is_no_table(measured):
    with pytest.raises(ValueError, match="drafter none drafts no trees"):
        profile_costs(Engine.from_model(tiny_model("olmoe")))


def steps_that_take(known, plain=1.0, draft=1.0, rest=1.0, is_empty=False):
    """What the probe would find: the table's times, by so much more."""

    def steps(num_rows, factor, draft_ms):
        rest_ms = plain * factor * known.predict_ms(num_rows, None)
        tree = SimpleNamespace(parents=[0] * num_rows) if num_rows > 1 else None
        return [SimpleNamespace(tree=tree, draft_ms=plain * draft_ms, verify_ms=rest_ms, other_ms=0.0)] * 3

    drafting = draft * known.draft_ms(8, 8)
    return lambda engine, kinds, least: (
        {PLAIN: steps(1, 1.0, 0.0)}
        | {kind: steps(1 if is_empty else rows, rest, drafting) for kind, rows in zip(kinds, PROBED_ROWS, strict=True)},
        [],
    )


@pytest.mark.parametrize(
    ("changed", "holds"),
    [
        ({}, True),
        ({"plain": 1.3, "draft": 1.1, "rest": 0.9}, True),
        ({"is_empty": True}, True),  # look-up that found nothing in so few steps
        ({"plain": 0.4}, False),
        ({"plain": 1.7}, False),
        ({"draft": 0.3}, False),
        ({"rest": 1.4}, False),
    ],
    ids=str,
)
def test_a_table_holds_while_steps_cost_what_it_says(monkeypatch, changed, holds):
    known = table()
    monkeypatch.setattr(kept_costs, "run_rounds", steps_that_take(known, **changed))
    assert still_holds(pair(), known) == holds


def test_a_table_of_a_machine_that_has_changed_is_measured_anew(measured, monkeypatch):
    profile_costs(pair())
    monkeypatch.setattr(kept_costs, "still_holds", lambda engine, table: False)
    profile_costs(pair())
    assert len(measured) == 2 and len(list(cache_folder().iterdir())) == 1


def test_an_engine_tries_its_table_once(measured, monkeypatch):
    profile_costs(pair())
    tried = []
    monkeypatch.setattr(kept_costs, "still_holds", lambda engine, table: tried.append(engine) or True)
    engine = pair()
    assert profile_costs(engine) is profile_costs(engine) and tried == [engine] and len(measured) == 1


def test_the_probe_runs_real_steps_and_leaves_no_conversation():
    engine = pair()
    steps = []
    own = engine.generate
    engine.generate = lambda *args, **more: map(lambda step: steps.append(step) or step, own(*args, **more))
    assert still_holds(engine, table()) in (True, False)
    rows = {len(step.tree.parents) for step in steps if step.tree}
    assert rows >= set(PROBED_ROWS) and any(step.tree is None for step in steps)
    assert engine.seat_for([1, 2, 3]).conversation.token_ids == []
