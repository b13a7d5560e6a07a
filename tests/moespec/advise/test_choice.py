"""The decision against a brute-force maximum, its bounds by hand, and what is said of it."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest

from moespec import TreeConfig
from moespec.advise.acceptance import Acceptance, Candidate, parse_rates, parse_tokens, recorded
from moespec.advise.choice import DO_NOT, MODELLED, SPECULATE, WITH_A_BUDGET, choose, say, weigh
from moespec.advise.costs import (
    FREE_DRAFTS,
    LEAST_EFFICIENCY,
    MOST_EFFICIENCY,
    BoundedCosts,
    DraftShape,
    ModelledCosts,
    modelled_bounds,
)
from moespec.advise.devices import Device
from moespec.advise.unions import Unions, unions_of
from moespec.cost import WORKED_SHAPES, expected_union, likeliest_tree, step_bytes

QWEN = WORKED_SHAPES["Qwen3-30B-A3B"]
H200 = Device("H200", "datasheet", 4.3e12)
BOUND = Unions(128, 8, "bound", {})


def modelled(shape=QWEN, draft=FREE_DRAFTS, unions=BOUND, device=H200):
    return ModelledCosts(shape, device, draft, 0, unions.expected)


def exactly(costs):
    return BoundedCosts(costs, ())


def all_of_it(num_rows, budget):
    return 1.0


@pytest.mark.parametrize("rates", ["0.9", "0.8,0.7,0.6", "0.5/0.2,0.4", "0.3"])
@pytest.mark.parametrize("shape", WORKED_SHAPES.values(), ids=WORKED_SHAPES)
def test_the_choice_is_the_maximum_over_all_pairs(rates, shape):
    draft = DraftShape.eagle3(shape.hidden_size, 32_000, 2)
    unions = Unions(shape.num_experts, shape.top_k, "bound", {})
    budgets = [shape.top_k, shape.num_experts // 2]
    acceptance = parse_rates(rates)
    costs = exactly(modelled(shape, draft, unions))
    found = [choose(acceptance, costs, of, lambda rows, B: 1 if B is None else 0.9) for of in ([None], budgets)]
    plain = step_bytes(shape, shape.top_k)
    fastest: dict[bool, float] = {True: 0.0, False: 0.0}
    for candidate, budget in itertools.product(acceptance.candidates, [None, *budgets]):
        union = expected_union(shape.num_experts, shape.top_k, candidate.tree.total_tokens)
        if budget is not None and budget >= union:
            continue
        step = step_bytes(shape, union if budget is None else budget)
        drafting = draft.step_bytes + candidate.tree.depth * draft.level_bytes
        tokens = 1 + candidate.num_accepted * (1 if budget is None else 0.9)
        fastest[budget is None] = max(fastest[budget is None], tokens * plain / (step + drafting))
    for choice in found:
        assert choice.speedup == pytest.approx(fastest[choice.budget is None])
        assert choice.speedup == pytest.approx(choice.tokens_per_step / choice.break_even)
        assert choice.low <= choice.speedup <= choice.high


def test_steps_of_many_sizes_count_by_their_share():
    acceptance = Acceptance("", [Candidate(TreeConfig(8, 4, 3, 0.1), 1.5, {(2, 1): 0.25, (8, 4): 0.75})], 1, 1)
    costs = modelled(draft=DraftShape(1e9, 1e8))
    choice = weigh(acceptance.candidates[0], None, acceptance, exactly(costs), all_of_it)
    step_ms = 0.25 * costs.predict_ms(2, None, 1) + 0.75 * costs.predict_ms(8, None, 4)
    assert choice.num_rows == 6.5 and choice.step_ms == pytest.approx(step_ms)
    assert choice.speedup == pytest.approx(2.5 * costs.plain_ms / step_ms)
    assert (choice.tree, choice.low, choice.high) == ("8,4,3,0.1", choice.speedup, choice.speedup)


def test_what_is_not_known_widens_the_bounds_as_independent_errors_do():
    costs = modelled()
    acceptance = Acceptance("", [Candidate(TreeConfig(16, 8, 3, 0), 2.0, {(16, 8): 1.0})], 0.8, 1.1)
    alone = weigh(acceptance.candidates[0], None, acceptance, exactly(costs), all_of_it)
    assert alone.low == pytest.approx(alone.speedup * 2.6 / 3) and alone.high == pytest.approx(alone.speedup * 3.2 / 3)
    bounded = modelled_bounds(costs, BOUND)
    choice = weigh(acceptance.candidates[0], None, acceptance, bounded, all_of_it)
    ms = costs.predict_ms(16, None, 8)
    fewer = replace(costs, union=BOUND.least).predict_ms(16, None, 8)
    assert choice.low == pytest.approx(
        choice.speedup * math.exp(-math.hypot(math.log(3 / 2.6), math.log(1 / LEAST_EFFICIENCY)))
    )
    assert choice.high == pytest.approx(
        choice.speedup * math.exp(math.hypot(math.log(3.2 / 3), math.log(MOST_EFFICIENCY), math.log(ms / fewer)))
    )


def test_a_tree_that_uses_the_memory_badly_takes_longer():
    costs = modelled(draft=DraftShape(1e9, 1e8))
    badly = replace(costs, efficiency=0.5)
    assert badly.predict_ms(16, None, 8) == pytest.approx(2 * (costs.verify_ms(16, None) + costs.draft_ms(8)))
    assert badly.plain_ms == badly.predict_ms(1, None) == costs.plain_ms


def test_a_lossy_choice_pays_with_the_tokens_that_the_budget_costs():
    acceptance = parse_rates("0.8")
    costs = exactly(modelled())
    kept = choose(acceptance, costs, [32], all_of_it)
    lost = choose(acceptance, costs, [32], lambda num_rows, budget: 0.5)
    assert kept.budget == lost.budget == 32 and kept.experts == 32
    assert lost.speedup < kept.speedup
    assert choose(acceptance, costs, [], all_of_it) is None
    assert choose(acceptance, costs, [128], all_of_it) is None  # no tree uses so many: it would not bind


@pytest.mark.parametrize(
    ("shape", "rates", "verdict", "words"),
    [
        ("OLMoE-1B-7B", "0.9", SPECULATE, "Speculate: --tree"),
        ("Qwen3-30B-A3B", "0.3", DO_NOT, "Do not speculate: the best"),
        ("Qwen3-30B-A3B", "0", DO_NOT, "Do not speculate: the drafter gets nothing accepted"),
    ],
)
def test_what_is_said(shape, rates, verdict, words):
    shape = WORKED_SHAPES[shape]
    costs = modelled(shape, DraftShape.eagle3(shape.hidden_size, 32_000, 2), Unions(shape.num_experts, 8, "", {}))
    lossless = choose(parse_rates(rates), exactly(costs), [None], all_of_it)
    said, headline = say(lossless, None, MODELLED)
    assert said == verdict and headline.startswith(words) and headline.endswith(".")


def test_a_budget_alone_may_pay_and_a_faster_lossy_choice_is_named():
    costs = exactly(modelled())
    deep = Acceptance("", [Candidate(TreeConfig(64, 8, 8, 0), 4.0, {(64, 8): 1.0})], 1, 1)
    lossless, lossy = (choose(deep, costs, [budget], all_of_it) for budget in (None, 32))
    # The reading of the reference: no budget needs about 10 tokens per step at the independent bound, B = 32 about 2.8.
    assert lossless.break_even == pytest.approx(9.8, abs=0.05) and lossy.break_even == pytest.approx(2.8, abs=0.05)
    assert say(lossless, lossy, MODELLED)[0] == WITH_A_BUDGET
    assert say(lossless, None, MODELLED)[0] == DO_NOT
    paying = replace(lossless, speedup=1.2)
    verdict, headline = say(paying, lossy, MODELLED)
    assert verdict == SPECULATE and "B = 32, which is lossy" in headline
    assert "lossy" not in say(paying, replace(lossy, speedup=1.21), MODELLED)[1]


def test_rates_are_read_by_depth_and_rank():
    acceptance = parse_rates("0.7/0.2,0.5")
    ranks = [[0.7, 0.2], *[[0.5, 0.2, 0.12, 0.072]] * 7]  # 0.4 of the rest for every later choice
    for candidate in acceptance.candidates:
        best = likeliest_tree(ranks, candidate.tree.total_tokens)
        assert candidate.num_accepted == pytest.approx(best.num_accepted)
        assert candidate.sizes == {(best.num_rows, best.depth): 1.0}
    assert parse_rates("0").candidates == []


@pytest.mark.parametrize(("text", "rows", "tokens"), [("3.1", 64, 3.1), ("2.4@8", 8, 2.4), ("4@60", 60, 4.0)])
def test_typed_tokens_are_reached_at_the_rows_they_were_typed_for(text, rows, tokens):
    found = {candidate.tree.total_tokens: candidate.num_accepted for candidate in parse_tokens(text).candidates}
    below, above = max(n for n in found if n <= rows), min(n for n in found if n >= rows)
    assert 1 + found[below] <= tokens + 1e-6 <= 1 + found[above] + 2e-6
    assert list(found.values()) == sorted(found.values())


@pytest.mark.parametrize(
    ("parse", "text"),
    [
        (parse_rates, ""),
        (parse_rates, "0.8,x"),
        (parse_rates, "1.2"),
        (parse_rates, "0.8/0.3"),
        (parse_rates, "0.2/0.3"),
        (parse_rates, "-0.1"),
        (parse_rates, "nan"),
        (parse_tokens, "x"),
        (parse_tokens, "0.5"),
        (parse_tokens, "9.5"),
        (parse_tokens, "4.5@4"),
        (parse_tokens, "3@65"),
        (parse_tokens, "3@1"),
        (parse_tokens, "nan"),
    ],
)
def test_what_is_no_acceptance_is_refused(parse, text):
    with pytest.raises(ValueError, match=r"^accept(ance|ed)="):
        parse(text)


def test_a_record_is_read_as_it_was_written():
    candidate = Candidate(TreeConfig(8, 4, 3, 0.1), 1.5, {(2, 1): 0.25, (8, 4): 0.75})
    record = {"acceptance": {"source": "here", "low": 0.9, "high": 1.2, "candidates": [candidate.to_json()]}}
    acceptance = recorded(record)
    (again,) = acceptance.candidates
    assert (acceptance.source, acceptance.low, acceptance.high) == ("here", 0.9, 1.2)
    assert (again.tree, again.num_accepted, again.num_rows) == (candidate.tree, 1.5, 6.5)
    assert again.sizes == {(6.5, 3.25): 1.0}


@pytest.mark.parametrize(("name", "rows", "union"), [("OLMoE-1B-7B", 31, 39), ("Qwen3-30B-A3B", 63, 80)])
def test_recorded_unions_lie_between_their_bounds(name, rows, union):
    unions = unions_of(WORKED_SHAPES[name])
    assert unions.is_measured and unions.expected(rows) == pytest.approx(union)
    for num_rows in (1, 2, 5, 16, 64):
        least, expected, most, bound = (
            read(num_rows) for read in (unions.least, unions.expected, unions.most, unions.bound)
        )
        assert least <= expected <= most <= bound + 1e-9
        assert bound == pytest.approx(expected_union(unions.num_experts, 8, num_rows))
    assert unions.expected(1) == unions.least(1) == unions.most(1) == pytest.approx(8)


def test_where_nothing_is_recorded_the_bound_is_expected():
    unions = unions_of(WORKED_SHAPES["gpt-oss-20b"])
    assert not unions.is_measured and "upper bound" in unions.source
    assert unions.expected(16) == unions.most(16) == pytest.approx(expected_union(32, 4, 16))
    assert unions.least(16) == pytest.approx(expected_union(32, 4, 16**0.55))


def test_on_a_cpu_arithmetic_is_added():
    shape = WORKED_SHAPES["OLMoE-1B-7B"]
    unions = Unions(64, 8, "", {})
    costs = modelled(shape, unions=unions, device=Device("cpu", "measured", 60e9, flops_per_s=1e12, kind="cpu"))
    flops_of_a_row = 2 * (shape.dense_weights + 16 * 8 * shape.expert_weights)
    reading = modelled(shape, unions=unions, device=Device("cpu", "measured", 60e9))
    # The reference's floor of a plain step at 60 GB/s is 39 ms, of 16 rows under B = 16 66 ms.
    assert reading.plain_ms == pytest.approx(39, abs=0.5) and reading.verify_ms(16, 16) == pytest.approx(66, abs=0.5)
    assert costs.verify_ms(16, 16) == pytest.approx(reading.verify_ms(16, 16) + 16 * flops_of_a_row / 1e9)
