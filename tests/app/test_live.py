"""The live frames against the trace they project, and the service that hands steps to the page."""

from __future__ import annotations

import base64
import json
import struct

import pytest

from app.controls import read, read_live
from app.live import LiveRun
from app.live.live import ACTIVE, KEPT, MASS_STEPS, NATURAL, SEPARATOR
from app.plots import expert_figure
from app.service import MAX_WAITING, Service
from moespec import BudgetConfig, GenerationConfig, TreeConfig

HOSTILE = "<script>alert(1)</script> **bold** \x1f\x00\x1b[31m ünïcödé 🙂"
CONTROLS = (False, 16.0, "substitution", "softmax", "uniform", False, 16.0, 5.0, 4.0, 0.0)


@pytest.fixture(scope="module")
def service():
    return Service()


def stream(service, prompt=HOSTILE, budget=16, num_tokens=40):
    ticket = service.enter("visitor").ticket
    generation = GenerationConfig(max_new_tokens=num_tokens, ignore_eos=True)
    messages = [{"role": "user", "content": prompt}]
    return list(service.stream("visitor", ticket, messages, generation, BudgetConfig(budget), TreeConfig(16, 5, 4)))


def test_a_frame_says_what_the_trace_says_in_under_5_kb(service):
    run = LiveRun(service.piece, service.info.num_experts)
    batches = stream(service)
    frames = [run.frame(steps) for steps in batches]
    steps = [step for batch in batches for step in batch]
    assert frames[-1]["tokens"].count(SEPARATOR) == len(frames[-1]["origins"]) == 40
    written = [token for step in steps for token in step.token_ids]
    assert frames[-1]["tokens"].replace(SEPARATOR, "") == service.engine.target.tokenizer.decode(written)
    accepted = sum(depth > 0 for step in steps for depth in step.origins)
    assert sum(origin != "0" for origin in frames[-1]["origins"]) == accepted > 0
    drawn = next(step for step in reversed(steps) if step.kind == "tree")
    cells = struct.iter_unpack("<H", base64.b64decode(frames[-1]["layers"]["cells"]))
    for layer in drawn.layers:
        for expert in range(service.info.num_experts):
            (value,) = next(cells)
            expected = [expert in members for members in (layer.natural, layer.kept, layer.active)]
            assert [bool(value & bit) for bit in (NATURAL, KEPT, ACTIVE)] == expected
            share = layer.score[expert] / sum(layer.score)
            assert (value >> 3) / MASS_STEPS == pytest.approx(share, abs=1 / MASS_STEPS)
    # Growing strings go out as what is new: they are not in an update's size.
    fixed = [{**frame, "tokens": "", "origins": ""} for frame in frames]
    assert max(len(json.dumps(frame)) for frame in fixed) < 5000


def test_figures_are_those_of_the_summary(service):
    run = LiveRun(service.piece, service.info.num_experts)
    batches = stream(service)
    figures = [run.frame(steps) for steps in batches][-1]["figures"]
    summary = batches[-1][-1].summary
    assert figures["tokens_per_s"] == pytest.approx(summary.tokens_per_s, rel=0.001)
    assert figures["natural"] == pytest.approx(summary.experts_natural, abs=0.1)
    assert figures["mass"] == pytest.approx(summary.mass_kept, abs=0.001)
    assert figures["lossless"] is summary.lossless is False


def test_one_answer_per_visitor_and_leaving_frees_the_place(service):
    places = [service.enter(name) for name in ("first", "second")]
    assert [place.num_before for place in places] == [0, 1]
    with pytest.raises(ValueError, match="still being written"):
        service.enter("first")
    service.leave("second")
    generation = GenerationConfig(max_new_tokens=400, ignore_eos=True)
    rest = [{"role": "user", "content": "Hi"}], generation, BudgetConfig(), TreeConfig()
    steps = service.stream("first", places[0].ticket, *rest)
    next(steps)
    service.stop("first")
    assert list(steps)[-1][-1].summary.finish_reason == "stopped"
    again = service.enter("first")
    assert again.num_before == 0
    assert list(service.stream("first", places[0].ticket, *rest)) == [], "an answer that was taken back"
    assert service.expects("first", again.ticket), "and the one asked for since keeps its place"
    service.leave("first")
    assert list(service.stream("first", again.ticket, *rest)) == []


