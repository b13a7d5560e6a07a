"""Advice on models that are not loaded: the reference's readings, where inputs come from, refusals, the command."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from moespec import EMBEDDED_TARGET
from moespec.advise import AdvisedTarget, advise, devices
from moespec.advise.choice import DO_NOT, SPECULATE, UNKNOWN
from moespec.advise.costs import DraftShape, ModelledCosts, modelled_bounds
from moespec.advise.devices import DEVICE_NAMES, Device, device_of_bandwidth, find_device
from moespec.advise.judgement import with_engine
from moespec.advise.targets import describe_target
from moespec.advise.unions import Unions, read_record
from moespec.bench.machine import Ceilings
from moespec.cli import main
from moespec.cost import WORKED_SHAPES, step_bytes
from moespec.published import PUBLISHED

ROOT = Path(__file__).resolve().parents[3]
H200_RECORDS = "step-models-h200", "step-h200"
SLOW_CPU = Device("a CPU", "measured", 30e9, memory_bytes=8 << 30, flops_per_s=1e11, kind="cpu")


@pytest.fixture(autouse=True)
def unmeasured(monkeypatch):
    """Nothing is timed: this machine reads 30 GB/s."""
    ceilings = Ceilings(30e9, "sum", 28e9, 1 << 20, None)
    monkeypatch.setattr(devices, "measure_ceilings", lambda device: ceilings)
    monkeypatch.setattr(devices, "_flops_per_s", lambda device: 1e11)


# Break-even tokens by rows, from the reference (independent rows), and by budget.
PRINTED = {
    "OLMoE-1B-7B": ({4: 2.6, 8: 3.9, 16: 5.1, 32: 5.7, 64: 5.8}, {16: 1.7, 32: 3.1, 48: 4.4}),
    "Qwen3-30B-A3B": ({4: 2.6, 8: 4.3, 16: 6.5, 32: 8.7, 64: 9.8}, {16: 1.6, 32: 2.8, 64: 5.2, 96: 7.6}),
    "Mixtral-8x7B": ({4: 2.5, 8: 3.3, 16: 3.6, 32: 3.7, 64: 3.7}, {4: 1.9, 6: 2.8}),
    "gpt-oss-20b": ({4: 1.8, 8: 2.5, 16: 3.1, 32: 3.4, 64: 3.4}, {8: 1.3, 16: 2.0, 24: 2.7}),
}


@pytest.mark.parametrize("name", PRINTED)
def test_the_reference_is_read_off_the_config(name):
    advice = advise(name, "H200")
    by_rows, by_budget = PRINTED[name]
    rows = {row.num_rows: row.break_even_most for row in advice.sizes}
    budgets = {row.budget: row.break_even for row in advice.budgets}
    for found, printed in ((rows, by_rows), (budgets, by_budget)):
        for key, break_even in printed.items():
            assert found[key] == pytest.approx(break_even, abs=0.07)  # printed with one digit, norms left out
    assert all(row.break_even <= row.break_even_most + 1e-9 <= row.with_drafting + 9 for row in advice.sizes)
    assert (advice.verdict, advice.lossless, advice.acceptance_source) == (UNKNOWN, None, None)
    assert "No verdict without an acceptance" in advice.headline


def test_published_speculation_on_qwen_loses_and_wins_under_a_budget():
    """SpecForge #339: 3.2 tokens of 60 drafts lose; B = 32 needs about 2.8, and drafting."""
    lost = advise("qwen3-30b-a3b", "H200", accepted="3.2@61")
    assert lost.verdict == DO_NOT and "only a measurement could rule it in" in lost.headline
    assert lost.lossless.break_even < 2  # the least bad is a tree of a few rows
    good = advise("Qwen3-30B-A3B", "H200", accepted="5@64", least_budget=32)
    assert good.verdict == SPECULATE
    assert good.budgeted.budget == 32 and good.budgeted.break_even == pytest.approx(2.8 + 0.3, abs=0.05)
    assert good.budgeted.speedup > good.lossless.speedup
    default = advise("Qwen3-30B-A3B", "H200", accepted="5@64")
    assert default.least_budget == 64 and default.budgeted.budget in (64, 96)


