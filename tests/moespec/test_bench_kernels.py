"""The layer benchmark on the CPU: its plans, its arithmetic on made-up times, its record, what it refuses."""

from __future__ import annotations

import json

import pytest
import torch

from moespec.bench import layer_times, layers, machine
from moespec.bench.layer_contestants import Contest, cpu_contest
from moespec.bench.layer_times import relative_error
from moespec.bench.layers import EMBEDDED, LayerShape, build_layers, find_shape
from moespec.bench.machine import Timing
from moespec.bench.roofline import contestant_record, fit_table, fits, layer_table, target_lines, targets
from moespec.bench.routings import BUDGETS, ROWS, Case, cases, random_plan, random_rows, route
from moespec.cli import main
from moespec.cost import WORKED_SHAPES
from moespec.hf import AutoConfig

CPU = torch.device("cpu")
CEILINGS = {"read_bytes_per_s": 4e12, "copy_bytes_per_s": 2e12}


@pytest.fixture(scope="module")
def tiny_shape():
    sizes = {"moe_intermediate_size": 16, "num_experts": 12, "num_experts_per_tok": 3, "norm_topk_prob": True}
    return LayerShape.of("tiny", AutoConfig.for_model("qwen3_moe", hidden_size=64, **sizes), 2)


@pytest.fixture
def quick(monkeypatch):
    """A small cache asks for few layers, one round for little time."""
    monkeypatch.setattr(layers, "cache_bytes", lambda device: 1 << 20)
    monkeypatch.setattr(machine, "CPU_BUFFER_BYTES", 4 << 20)
    monkeypatch.setattr(machine, "NUM_WARMUP_ROUNDS", 0)
    monkeypatch.setattr(layer_times, "CPU_ROUNDS", 1)


def cell(num_rows, budget, active, median_us, error=1e-3, **others):
    """A cell of the record: the layer's time, and others' by name, all without spread."""
    times = {"layer": median_us, "experts": median_us - 5} | {
        name.replace("_plus_", " + "): us for name, us in others.items()
    }
    contestants = {
        name: contestant_record(Timing(us, us, us), "graph", 48, None if name == "select" else 9e6 * active, CEILINGS)
        for name, us in times.items()
    }
    return {
        "num_rows": num_rows,
        "budget": budget,
        "experts_active": active,
        "active_bytes": round(9e6 * active),
        "error": error,
        "contestants": contestants,
    }


@pytest.mark.parametrize("case", [Case(1, None), Case(2, 4), Case(5, 4), Case(20, 11), Case(8, None)], ids=str)
def test_a_plan_uses_exactly_the_experts_of_its_case(case, tiny_shape):
    generator = torch.Generator().manual_seed(1)
    for _ in range(20):
        ids_TK = random_plan(case, tiny_shape, generator)
        assert ids_TK.shape == (case.num_rows, 3) and all(len(set(row)) == 3 for row in ids_TK.tolist())
        num_active = ids_TK.unique().numel()
        # Two rows may happen to need fewer than the budget: then it drops nobody.
        assert num_active == case.budget or ((case.budget is None or case.num_rows == 2) and num_active <= 12)


def test_every_case_that_a_budget_can_matter_in():
    qwen = find_shape("Qwen3-30B-A3B")
    found = cases(qwen, ROWS, BUDGETS)
    assert Case(1, None) in found and Case(1, 8) not in found, "a single row is never budgeted"
    assert Case(2, 12) in found and Case(2, 16) not in found, "two rows of 8 use 16 at most"
    assert [case.budget for case in found if case.num_rows == 64] == list(BUDGETS)
    assert len(found) == len(set(found)) == 48
    assert cases(find_shape("Mixtral-8x7B"), (64,), (1, 4, 8)) == [Case(64, 4), Case(64, None)]


@pytest.mark.parametrize("budget", [None, 5])
def test_the_cpu_layer_is_transformers_own_and_reads_what_the_plan_says(tiny_shape, budget):
    built = build_layers(tiny_shape, "float32", CPU, for_kernels=False, num_layers=2)
    x_TD = random_rows(built, 6, CPU)
    case = Case(6, budget)
    contest = cpu_contest(built, case, route(built, case, x_TD), x_TD)
    assert contest.num_active == (budget or contest.num_active) and relative_error(contest) < 1e-5
    golden_TD = contest.golden()
    for name, calls in contest.calls.items():
        assert len(calls) == 2
        if name != "select":
            assert (calls[0]() - golden_TD).norm() < 1e-5 * golden_TD.norm(), name
    assert built.expert_bytes == 3 * 64 * 16 * 4


