"""The table of costs: what it predicts of planted times, which interpolation it trusts, its file."""

from __future__ import annotations

import json

import numpy as np
import pytest

from moespec.cost_fits import Sample, fit_twisted_plane, held_out_errors, least_squares
from moespec.cost_table import CostTable, DraftPoint, Spread, StepPoint

ROWS, BUDGETS, NUM_EXPERTS, TOP_K = (2, 4, 8, 16, 32), (4, 8, 12, None), 16, 4


def union(num_rows):
    return NUM_EXPERTS * (1 - 0.75**num_rows)


def mass(num_rows, budget):
    return 1 - (NUM_EXPERTS - (budget or NUM_EXPERTS)) * num_rows / 1000


def point(num_rows, budget, verify_ms):
    natural = union(num_rows)
    return StepPoint(
        num_rows=num_rows,
        budget=budget,
        num_steps=5,
        verify_ms=Spread(verify_ms, 9 * verify_ms, 99.0),  # disturbed more often than not
        other_ms=Spread(0.1 + 0.01 * num_rows, 9.0, 9.0),
        total_ms=Spread(verify_ms + 0.2, 50.0, 99.0),
        experts_natural=natural,
        experts_read=min(natural, budget or NUM_EXPERTS),
        mass_kept=mass(num_rows, budget),
        num_accepted=1.5,
    )


def table(verify_ms, rows=ROWS):
    """Of steps that take `verify_ms(T, n)`, and drafting that takes 0.1 + 0.2 + 0.01 per expanded node a level."""
    trees = [point(T, B, verify_ms(T, min(union(T), B or NUM_EXPERTS))) for T in rows for B in BUDGETS]
    drafts = [
        DraftPoint(levels, k, 5, Spread(0.1 + (levels - 1) * (0.2 + 0.01 * k), 7.0, 9.0))
        for levels, k in ((2, 3), (4, 3), (8, 3), (2, 8), (8, 8))
    ]
    return CostTable.of({"name": "planted"}, (NUM_EXPERTS, TOP_K), (10, 90), [point(1, None, 1.0), *trees], drafts)


def twisted(num_rows, num_read):
    return 0.5 + 0.03 * num_rows + 0.2 * num_read + 0.01 * num_rows * num_read


def stepped(num_rows, num_read):
    """As in steps of fixed shapes, where 3 rows cost what 4 do."""
    return (2 ** int(np.ceil(np.log2(num_rows)))) ** 1.5 * 0.1 + 0.2 * num_read


def test_a_step_not_measured_is_predicted_where_times_follow_rows_and_experts():
    costs = table(twisted)
    assert costs.fit == "twisted plane" and costs.held_out_error < 1e-9
    for num_rows, budget in ((16, 6), (4, 8), (8, None), (32, 13)):
        read = costs.experts_read(num_rows, budget)
        assert costs.verify_ms(num_rows, budget) == pytest.approx(twisted(num_rows, read))
        levels = 5
        whole = twisted(num_rows, read) + 0.1 + 0.01 * num_rows + 0.1 + 4 * (0.2 + 0.01 * 8)
        assert costs.predict_ms(num_rows, budget, levels, 8) == pytest.approx(whole)


def test_times_that_jump_between_sizes_are_interpolated_size_by_size():
    costs = table(stepped)
    assert costs.fit == "lines by rows" and costs.held_out_error < 1e-9
    between = (stepped(8, 10) + stepped(16, 10)) / 2
    assert costs._verify(12, 10) == pytest.approx(between)


def test_a_plain_step_is_what_was_measured_and_needs_no_drafter():
    costs = table(twisted)
    assert costs.predict_ms(1, None) == costs.plain_ms == 1.2
    assert costs.predict_ms(1, 8, num_levels=3) == pytest.approx(1.0 + 0.11 + 0.1 + 2 * 0.28)
    assert costs.draft_ms(0) == 0


def test_experts_and_mass_lie_between_those_of_measured_trees():
    costs = table(twisted)
    for num_rows, budget in ((6, 10), (2, 4), (32, None), (20, 5), (64, 9)):
        for predicted, measured in (
            (costs.experts_read, lambda T, B: min(union(T), B or NUM_EXPERTS)),
            (costs.mass_kept, mass),
        ):
            by_rows = [
                np.interp(budget or NUM_EXPERTS, [4, 8, 12, 16], [measured(T, B) for B in BUDGETS]) for T in ROWS
            ]
            assert predicted(num_rows, budget) == pytest.approx(np.interp(num_rows, ROWS, by_rows))
    assert costs.union(8) == costs.experts_read(8, None) == pytest.approx(union(8))
    assert costs.mass_kept(1, 4) == mass(1, None) == 1


def test_the_held_out_error_is_that_of_a_sample_left_out():
    samples = [Sample(T, n, twisted(T, n)) for T in (2, 4, 8) for n in (4, 9)]
    wrong = [*samples, Sample(16, 9, 3 * twisted(16, 9))]
    assert max(held_out_errors(fit_twisted_plane, samples)) < 1e-9
    assert held_out_errors(fit_twisted_plane, wrong)[-1] == pytest.approx(2 / 3)  # a third of what was measured
    assert held_out_errors(fit_twisted_plane, samples[:1]) == [float("inf")]


def test_errors_count_by_their_share():
    """The mean of 1 and 3 with the least relative errors: (1 + 1/3) / (1 + 1/9)."""
    assert least_squares([[1.0], [1.0]], [1.0, 3.0]) == pytest.approx([1.2])


def test_a_drafter_that_drafts_nothing_leaves_nothing_to_predict():
    with pytest.raises(ValueError, match="drafted no tree"):
        table(twisted, rows=())


def test_a_table_survives_its_file(tmp_path):
    costs, path = table(stepped), tmp_path / "costs.json"
    costs.save(path)
    again = CostTable.load(path)
    assert again == costs and again.predict_ms(12, 6, 4, 3) == costs.predict_ms(12, 6, 4, 3)


@pytest.mark.parametrize(
    "change",
    [
        lambda values: values.pop("steps"),
        lambda values: values.update(schema=0),
        lambda values: values.update(fit="unknown"),
        lambda values: values.update(more=1),
        lambda values: values["steps"][0].pop("verify_ms"),
        lambda values: values["drafts"].append(3),
    ],
)
def test_a_file_that_is_no_table_is_refused(change, tmp_path):
    values = json.loads(json.dumps(table(twisted).to_json()))
    change(values)
    path = tmp_path / "costs.json"
    path.write_text(json.dumps(values))
    with pytest.raises(ValueError, match=r"costs.json is no table of costs"):
        CostTable.load(path)


@pytest.mark.parametrize("text", ["", "[]", "{", "null"])
def test_a_broken_file_is_refused(text, tmp_path):
    path = tmp_path / "costs.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"costs.json is no table of costs"):
        CostTable.load(path)