def steps_on_an_h200():
    """(model, arm) of whole steps with random weights and recorded routing, and of the embedded pair."""
    records = [json.loads((ROOT / "assets" / "bench" / f"{name}.json").read_text()) for name in H200_RECORDS]
    runs = [*records[0], records[1]]
    return [(run["models"][0]["model"], arm) for run in runs for arm in run["models"][0]["arms"]]


@pytest.mark.parametrize(
    ("name", "arm"), steps_on_an_h200(), ids=lambda part: part if isinstance(part, str) else part["name"]
)
def test_this_engines_steps_on_an_h200_are_as_they_were_measured(name, arm):
    """In ms, and in plain steps, which is what decides."""
    target = EMBEDDED_TARGET if name == "embedded" else name
    described = describe_target(target, None, "bfloat16", on_cpu=False, context=0)
    draft = DraftShape.eagle3(described.shape.hidden_size, described.vocab_size, 2)
    costs = ModelledCosts(described.shape, find_device("H200"), draft, 0, lambda num_rows: arm["experts_active"])
    engine, (num_rows, depth, *_) = with_engine(costs), arm["tree"]
    found_ms = engine.predict_ms(num_rows, None, depth if num_rows > 1 else 0)
    assert found_ms == pytest.approx(arm["step_ms"], rel=0.085)
    plain_ms = replace(engine, union=lambda num_rows: 8.0).plain_ms
    assert found_ms / plain_ms == pytest.approx(arm["break_even_tokens"], rel=0.115)


def test_beside_the_bytes_a_larger_tree_costs_less_of_a_plain_step():
    on_card = advise("Qwen3-30B-A3B", "H200", accepted="3.2@61")
    typed = advise("Qwen3-30B-A3B", device_of_bandwidth(4800), accepted="3.2@61")
    for row in on_card.sizes[1:]:
        assert 1 < row.in_engine < row.with_drafting
    assert all(1 < row.in_engine < on_card.sizes[-1].in_engine for row in on_card.budgets[:-1])
    judgement = on_card.in_engine.judgement
    assert judgement.verdict == SPECULATE and judgement.lossless.speedup > on_card.lossless.speedup
    assert typed.in_engine is None and all(row.in_engine is None for row in (*typed.sizes, *typed.budgets))
    assert advise("OLMoE-1B-7B", SLOW_CPU).in_engine is None


def test_an_overhead_that_may_be_less_or_more_widens_the_bounds_on_its_own_side():
    target, unions = describe_target("Qwen3-30B-A3B", None, "auto", on_cpu=False, context=0), Unions(128, 8, "", {})
    costs = ModelledCosts(target.shape, find_device("H200"), DraftShape(1e8, 1e8), 0, unions.expected)

    def in_plain_steps(some):
        return some.predict_ms(16, 32, 4) / some.plain_ms

    worst, best = modelled_bounds(with_engine(costs), unions).bounds[-1]
    assert in_plain_steps(worst) > in_plain_steps(with_engine(costs)) > in_plain_steps(best)
    assert len(modelled_bounds(costs, unions).bounds) == len(modelled_bounds(with_engine(costs), unions).bounds) - 1


@pytest.mark.parametrize(("card", "runs"), [("H200", True), ("RTX-4090", True), ("T4", False), ("MI300X", False)])
def test_of_this_engine_is_told_where_its_kernels_run(card, runs):
    advice = advise("OLMoE-1B-7B", card, acceptance="0.8")
    assert (advice.in_engine is not None) == runs == any("This engine takes" in note for note in advice.notes)
    assert ("assumed" in " ".join(advice.notes)) == (runs and card != "H200")
    assert len(advice.headlines) == 1 + runs


def test_a_ratio_does_not_depend_on_the_bandwidth_and_milliseconds_do():
    fast, slow = (advise("OLMoE-1B-7B", device_of_bandwidth(gb), acceptance="0.8") for gb in (2000, 500))
    assert slow.plain_ms == pytest.approx(4 * fast.plain_ms) and slow.plain_bytes == fast.plain_bytes
    assert slow.lossless.speedup == pytest.approx(fast.lossless.speedup)
    assert fast.plain_ms == pytest.approx(2.36e9 / 2e12 * 1e3, rel=0.01)


