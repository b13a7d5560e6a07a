"""Tiles: what every choice must keep to on every card, the formula's reasons, the table that overrides it."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import pytest

from kernels import tiles
from kernels.aot import CARDS
from kernels.shapes import LAYERS
from kernels.tiles import (
    MAX_IDLE,
    ROW_BUCKETS,
    TABLE,
    Card,
    Tile,
    Work,
    choose_tile,
    fitting,
    formula_tile,
    measured_tiles,
)

# Bytes of a number and the columns that share a scale: floats, a scale for each row, blocks, int4's groups, odd blocks.
FORMATS = {
    "bf16": (2, 0),
    "fp32": (4, 0),
    "int8 by row": (1, None),
    "fp8 128x128": (1, 128),
    "int4": (0.5, 128),
    "blocks of 48": (1, 48),
}
BF16 = Work("gate_up", 1536, 2048, 128, 32, 2)
H100 = CARDS[90]


def is_power_of_two(size: int) -> bool:
    return size > 0 and size & (size - 1) == 0


def works() -> list[Work]:
    """All that the layers of models ask for, and the sizes of tests."""
    found = []
    for layer in LAYERS.values():
        sizes = (2 * layer.width, layer.hidden_size), (layer.hidden_size, layer.width), (96, 48), (12, 6)
        for num_rows in (1, 2, 16, 17, 32, 33, 64):
            for element_bytes, scale_columns in FORMATS.values():
                for num_outputs, num_inputs in sizes:
                    columns = num_inputs if scale_columns is None else scale_columns
                    num_lists = min(layer.num_experts, num_rows * layer.top_k)
                    input_bytes = max(2, int(element_bytes))
                    found.append(
                        Work(
                            *("gate_up", num_outputs, num_inputs, num_lists, num_rows, element_bytes),
                            *(input_bytes, columns),
                        )
                    )
    return found


def assert_usable(tile: Tile, work: Work, card: Card) -> None:
    """What kernels and cards require."""
    assert all(map(is_power_of_two, (tile.columns, tile.depth, tile.num_warps)))
    assert tile.columns >= 16 and tile.depth >= 16 and tile.num_stages >= 2
    assert tile.shared_bytes(work) <= card.shared_bytes
    if work.element_bytes < 1:
        assert tile.depth == 128
    elif 0 < work.scale_columns < work.num_inputs:
        assert work.scale_columns % tile.depth == 0


@pytest.mark.parametrize("card", CARDS.values(), ids=lambda card: card.name)
def test_every_choice_is_usable(card):
    for work in works():
        assert_usable(choose_tile(work, card), work, card)


@pytest.mark.parametrize("card", CARDS.values(), ids=lambda card: card.name)
def test_whatever_was_measured_is_made_to_fit(card):
    """A table may hold tiles of another format, or of a card with more shared memory."""
    for work in works()[::3]:
        for columns, depth, num_stages in [(16, 16, 2), (64, 64, 4), (128, 256, 6), (256, 512, 8)]:
            assert_usable(fitting(Tile(columns, depth, 8, num_stages), work, card), work, card)


def test_a_tile_loses_no_more_than_it_must():
    """Stages first, then columns, then depth."""
    tile = Tile(64, 128, 4, 3)
    assert fitting(tile, BF16, H100) == tile
    assert fitting(replace(tile, num_stages=12), BF16, H100) == replace(tile, num_stages=9)
    assert fitting(replace(tile, columns=512), BF16, CARDS[120]) == replace(tile, columns=128, num_stages=2)
    assert fitting(replace(tile, columns=16, depth=1024), BF16, CARDS[120]) == Tile(16, 512, 4, 2)


def test_the_last_round_of_programs_is_as_full_as_pays():
    """Qwen3's gate and up on an H100, 264 programs at once: 32 lists of 1536 columns are 2.9 rounds of 64 columns."""

    def filled(columns: int, work: Work) -> float:
        rounds = -(-work.num_outputs // columns) * work.num_lists / (2 * H100.num_processors)
        return rounds / -(-rounds // 1)

    for num_lists in (8, 16, 32, 64, 128):
        work = replace(BF16, num_lists=num_lists)
        chosen = formula_tile(work, H100).columns
        fullest = max(filled(columns, work) for columns in (16, 32, 64))
        assert filled(chosen, work) >= fullest - MAX_IDLE
        # No wider tile would be as good.
        assert all(filled(columns, work) < fullest - MAX_IDLE for columns in (32, 64) if columns > chosen)


def test_every_thread_has_16_bytes_to_load():
    for work in works():
        tile = formula_tile(work, H100)
        if work.num_outputs >= 64 and work.num_inputs >= 256 and work.scale_columns != 48:
            assert tile.columns * tile.depth * work.element_bytes >= 16 * 32 * tile.num_warps


def test_buckets_are_the_blocks_of_rows():
    assert [replace(BF16, rows=rows).bucket for rows in (1, 2, 16, 17, 32, 33, 64)] == [16, 16, 16, 32, 32, 64, 64]
    assert ROW_BUCKETS == (16, 32, 64)


def test_the_table_overrides_the_formula(tmp_path, monkeypatch):
    """For its card, kernel, sizes, format and bucket, and for nothing else."""
    measured = Tile(32, 64, 8, 5)
    assert measured != formula_tile(BF16, H100)
    entry = {"card": H100.name, "kernel": "gate_up", "num_outputs": 1536, "num_inputs": 2048, "element_bytes": 2}
    table = tmp_path / "tiles.json"
    table.write_text(json.dumps([{**entry, "bucket": 32, "tile": asdict(measured)}]), encoding="utf-8")
    monkeypatch.setattr(tiles, "measured_tiles", lambda: measured_tiles(table))
    assert choose_tile(BF16, H100) == measured
    assert choose_tile(replace(BF16, rows=17, num_lists=40), H100) == measured
    others = [
        *(replace(BF16, kernel="down"), replace(BF16, num_outputs=1024), replace(BF16, num_inputs=1024)),
        *(replace(BF16, rows=16), replace(BF16, element_bytes=1, scale_columns=2048)),
    ]
    assert all(choose_tile(work, H100) == formula_tile(work, H100) for work in others)
    assert choose_tile(BF16, CARDS[80]) == formula_tile(BF16, CARDS[80])


def test_the_table_that_ships_can_be_read():
    assert all(is_power_of_two(tile.columns * tile.depth * tile.num_warps) for tile in measured_tiles(TABLE).values())