def test_shapes_are_those_that_floors_are_quoted_for():
    for name, worked in WORKED_SHAPES.items():
        shape = find_shape(name)
        assert (shape.num_layers, shape.num_experts, shape.top_k, shape.hidden_size) == (
            worked.num_moe_layers, worked.num_experts, worked.top_k, worked.hidden_size
        )  # fmt: skip
    assert find_shape(EMBEDDED).num_experts == 64


def test_as_many_layers_as_the_cache_asks_for_and_memory_allows(monkeypatch, tiny_shape):
    monkeypatch.setattr(layers, "cache_bytes", lambda device: 100_000)
    layer_bytes = 12 * 3 * 64 * 16 * 4
    # A row reads 3 of 12 experts, 36,864 bytes: 11 layers make four caches.
    assert len(build_layers(tiny_shape, "float32", CPU, False).layers) == 11
    monkeypatch.setattr(layers, "_memory_bytes", lambda float_bytes, device: 5 * layer_bytes)
    assert len(build_layers(tiny_shape, "float32", CPU, False).layers) == 5
    monkeypatch.setattr(layers, "_memory_bytes", lambda float_bytes, device: layer_bytes)
    with pytest.raises(ValueError, match="tiny in float32 does not fit this machine"):
        build_layers(tiny_shape, "float32", CPU, False)


def test_shares_are_bytes_over_bandwidth_over_time():
    record = contestant_record(Timing(100.0, 90.0, 110.0), "graph", 48, 2e8, CEILINGS)
    assert (record["share_of_read"], record["share_of_copy"]) == (0.5, 1.0)
    assert record["p20_us"] == 90 and "share_of_read" not in contestant_record(
        Timing(1, 1, 1), "graph", 1, None, CEILINGS
    )


def test_a_line_through_times_has_the_cost_of_an_expert_as_its_slope():
    cells = [cell(8, budget, budget, 10 + 3 * budget) for budget in (8, 16, 32)] + [cell(1, None, 8, 30.0)]
    fit, without_routing = fits(cells, 9_000_000, 4e12)
    assert (fit.contestant, fit.num_rows, fit.num_points, fit.intercept_us, fit.slope_us) == ("layer", 8, 3, 10, 3)
    assert (without_routing.contestant, without_routing.intercept_us, without_routing.slope_us) == ("experts", 5, 3)
    assert fit.slope_of_floor == pytest.approx(3 / 2.25, abs=1e-3) and fit.worst_deviation == 0
    bent = [cell(8, budget, budget, us) for budget, us in ((8, 10.0), (16, 40.0), (24, 10.0))]
    assert fits(bent, 9_000_000, 4e12)[0].worst_deviation == 1.0
    assert fits(cells[:2], 9_000_000, 4e12) == [], "two points are always on a line"


def test_targets_are_met_missed_or_not_measured():
    """9 MB an expert at 4 TB/s are 2.25 us."""
    cells = [
        cell(8, 16, 16, 45.0, router_plus_grouped_mm=100.0),
        cell(32, 32, 32, 100.0, router_plus_grouped_mm=180.0),  # a quarter of the experts asks for twice as fast
        cell(64, 32, 32, 80.0, error=0.1, router_plus_grouped_mm=300.0),  # fast, and wrong
        cell(64, None, 128, 300.0, select=9.5, router_plus_grouped_mm=310.0),
    ]
    found = targets(cells, 128)
    passed = {(one.what, one.num_rows, one.budget): one.passed for one in found}
    share, times = "share of the read bandwidth", "times as fast as router + grouped_mm"
    assert passed == {
        (share, 1, None): None, (times, 1, None): None,
        (share, 8, 16): True, (times, 8, 16): True,
        (share, 32, 32): False, (times, 32, 32): False,
        (share, 64, 32): False, (times, 64, 32): False,
        (share, 64, None): True, (times, 64, None): True,
        ("select at its slowest budget, microseconds", 64, None): False,
    }  # fmt: skip
    lines = target_lines([vars(one) for one in found]).splitlines()
    assert [line.split(":")[0] for line in lines].count("- MISSED") == 5


def test_tables_show_every_cell_and_mark_the_plain_clock():
    plain = cell(2, 8, 8, 20.0)
    plain["contestants"]["eager"] = {**plain["contestants"]["layer"], "clock": "plain"}
    failed = {"num_rows": 4, "budget": None, "failed": "out of memory", "contestants": {}, "error": None}
    shape = {"name": "some", "dtype": "bfloat16", "cells": [plain, failed], "fits": [vars(fits(
        [cell(8, budget, budget, 10.0 + budget) for budget in (8, 16, 32)], 9_000_000, 4e12)[0])]}  # fmt: skip
    lines = layer_table([shape]).splitlines()
    assert len(lines) == 3 and "20.0*" in lines[2] and lines[2].count("|") == lines[0].count("|") == lines[1].count("|")
    table = fit_table([shape])
    assert "| some | bfloat16 | layer | 8 | 10.0 | 1.00 | 0.44 | 0 % |" in table
    assert len({line.count("|") for line in table.splitlines()}) == 1  # as many cells as columns