def test_look_up_drafts_for_nothing():
    head, look_up = (advise("OLMoE-1B-7B", "H100", accepted="2.5", drafter=drafter) for drafter in ("auto", "ngram"))
    assert look_up.lossless.speedup > head.lossless.speedup
    assert all(row.with_drafting == row.break_even for row in look_up.sizes)
    assert any("EAGLE-3" in note for note in head.notes) and not any("EAGLE-3" in note for note in look_up.notes)


def test_a_context_is_read_by_every_step():
    without, with_context = (advise("Mixtral-8x7B", "H100", context=context) for context in (0, 10_000))
    cached = 10_000 * 32 * 2 * 8 * 128 * 2
    assert with_context.model["kv_bytes"] == cached == with_context.plain_bytes - without.plain_bytes
    assert with_context.sizes[-1].break_even < without.sizes[-1].break_even  # what all steps read makes them alike


def test_what_fits_is_said():
    notes = {name: " ".join(advise("Mixtral-8x7B", name).notes) for name in ("H100", "H200")}
    assert "93.4 GB and do not fit into 80 GB" in notes["H100"]
    assert "93.4 GB and fit into 141 GB" in notes["H200"]
    assert "GB and" not in " ".join(advise("Mixtral-8x7B", device_of_bandwidth(100)).notes)


def test_weights_are_counted_as_they_will_be_loaded():
    on_gpu, on_cpu = advise("OLMoE-1B-7B", "H100"), advise("OLMoE-1B-7B", SLOW_CPU)
    assert on_cpu.plain_bytes == pytest.approx(2 * on_gpu.plain_bytes, rel=1e-6)
    assert advise("OLMoE-1B-7B", SLOW_CPU, dtype="bfloat16").plain_bytes == on_gpu.plain_bytes
    assert advise("gpt-oss-20b", "H100").plain_bytes < advise("gpt-oss-20b", "H100", dtype="bfloat16").plain_bytes / 1.9


def test_the_embedded_pair_is_advised_by_its_record():
    record, advice = read_record(), advise(device=SLOW_CPU)
    assert advice.acceptance_source == record["acceptance"]["source"] and "measured" in advice.unions_source
    unions = {row["num_rows"]: row["union"] for row in record["unions"]}
    for row in advice.sizes[1:]:
        assert row.experts == pytest.approx(unions[row.num_rows], rel=1e-6)
    assert advice.verdict == SPECULATE and advice.model["shape"]["name"] == "embedded model"
    typed = advise(device=SLOW_CPU, acceptance="0.1")
    assert typed.acceptance_source.startswith("typed in") and typed.verdict == DO_NOT


def test_another_drafter_of_the_embedded_model_has_no_record():
    own = EMBEDDED_TARGET.parent / "drafter"
    assert advise(device=SLOW_CPU, drafter=str(own)).acceptance_source == advise(device=SLOW_CPU).acceptance_source
    assert advise(device=SLOW_CPU, drafter="ngram").acceptance_source is None


def test_a_target_may_be_a_directory_or_a_config_file(tmp_path):
    config = json.loads((EMBEDDED_TARGET / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config))
    own = advise(EMBEDDED_TARGET, SLOW_CPU)
    for target in (tmp_path, tmp_path / "config.json", str(tmp_path)):
        found = advise(target, SLOW_CPU)
        assert found.sizes == own.sizes and found.model["shape"]["name"] == tmp_path.name


