"""Measured advice: what is left out and predicted, what is measured of a tiny pair. Never how long anything took."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from moespec import Engine, GenerationConfig, profile
from moespec.advise import measure, probes
from moespec.advise.measure import MeasuredCosts, leave_out, measure_advice
from moespec.advise.probes import kept_by_budget, measure_acceptance
from moespec.advise.trees import LARGE
from moespec.cli import main
from moespec.profile import DEPTH, built_in_prompts
from moespec.shapes import shape_of
from moespec.tree import chain
from tests.conftest import VOCAB, tiny_model
from tests.drafters import PlantingDrafter
from tests.moespec.test_cost_table import BUDGETS, NUM_EXPERTS, ROWS, point, table, twisted, union


def test_left_out_pairs_are_predicted_by_the_others():
    """Of steps that follow the table's own law, every prediction is right; of one that does not, it is wrong."""
    costs = table(twisted)
    left_out = leave_out(costs)
    assert len(left_out) == measure.NUM_LEFT_OUT == len({(pair.num_rows, pair.budget) for pair in left_out})
    drafting = costs.draft_ms(DEPTH)
    for pair in left_out:
        read = min(union(pair.num_rows), pair.budget or NUM_EXPERTS)
        assert pair.measured_ms == pytest.approx(twisted(pair.num_rows, read) + 0.2)
        if (pair.num_rows, pair.budget) == (8, 8):  # its neighbours stay: what it reads lies between theirs
            assert pair.predicted_ms == pytest.approx(twisted(8, 8) + 0.1 + 0.08 + drafting)
    slow = left_out[0].num_rows, left_out[0].budget
    steps = [
        replace(
            step,
            verify_ms=replace(step.verify_ms, p20=9 * step.verify_ms.p20),
            total_ms=replace(step.total_ms, p20=9 * step.total_ms.p20),
        )
        if (step.num_rows, step.budget) == slow
        else step
        for step in costs.steps
    ]
    again = leave_out(replace(costs, steps=tuple(steps)))
    assert again[0].predicted_ms == left_out[0].predicted_ms  # which its own time has no part in
    assert again[0].error == pytest.approx((1 + left_out[0].error) / 9 - 1)


def test_bounds_of_costs_leave_the_plain_step_alone():
    costs, slower = MeasuredCosts(table(twisted)), MeasuredCosts(table(twisted), 1.5)
    assert slower.plain_ms == costs.plain_ms == slower.predict_ms(1, None)
    assert slower.predict_ms(8, 8, 4, 3) == pytest.approx(1.5 * costs.predict_ms(8, 8, 4, 3))
    assert costs.predict_ms(8, 8, 4, 3) == table(twisted).predict_ms(8, 8, 4, 3)
    assert costs.union(8) == union(8) and len(ROWS) * len(BUDGETS) > measure.NUM_LEFT_OUT
    assert point(2, None, 1.0).budget is None


@pytest.fixture
def engine(monkeypatch):
    monkeypatch.setattr(profile, "ROWS", (2, 5))
    for module in (profile, probes):
        monkeypatch.setattr(module, "NUM_TOKENS", 24)
    reference = list(range(VOCAB)) * 3
    return Engine.from_model(
        tiny_model("olmoe", seed=1), drafter=PlantingDrafter(reference, VOCAB), backend="reference"
    )


class Knowing(PlantingDrafter):
    """Proposes the next four tokens of the text."""

    def propose(self, context):
        (text,), length = self._references, len(context.token_ids)
        following = text[length : length + 4]
        return chain(context.token_ids[-1], following, [-0.1] * len(following), torch.device("cpu"))


def test_acceptance_is_measured_on_large_trees_without_a_budget(engine):
    prompts = built_in_prompts(engine)[:2]
    seen = []
    propose = engine.drafter.propose
    engine.drafter.propose = lambda context: seen.append(context.tree) or propose(context)
    acceptance = measure_acceptance(engine, prompts)
    assert set(seen) == {LARGE}
    assert acceptance.low <= 1 <= acceptance.high and "2 prompts" in acceptance.source
    whole = next(candidate for candidate in acceptance.candidates if candidate.tree == LARGE)
    assert 0 <= whole.num_accepted < 5 and 2 <= whole.num_rows <= 13


def test_budgets_are_compared_where_the_text_is_lossless(engine):
    """A budget of all experts accepts what none does; the places are those of the unbudgeted text, last first."""
    prompt = [3, 1, 4, 1, 5]
    *_, last = engine.generate(prompt, GenerationConfig(max_new_tokens=24))
    text = prompt + last.summary.token_ids
    knowing = Engine.from_model(tiny_model("olmoe", seed=1), drafter=Knowing(text, VOCAB), backend="reference")
    asked, generate = [], knowing.generate

    def noting(prompt, generation, *settings):
        asked.append((tuple(prompt), settings[0].budget))
        return generate(prompt, generation, *settings)

    knowing.generate = noting
    kept = kept_by_budget(knowing, [prompt], [3, 12])
    assert kept[None] == kept[12] == 1 and 0 <= kept[3] < 1  # the drafter knows the text, the budget breaks it
    assert asked[0] == (tuple(prompt), None)  # the text
    places = [place for place, budget in asked[1:] if budget is None]
    assert [place for place, budget in asked if budget == 3] == places
    assert len(places) >= 2 and sorted(set(places), key=len, reverse=True) == places
    assert all(list(place) == text[: len(place)] for place in places)


def test_a_tiny_pair_is_measured(engine, monkeypatch):
    shape = shape_of(engine.target.model, engine.name)
    advice = measure_advice(engine, shape, built_in_prompts(engine)[:2], least_budget=6, seconds=0)
    assert advice.sizes == [3, 12, 3, 32] and advice.least_budget == 6
    assert advice.steps[0].in_plain_steps == 1
    assert len(advice.left_out) == min(10, len(advice.steps) - 2)
    assert advice.lossless.budget is None
    chosen = {"lossless"} | ({"budgeted"} if advice.budgeted else set())
    assert set(advice.confirmed) == chosen
    assert all(found["interval_95"][0] <= found["ratio"] for found in advice.confirmed.values())
    assert advice.budgeted is None or advice.budgeted.budget >= 6
    assert {found.choice.budget for found in advice.by_budget} <= {3, 4, 6, 9}
    assert advice.headline.startswith(("Speculate", "Do not speculate")) and "measured" in advice.headline
    assert json.loads(json.dumps(advice.to_json())) == advice.to_json()


def test_the_command_measures_the_embedded_pair(capsys, monkeypatch):
    monkeypatch.setattr(profile, "ROWS", (2, 8))
    monkeypatch.setattr(profile, "DRAFTS", ((2, 3), (4, 3), (4, 8)))
    monkeypatch.setattr("moespec.bench.machine.CPU_BUFFER_BYTES", 1 << 20)
    assert main(["advise", "--measure", "--seconds", "0", "--limit", "3", "--device", "cpu"]) == 0
    text = capsys.readouterr().out
    assert "Left out of the table and predicted by the rest of it" in text
    assert "Run beside plain decoding, lossless:" in text
    assert text.count("modelled") >= 4 and text.count("measured") >= 2
    assert text.splitlines()[-1].startswith(("Speculate", "Do not speculate"))
