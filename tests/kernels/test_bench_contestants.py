"""The layer benchmark's contestants under Triton's interpreter: all compute the same, all bytes are counted.

Times mean nothing here; what a GPU would time is run.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch

from kernels import tiles
from kernels.tiles import Card, Tile, Work
from moespec.bench import kernels, layer_times, machine, sweep
from moespec.bench.kernels import Bench, Settings
from moespec.bench.layer_contestants import IMPLEMENTATIONS, ROUTER, kernel_contest
from moespec.bench.layers import Layers, LayerShape, build_layers
from moespec.bench.load_only import load_only, word_parts
from moespec.bench.machine import machine_card
from moespec.bench.routings import Case, random_rows, route
from moespec.hf import AutoConfig

CPU = torch.device("cpu")
H100 = Card("NVIDIA H100 80GB HBM3", 132, 232_448)
NUM_EXPERTS, TOP_K, SIZE = 12, 3, 128  # one int4 group, one fp8 block; not a power of two of experts
CONFIGS: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"moe_intermediate_size": SIZE, "num_experts": NUM_EXPERTS, "norm_topk_prob": True},
    "olmoe": {"intermediate_size": SIZE, "num_experts": NUM_EXPERTS},
    "gpt_oss": {"intermediate_size": SIZE, "num_local_experts": NUM_EXPERTS},  # transposed, in turns, with biases
}
TRANSFORMERS = {*IMPLEMENTATIONS, *(ROUTER + name for name in IMPLEMENTATIONS)}


@pytest.fixture
def one_round(monkeypatch):
    """Nobody reads these times."""
    monkeypatch.setattr(machine, "NUM_WARMUP_ROUNDS", 0)
    monkeypatch.setattr(layer_times, "CPU_ROUNDS", 1)
    monkeypatch.setattr(sweep, "NUM_ROUNDS", 1)


def tiny_layers(model_type: str, dtype_name: str, num_layers: int = 2) -> Layers:
    config = AutoConfig.for_model(model_type, hidden_size=SIZE, num_experts_per_tok=TOP_K, **CONFIGS[model_type])
    return build_layers(LayerShape.of(model_type, config, 2), dtype_name, CPU, True, num_layers)


def contest_of(layers: Layers, case: Case):
    x_TD = random_rows(layers, case.num_rows, CPU)
    return kernel_contest(layers, case, route(layers, case, x_TD), x_TD)


@pytest.mark.parametrize("case", [Case(1, None), Case(5, 4), Case(5, None)], ids=["one row", "budget", "no budget"])
@pytest.mark.parametrize("model_type", CONFIGS)
def test_contestants_compute_the_same_layer(model_type, case):
    contest = contest_of(tiny_layers(model_type, "float32"), case)
    golden_TD = contest.golden()
    outputs = {name: calls[0]() for name, calls in contest.calls.items() if name not in ("select", "load-only")}
    assert set(outputs) == {"layer", "experts", *TRANSFORMERS}
    for name, output_TD in outputs.items():
        assert (output_TD - golden_TD).norm() < 1e-5 * golden_TD.norm(), name
    assert contest.num_active == (case.budget or contest.num_active) and contest.num_active >= TOP_K


@pytest.mark.parametrize(("dtype_name", "bits"), [("int8", 8), ("fp8", 8), ("int4", 4)])
def test_number_formats_run_without_transformers(dtype_name, bits):
    layers = tiny_layers("qwen3_moe", dtype_name)
    contest = contest_of(layers, Case(4, 5))
    output_TD, golden_TD = contest.calls["layer"][0](), contest.golden()
    assert (output_TD - golden_TD).norm() < 2e-2 * golden_TD.norm()
    assert set(contest.skipped) == set(IMPLEMENTATIONS) and not TRANSFORMERS & set(contest.calls)
    values_bytes = 3 * SIZE * SIZE * bits // 8
    assert values_bytes < layers.expert_bytes < 1.1 * values_bytes, "scales cost little"


@pytest.mark.parametrize(("model_type", "dtype_name"), [("gpt_oss", "bfloat16"), ("qwen3_moe", "int4")])
def test_load_only_reads_every_byte_of_the_listed_experts(model_type, dtype_name):
    layers = tiny_layers(model_type, dtype_name, 1)
    weights = layers.layers[0].weights
    assert weights is not None
    experts_A = torch.tensor([1, 7, 11, -1, -1], dtype=torch.int32)
    parts = word_parts(weights)
    assert sum(words_EW[0].nbytes for words_EW in parts) == layers.expert_bytes
    for words_EW, found_AC in zip(parts, load_only(weights, experts_A), strict=True):
        wanted_A = np.bitwise_xor.reduce(words_EW[experts_A[:3].long()].numpy(), axis=1)
        assert np.array_equal(wanted_A, np.bitwise_xor.reduce(found_AC[:3].numpy(), axis=1))


def test_a_cell_of_the_record_on_kernels(monkeypatch, one_round):
    """What CUDA runs, with the clock that the interpreter has."""
    monkeypatch.setattr(kernels, "cpu_contest", kernel_contest)
    layers = tiny_layers("qwen3_moe", "float32")
    bench = Bench(Settings(), CPU, machine_card(CPU, 4 << 20), None)
    cell = kernels._cell(layers, Case(2, 4), bench)
    assert "failed" not in cell and json.loads(json.dumps(cell)) == cell
    assert cell["experts_active"] == 4 and cell["active_bytes"] == 4 * layers.expert_bytes and cell["error"] < 1e-5
    assert set(cell["contestants"]) == {"layer", "experts", "select", "load-only", *TRANSFORMERS}
    assert "share_of_read" in cell["contestants"]["layer"] and "share_of_read" not in cell["contestants"]["select"]


def test_a_sweep_finds_tiles_that_launches_then_use(monkeypatch, one_round, tmp_path):
    """Two tiles of either kind stand for the grid."""
    path = tmp_path / "tiles.json"
    path.write_text("[]\n")
    monkeypatch.setattr(sweep, "ROW_BUCKETS", (16, 32))
    few = {"columns": (16, 32), "depth": (64,), "num_warps": (4,), "num_stages": (2,)}
    monkeypatch.setattr(sweep, "GRID", few)
    layers = tiny_layers("qwen3_moe", "float32", 1)
    lines: list[str] = []
    entries = sweep.sweep(layers, CPU, lines.append, lambda: False)
    assert [(entry["kernel"], entry["bucket"]) for entry in entries] == [
        ("gate_up", 16), ("down", 16), ("gate_up", 32), ("down", 32)
    ]  # fmt: skip
    assert len(lines) == 4 and all(entry["num_tried"] == 3 for entry in entries)
    assert all(entry["median_us"] <= entry["formula_us"] for entry in entries), (
        "the formula's tile is one of those tried"
    )
    sweep.write_tiles(entries, path)
    sweep.write_tiles(entries[:1], path)  # written again: in the old one's place
    table = tiles.measured_tiles(path)
    assert len(table) == 4 and Tile(**entries[0]["tile"]) in table.values()
    assert sweep.sweep(layers, CPU, lines.append, lambda: True) == [], "no time, no entries"


def test_the_grid_keeps_to_the_card_and_to_what_a_scale_spans():
    work = Work("gate_up", 1536, 2048, 128, 64, 2)
    tried = sweep.tiles_to_try(work, H100)
    assert tried[0] == tiles.fitting(tiles.formula_tile(work, H100), work, H100)
    assert 24 <= len(tried) <= 49 and len(set(tried)) == len(tried)
    assert all(tiles.fitting(tile, work, H100) == tile for tile in tried)
    in_blocks = sweep.tiles_to_try(Work("down", 2048, 768, 128, 16, 1, scale_columns=128), H100)
    assert {tile.depth for tile in in_blocks} == {128}
    in_groups = sweep.tiles_to_try(Work("down", 2048, 768, 8, 1, 0.5), H100)
    assert {tile.depth for tile in in_groups} == {128}, "int4 goes by groups of 128"