def test_an_advice_is_plain_data():
    values = advise("gpt-oss-20b", "H200", acceptance="0.8", context=100).to_json()
    assert json.loads(json.dumps(values)) == values
    assert values["headline"].count(".\n") == 0 and values["headline"].endswith(".")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"target": "no-such"}, "target no-such is no directory"),
        ({"target": "/no/such"}, "target /no/such is no directory"),
        ({"target": "Mixtral-8x7B", "device": "H900"}, "device='H900' is not known: use auto, cpu, cuda, A10"),
        ({"target": "Mixtral-8x7B", "acceptance": "0.8", "accepted": "3"}, "exclude each other"),
        ({"target": "Mixtral-8x7B", "acceptance": "two"}, "acceptance='two' is not a list of rates"),
        ({"target": "Mixtral-8x7B", "accepted": "99"}, "accepted='99' is not allowed"),
        ({"target": "Mixtral-8x7B", "least_budget": 1}, "least_budget=1 is outside 2 to 8"),
        ({"target": "Mixtral-8x7B", "least_budget": 9}, "least_budget=9 is outside 2 to 8"),
        ({"target": "Mixtral-8x7B", "context": -1}, "context=-1 is not allowed"),
        ({"target": "Mixtral-8x7B", "dtype": "int3"}, "dtype='int3' is not one of auto"),
    ],
)
def test_what_cannot_be_advised_on_is_a_sentence(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        advise(**{"device": "H100", **arguments})


@pytest.mark.parametrize("text", ["{", "[]", '{"model_type": "no-such"}', '{"hidden_size": 3}'])
def test_a_broken_config_is_a_sentence(text, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(text)
    for target in (path, tmp_path):
        with pytest.raises(ValueError, match=r"could not be loaded: "):
            advise(target, "H100")


def test_a_model_without_experts_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama", "num_hidden_layers": 1}')
    with pytest.raises(ValueError, match="has no experts"):
        advise(tmp_path, "H100")


def test_known_devices_are_found_in_any_case():
    assert find_device("h200").bytes_per_s == 4.8e12 and find_device("H200").name == "H200"
    assert all(find_device(name).bytes_per_s > 1e11 and find_device(name).memory_bytes > 1e10 for name in DEVICE_NAMES)
    here = find_device("cpu")
    assert (here.source, here.kind, here.bytes_per_s) == ("measured", "cpu", 30e9)
    with pytest.raises(ValueError, match="bandwidth=0 is not allowed"):
        device_of_bandwidth(0)


def test_this_machines_arithmetic_is_timed(monkeypatch):
    monkeypatch.undo()
    assert 1e8 < devices._flops_per_s(devices.torch.device("cpu")) < 1e15


def test_the_command_prints_text_or_json(capsys):
    assert main(["advise", "--target", "Qwen3-30B-A3B", "--device", "H200", "--accepted", "3.2"]) == 0
    text = capsys.readouterr().out
    reading, engine = text.splitlines()[-2:]
    assert "| 64 | 80.5 (125.9) |" in text and reading.startswith("Where reading is all: Do not speculate")
    assert engine.startswith("In this engine: Speculate") and "ms, in this engine" in text
    assert text.count("modelled") >= 4 and "datasheet" in text and "typed in" in text
    assert main(["advise", "--target", "Qwen3-30B-A3B", "--bandwidth", "4800", "--accepted", "3.2", "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert set(values) == {"modelled"} and values["modelled"]["in_engine"] is None
    assert reading.endswith(values["modelled"]["headline"])


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--target", "no-such"], "target no-such"),
        (["--device", "H900"], "device='H900'"),
        (["--bandwidth", "-3"], "bandwidth=-3.0"),
        (["--measure", "--device", "H100"], "device='H100' is not here to be measured"),
        (["--measure", "--bandwidth", "100"], "bandwidth=100.0 and --measure exclude each other"),
        (["--measure", "--drafter", "none"], "drafter='none' drafts nothing"),
        (["--measure", "--limit", "0"], "limit=0 is not allowed"),
        (["--threads", "0"], "threads=0 is not allowed"),
    ],
)
def test_the_command_refuses_in_a_sentence(arguments, sentence, capsys):
    assert main(["advise", *arguments]) == 2
    assert sentence in capsys.readouterr().err


def test_every_published_name_is_advised_on():
    assert all(advise(name, "H200").model["shape"]["name"] == name for name in PUBLISHED)


def test_a_model_known_by_its_sizes_alone_is_advised_on():
    shape = WORKED_SHAPES["Mixtral-8x7B"]
    target = AdvisedTarget(shape, weights_bytes=90 * 10**9, kv_bytes=10**9, vocab_size=32_000, bytes_per_weight=2)
    advice = advise(target, device_of_bandwidth(1000), acceptance="0.8,0.7,0.6")
    assert advice.plain_bytes == step_bytes(shape, shape.top_k, 10**9)
    by_name = advise("Mixtral-8x7B", device_of_bandwidth(1000), acceptance="0.8,0.7,0.6")
    assert advice.unions_source == by_name.unions_source
    assert advice.budgeted is not None and by_name.budgeted is not None
    assert (advice.budgeted.tree, advice.budgeted.budget) == (by_name.budgeted.tree, by_name.budgeted.budget)