def test_the_record_is_the_last_line(quick, capsys):
    arguments = ["--rows", "1", "4", "--budgets", "8", "12", "none", "--note", "nothing else ran", "--json"]
    assert main(["bench", "kernels", *arguments]) == 0
    captured = capsys.readouterr()
    record = json.loads(captured.out.splitlines()[-1])
    (shape,) = record["shapes"]
    assert all(found["read_bytes_per_s"] > 0 for found in (record["device"]["ceilings"], record["ceilings_after"]))
    assert record["note"] == "nothing else ran"
    assert (shape["name"], shape["dtype"], shape["num_layers_of_model"]) == (EMBEDDED, "float32", 8)
    assert [(one["num_rows"], one["budget"]) for one in shape["cells"]] == [(1, None), (4, 8), (4, 12), (4, None)]
    for one in shape["cells"]:
        assert "failed" not in one and one["error"] < 1e-5
        assert set(one["contestants"]) == {"layer", "experts", "select", "grouped_mm", "batched_mm", "eager"}
        assert one["active_bytes"] == round(one["experts_active"] * shape["expert_bytes"])
    assert [(fit["contestant"], fit["num_rows"]) for fit in shape["fits"]] == [("layer", 4), ("experts", 4)] and shape[
        "not_reached"
    ] == []
    assert record["targets"]["list"] == [] and not record["targets"]["is_that_card"]
    assert captured.err.splitlines()[0].startswith('{"device": "cpu"'), "the card is shown first"


def test_a_table_and_a_time_limit(quick, capsys):
    assert main(["bench", "kernels", "--rows", "2", "--seconds-limit", "0.001"]) == 0
    assert "layer µs (p20–p80)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--sweep"], "needs a CUDA device"),
        (["--rows", "65"], "rows=65 is not allowed"),
        (["--budgets", "0"], "budget=0 is not allowed"),
        (["--seconds-limit", "0"], "seconds-limit=0.0 is not allowed"),
        (["--threads", "0"], "threads=0 is not allowed"),
        (["--device", "tpu"], "device='tpu' cannot be used here"),
        (["--dtype", "int4"], "dtype int4 needs a CUDA device"),
        (["--rows", "8", "--budgets", "4"], "leave nothing to measure"),
    ],
)
def test_what_cannot_be_measured_is_one_sentence(arguments, sentence, quick, capsys):
    assert main(["bench", "kernels", *arguments]) == 2
    error = capsys.readouterr().err
    assert sentence in error.splitlines()[-1] and error.splitlines()[-1].startswith("error: ")


def test_a_shape_too_large_for_the_machine_is_refused_by_name(quick, monkeypatch, capsys):
    monkeypatch.setattr(layers, "_memory_bytes", lambda float_bytes, device: 1 << 30)
    assert main(["bench", "kernels", "--shapes", "Mixtral-8x7B"]) == 2
    assert "Mixtral-8x7B in float32 does not fit this machine: a layer takes 5.6 GB" in capsys.readouterr().err


def test_on_cuda_what_waits_for_the_device_is_timed_by_the_clock_on_the_wall(monkeypatch):
    """The device is played: a call that asks for its answer fails while that is forbidden."""
    mode, ended = ["default"], []

    def waits():
        if mode[-1] == "error":
            raise RuntimeError("called a synchronizing CUDA operation")

    def clocked(contestants, device, num_rounds):
        for calls in contestants.values():
            calls[0]()
        return {name: Timing(1.0, 1.0, 1.0) for name in contestants}

    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", mode.append)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: ended.append(True))
    monkeypatch.setattr(layer_times, "time_in_rotation", clocked)
    monkeypatch.setattr(layers, "cache_bytes", lambda device: 1)
    contest = Contest({"layer": [int] * 9, "batched_mm": [int] * 9, "router + eager": [waits] * 9}, 8.0, torch.ones, {})
    found = layer_times.time_contest(contest, 1e6, torch.device("cuda"))
    assert {name: (clock, num_calls) for name, (_, clock, num_calls) in found.items()} == {
        "layer": ("graph", 9), "batched_mm": ("graph", 4), "router + eager": ("plain", 4)
    }  # fmt: skip
    assert mode[-1] == "default" and len(ended) == 1
