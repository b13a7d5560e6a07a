"""Compiled ahead of time: what the record says of every kernel, and one layer compiled here, for each card.

No GPU is asked: the compiler and the assembler of Triton's wheel are.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

from kernels.aot import CARDS, MOST_EXPERTS, Compiled, read
from kernels.experts import tiles_for, works_for
from kernels.shapes import FORMATS, LAYERS
from kernels.tiles import ROW_BUCKETS, Tile

ROOT = Path(__file__).resolve().parents[2]
RECORD = read(ROOT / "assets" / "bench" / "kernels-aot.json")
EXPERTS = [kernel for kernel in RECORD if kernel.tile is not None]


def is_gate_up(kernel: Compiled) -> bool:
    return kernel.kernel.startswith("gate_up")


def test_the_record_has_every_case():
    """Two kernels with weights for each layer, format and bucket that a card runs."""
    expected = {
        (capability, name, number_format, rows): 2
        for capability in CARDS
        for name, layer in LAYERS.items()
        for number_format in FORMATS
        for rows in ROW_BUCKETS
        if layer.has_format(number_format) and (capability >= 89 or "fp8" not in number_format)
    }
    assert Counter((each.capability, each.layer, each.format, each.rows) for each in EXPERTS) == expected
    routing = Counter((each.capability, each.kernel) for each in RECORD if each.tile is None)
    assert all(routing[capability, "select"] == routing[capability, "group"] == 15 for capability in CARDS)


def test_expert_kernels_keep_to_registers_and_load_16_bytes_at_a_time():
    """Blackwell's assembler spills up to four numbers of two kernels whose weights are bytes."""
    for each in EXPERTS:
        assert each.spill_stores <= (0 if each.format == "bf16" else 16), each
        assert each.narrowest_load == 16, each


def test_the_method_spills_next_to_nothing():
    """Bytes of a thread: up to 88 where 64 rows choose among the most experts; else one number at most."""
    for each in RECORD:
        if each.tile is None:
            assert each.spill_stores <= (96 if (each.layer, each.rows) == (MOST_EXPERTS, 64) else 4), each


def test_matrix_units_do_the_products():
    for each in EXPERTS:
        assert "m16n8k16 bf16" in each.products
        assert ("wgmma m64" in each.products) == (each.capability == 90 and each.rows == 64)


def test_tiles_are_todays_and_their_memory_is_not_underrated():
    """What `Tile.shared_bytes` says, and a card allows, is at least what the compiler took."""
    weights = {
        (name, number_format): layer.random_weights(number_format, torch.device("meta"), seed=None)
        for name, layer in LAYERS.items()
        for number_format in FORMATS
        if layer.has_format(number_format)
    }
    for each in EXPERTS:
        layer = LAYERS[each.layer]
        x_TD = torch.empty(each.rows, layer.hidden_size, dtype=torch.bfloat16, device="meta")
        arguments = x_TD, layer.top_k, weights[each.layer, each.format]
        which = 0 if is_gate_up(each) else 1
        tile = tiles_for(*arguments, CARDS[each.capability])[which]
        assert tile == Tile(*each.tile, each.num_warps, each.num_stages)
        assert (
            each.shared_bytes <= tile.shared_bytes(works_for(*arguments)[which]) <= CARDS[each.capability].shared_bytes
        )
    assert all(each.shared_bytes <= CARDS[each.capability].shared_bytes for each in RECORD)


@pytest.mark.parametrize("capability", CARDS)
def test_a_layer_compiles_here(capability, tmp_path):
    """In a process of its own, without the interpreter, from nothing."""
    record = tmp_path / "aot.json"
    command = [sys.executable, "-m", "kernels.aot", "--json", str(record), "--capabilities", str(capability)]
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path / "cache")}
    environment.pop("TRITON_INTERPRET", None)
    case = ["--layers", "Qwen3-30B-A3B", "--formats", "bf16", "--rows", "16"]
    subprocess.run([*command, *case], cwd=ROOT, env=environment, check=True, capture_output=True)
    compiled = {each.kernel: each for each in read(record)}
    assert compiled.keys() == {"select", "group", "rotate", "keep_rows", "gate_up", "down", "combine"}
    assert all(each.spill_stores == each.spill_loads == 0 for each in compiled.values())
    assert all(compiled[name].narrowest_load == 16 and compiled[name].products for name in ("gate_up", "down"))
