"""The calculator: it says what `advise` says, by sizes as by name, and draws nothing modelled as if measured."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from app.advice import (
    advice_in_words,
    advice_lines,
    best_by_rows,
    break_even_figure,
    choices_table,
    floors_table,
    recommended,
)
from app.calculator import (
    ASSUMED,
    EMBEDDED,
    HERE,
    MIXED,
    RECORDED,
    TYPED_CARD,
    TYPED_MODEL,
    TYPED_RATES,
    TYPED_TOKENS,
    Question,
    Sizes,
)
from moespec.advise import Device, advise, device_of_bandwidth, parse_rates, read_record
from moespec.published import PUBLISHED

QWEN = Sizes(48, 128, 8, 2048, 768, 151_936, "bf16")
QUESTION = Question("Qwen3-30B-A3B", QWEN, "H200", 3350, MIXED, "", 0)
OTHER = Device("another", "measured", 1e11)


def test_it_says_what_advise_says():
    expected = advise("Qwen3-30B-A3B", "H200", acceptance=ASSUMED[MIXED])
    assert QUESTION.advice(None) == expected
    typed = replace(QUESTION, card=TYPED_CARD, gb_per_s=500, profile=TYPED_TOKENS, typed=" 3.1@32 ", context=4096)
    assert typed.advice(None) == advise("Qwen3-30B-A3B", device_of_bandwidth(500), accepted="3.1@32", context=4096)
    here = replace(QUESTION, card=HERE, profile=TYPED_RATES, typed="0.9")
    assert here.advice(OTHER) == advise("Qwen3-30B-A3B", OTHER, acceptance="0.9")
    embedded = replace(QUESTION, model=EMBEDDED, profile=RECORDED)
    assert embedded.advice(None) == advise(device="H200")


@pytest.mark.parametrize(
    ("name", "sizes"),
    [("OLMoE-1B-7B", Sizes(16, 64, 8, 2048, 1024, 50_304, "bf16")), ("Qwen3-30B-A3B", QWEN)],
)
def test_a_model_by_its_sizes_costs_what_it_costs_by_its_name(name, sizes):
    by_name = replace(QUESTION, model=name).advice(None)
    by_sizes = replace(QUESTION, model=TYPED_MODEL, sizes=sizes).advice(None)
    assert by_sizes.plain_bytes == pytest.approx(by_name.plain_bytes, rel=0.04), "attention apart"
    assert [row.num_rows for row in by_sizes.sizes] == [row.num_rows for row in by_name.sizes]
    for ours, theirs in zip(by_sizes.budgets, by_name.budgets, strict=True):
        assert ours.break_even == pytest.approx(theirs.break_even, rel=0.04)
    assert by_sizes.model["weights_bytes"] == pytest.approx(by_name.model["weights_bytes"], rel=0.04)


def test_fewer_bits_and_a_context_are_counted():
    target, halved = QWEN.target(0), replace(QWEN, weights="8 bits").target(0)
    assert halved.shape.expert_bytes * 2 == target.shape.expert_bytes == 3 * 2048 * 768 * 2
    assert QWEN.target(1000).kv_bytes == 2 * 2 * 48 * 2048 * 1000


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"context": -1}, "context is -1: use a whole number, 0 to"),
        ({"context": None}, "context is empty"),
        ({"context": 0.5}, "context is 0.5"),
        ({"card": TYPED_CARD, "gb_per_s": 0}, "give GB/s above 0"),
        ({"card": TYPED_CARD, "gb_per_s": None}, "GB/s is empty"),
        ({"profile": TYPED_RATES, "typed": " "}, "Acceptance is empty"),
        ({"profile": TYPED_RATES, "typed": "0.8,x"}, "is not a list of rates"),
        ({"profile": TYPED_RATES, "typed": "1.8"}, "falling shares of at most 1"),
        ({"profile": TYPED_TOKENS, "typed": "99"}, "tokens per step"),
        ({"model": TYPED_MODEL, "sizes": replace(QWEN, top_k=129)}, "top-k=129 is not allowed: use 1 to 128"),
        ({"model": TYPED_MODEL, "sizes": replace(QWEN, layers=0)}, "layers is 0: use a whole number, 1 to"),
        ({"model": TYPED_MODEL, "sizes": replace(QWEN, experts=None)}, "experts is empty"),
        ({"model": TYPED_MODEL, "sizes": replace(QWEN, hidden=1e30)}, "hidden size is 1e"),
        ({"model": TYPED_MODEL, "sizes": replace(QWEN, words=float("nan"))}, "words is nan"),
        ({"model": TYPED_MODEL, "sizes": replace(QWEN, expert_ffn=float("inf"))}, "expert size is inf"),
    ],
)
def test_bad_numbers_are_a_sentence(changes, sentence):
    question = replace(QUESTION, **changes)
    with pytest.raises(ValueError, match=sentence) as refused:
        question.advice(None)
    assert "\n" not in str(refused.value)


def drawn(question: Question, here: Device | None = None) -> Any:
    advice = question.advice(here)
    return break_even_figure(advice, question.acceptance(advice), question.accepted_in_words(advice))


def is_hollow(trace: Any) -> bool:
    return "-open" in trace.marker.symbol and (trace.mode == "markers" or trace.line.dash in ("dash", "dot", "dashdot"))


@pytest.mark.parametrize("model", [*PUBLISHED, TYPED_MODEL])
def test_without_a_measurement_all_is_hollow_and_dashed(model):
    figure = drawn(replace(QUESTION, model=model))
    assert len(figure.data) >= 3 and all(is_hollow(trace) for trace in figure.data)


def test_what_was_measured_is_solid_and_says_where():
    figure = drawn(replace(QUESTION, model=EMBEDDED, profile=RECORDED))
    solid = [trace for trace in figure.data if not is_hollow(trace)]
    assert [trace.name for trace in solid] == ["must bring, measured on AMD EPYC, 2 threads"]
    steps = {step["num_rows"]: step["in_plain_steps"] for step in read_record()["steps"] if step["budget"] is None}
    assert dict(zip(solid[0].x, solid[0].y, strict=True)) == steps
    assert all("modelled" in trace.name or "would bring" in trace.name for trace in figure.data if is_hollow(trace))


def test_the_curves_are_the_advices_numbers():
    advice = QUESTION.advice(None)
    need, in_engine, reach, lossless, budgeted = drawn(QUESTION).data
    assert list(need.y) == [row.with_drafting for row in advice.sizes]
    assert list(in_engine.y) == [row.in_engine for row in advice.sizes] and "this engine" in in_engine.name
    typed = replace(QUESTION, card=TYPED_CARD, gb_per_s=500)
    assert not any("this engine" in trace.name for trace in drawn(typed).data)
    assert MIXED in reach.name and "typed" not in reach.name
    assert (lossless.x[0], lossless.y[0]) == (advice.lossless.num_rows, advice.lossless.tokens_per_step)
    assert (budgeted.x[0], budgeted.y[0]) == (advice.budgeted.num_rows, advice.budgeted.tokens_per_step)


def test_the_best_trees_by_rows_are_those_that_no_smaller_one_equals():
    candidates = parse_rates("0.7,0.65,0.6").candidates
    found = best_by_rows(parse_rates("0.7,0.65,0.6"))
    for rows, tokens in found[1:]:
        assert tokens == 1 + max(tree.num_accepted for tree in candidates if tree.num_rows <= rows)
        assert all(1 + tree.num_accepted < tokens for tree in candidates if tree.num_rows < rows)


def test_without_an_acceptance_there_is_no_verdict_and_no_recommendation():
    question = replace(QUESTION, profile=RECORDED)
    advice = question.advice(None)
    assert advice.headline.startswith("No verdict") and choices_table(advice)["rows"] == []
    assert len(drawn(question).data) == 2  # what a tree must bring, to a server that only reads and to this engine
    assert "Acceptance: not known." in " ".join(advice_lines(advice, question.accepted_in_words(advice)))


def test_what_is_recommended_becomes_settings_of_the_page_and_words_for_them():
    """Those of the engine under the page: on a GPU with its overhead."""
    for question in (QUESTION, replace(QUESTION, card=TYPED_CARD, gb_per_s=500)):
        advice = question.advice(None)
        judgement = advice.in_engine.judgement if question is QUESTION else advice
        settings = recommended(advice)
        assert ",".join(f"{number:g}" for number in settings.tree_config.numbers) == judgement.lossless.tree
        assert settings.budget is None and settings.drafter == "auto"
        words = advice_in_words(advice)
        assert f"rows, {settings.depth} deep, top-{settings.top_k}" in words and "no budget" in words
        assert judgement.lossless.gain in words and "--" not in words


def test_advice_against_speculation_recommends_plain_decoding_and_none_recommends_nothing():
    never = replace(QUESTION, profile=TYPED_RATES, typed="0.05").advice(None)
    assert never.headline.startswith("Do not speculate")
    assert advice_in_words(never).startswith("guess nothing") and "--" not in advice_in_words(never)
    assert recommended(never).drafter == "none" and recommended(never).budget is None
    unknown = replace(QUESTION, profile=RECORDED).advice(None)
    assert recommended(unknown) is None and advice_in_words(unknown) == unknown.in_engine.judgement.headline


def test_the_tables_are_the_advices_numbers_and_called_modelled():
    advice = QUESTION.advice(None)
    choices, floors = choices_table(advice), floors_table(advice)
    assert "modelled" in choices["caption"] and "modelled" in floors["caption"]
    assert choices["rows"][0]["cells"][0] == advice.lossless.tree and choices["rows"][1]["cells"][1] == "64"
    assert len(floors["rows"]) == len(advice.sizes) + len(advice.budgets)
    for row in (*choices["rows"], *floors["rows"]):
        columns = choices["columns"] if row in choices["rows"] else floors["columns"]
        assert len(row["cells"]) == len(columns) - 1
    lines = advice_lines(advice, "assumed")
    assert "at least 1.27 ms, in this engine" in " ".join(lines) and "H200: 4,800 GB/s, datasheet." in lines