def test_of_a_step_cut_short_what_was_written_counts_as_accepted(service):
    """An answer's end is often a guess that held, with more behind it that nobody reads."""
    num_cut = 0
    for prompt in ("What is 12 + 30?", "Who are you?", "Which is bigger, 34 or 43?"):
        messages = [{"role": "user", "content": prompt}]
        *steps, last = service.engine.generate(messages, GenerationConfig(), BudgetConfig(), TreeConfig(16, 5, 4))
        held = sum(depth > 0 for depth in last.origins)
        assert last.summary.finish_reason == "eos"
        assert last.tree is None or sum(last.tree.accepted) - 1 == held
        num_cut += last.origins[-1] > 0
        figures = LiveRun(service.piece, service.info.num_experts).frame([*steps, last])["figures"]
        _, *decoded = (*steps, last)
        accepted = sum(depth > 0 for step in decoded for depth in step.origins)
        assert figures["accepted"] == pytest.approx(accepted / len(decoded), abs=0.01)
    assert num_cut, "no step was cut"


def test_a_place_is_its_tickets_alone_and_stop_gives_up_one_that_waits(service):
    first = service.enter("first")
    assert service.expects("first", first.ticket)
    service.stop("first")  # its answer has not begun
    assert not service.expects("first", first.ticket)
    again = service.enter("first")
    assert not service.expects("first", first.ticket) and service.expects("first", again.ticket)
    service.leave("first", first.ticket)  # late news of the answer before
    assert service.expects("first", again.ticket)
    service.leave("first")
    for number in range(MAX_WAITING):
        service.enter(f"visitor {number}")
    with pytest.raises(ValueError, match="are waiting already"):
        service.enter("one too many")
    for number in range(MAX_WAITING):
        service.leave(f"visitor {number}")


def test_old_turns_are_dropped_and_a_message_too_long_is_refused(service):
    turn = [{"role": "user", "content": "word " * 900}, {"role": "assistant", "content": "Yes."}]
    last = {"role": "user", "content": "What is 2 + 2?"}
    kept = service.fit([*turn * 8, last], GenerationConfig(max_new_tokens=64))
    assert kept[-1] == last and kept[0]["role"] == "user" and len(kept) < 17
    assert len(service.engine.encode(kept)) + 64 <= service.info.max_context
    with pytest.raises(ValueError, match="context"):
        service.fit([{"role": "user", "content": "word " * 9000}], GenerationConfig())
    unanswered = {"role": "user", "content": "word " * 3000}  # stopped before its answer began
    assert service.fit([unanswered, last], GenerationConfig(max_new_tokens=1500)) == [last]


def test_a_model_that_cannot_be_loaded_is_one_sentence(tmp_path):
    with pytest.raises(ValueError, match=str(tmp_path)):
        _ = Service(tmp_path).engine


def test_controls_become_configs_and_nonsense_is_named(service):
    budget, tree = read_live(CONTROLS)
    assert budget == BudgetConfig(16) and tree == TreeConfig(16, 5, 4, 0)
    assert read((True, *CONTROLS[1:], 0.5, 64.0, 3, False)).budget.is_lossless
    for place, value, name in ((1, 16.5, "budget"), (2, "magic", "policy"), (6, 0.0, "total_tokens")):
        with pytest.raises(ValueError, match=name):
            read_live((*CONTROLS[:place], value, *CONTROLS[place + 1 :]))
    with pytest.raises(ValueError, match="seed"):
        read((*CONTROLS, 0.5, 64.0, None, False))
    service.enter("visitor")
    with pytest.raises(ValueError, match="outside 8 to 64"):
        service.update("visitor", BudgetConfig(7), TreeConfig())
    service.leave("visitor")


def test_the_plotly_view_has_every_layer_and_expert(service):
    layers = [step.layers for steps in stream(service) for step in steps if step.layers]
    figure = expert_figure(layers, service.info.num_experts)
    heat, *tails = figure.data
    assert heat.z.shape == (service.info.num_moe_layers, service.info.num_experts)
    assert heat.z.sum(axis=1) == pytest.approx(1)
    assert len(tails) == service.info.num_moe_layers and all(abs(tail.y[-1]) < 1e-9 for tail in tails)
    shares = [sorted(layer.score, reverse=True) for layer in (step[2] for step in layers)]
    beyond = [sum(scores[12:]) / sum(scores) for scores in shares]
    assert tails[2].y[11] == pytest.approx(sum(beyond) / len(beyond), abs=1e-6)
