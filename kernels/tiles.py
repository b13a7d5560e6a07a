"""Tile sizes of the expert kernels: a formula, and a table of measured ones that overrides it. Chosen before a launch.

Nothing is tried out while text is generated: the table is written by `python -m moespec bench kernels --sweep`, and a
tile that a card has no shared memory for is made smaller. Knows the cards' limits, not what they can do.
"""

from __future__ import annotations

import functools
import json
import math
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from kernels.checks import MIN_DEPTH
from kernels.weights import INT4_GROUP

TABLE = Path(__file__).with_name("tiles.json")
ROW_BUCKETS = (16, 32, 64)
NUM_WARPS = 4  # of the formula's tiles
MAX_IDLE = 0.03  # share of the processors that a wider tile may leave idle, against the fullest
_RESERVED_BYTES = 1024  # of shared memory, by the driver, for each block


@dataclass(frozen=True)
class Tile:
    """`columns`: output features of a program; `depth`: input features of one turn of its loop."""

    columns: int
    depth: int
    num_warps: int
    num_stages: int

    def shared_bytes(self, work: Work) -> int:
        """The most that the compiler puts there: weights and rows of each stage, and one turn's weights converted.

        Those of `python -m kernels.aot`. Only Hopper's products of 64 rows take it all; others keep one stage less, and
        convert in registers.
        """
        stage = self.columns * work.element_bytes + work.bucket * work.input_bytes
        converted = self.columns * work.input_bytes if work.element_bytes < work.input_bytes else 0
        return math.ceil(self.depth * (self.num_stages * stage + converted))


@dataclass(frozen=True)
class Card:
    """What of a device decides a tile."""

    name: str
    num_processors: int
    shared_bytes: int  # of one processor, all of which one block may ask for

    @staticmethod
    @functools.cache
    def of(device: torch.device) -> Card:
        if device.type != "cuda":
            return Card("interpreter", 1, 2**20)
        found = torch.cuda.get_device_properties(device)
        least = found.shared_memory_per_block  # torch's type stubs do not know what a block may ask for
        shared_bytes = getattr(found, "shared_memory_per_block_optin", least)
        return Card(found.name, found.multi_processor_count, shared_bytes)


@dataclass(frozen=True)
class Work:
    """One launch: `kernel` is gate_up or down, N its output features, C its input features, for `num_lists` experts."""

    kernel: str
    num_outputs: int
    num_inputs: int
    num_lists: int
    rows: int
    element_bytes: float
    input_bytes: int = 2  # of one number of x, and of what is multiplied
    scale_columns: int = 0  # input features that share a scale: a turn of the loop may not span two of them

    @property
    def bucket(self) -> int:
        """Rows of the block that holds all rows of an expert."""
        return next(size for size in ROW_BUCKETS if self.rows <= size)

    def allowed_depth(self, depth: int) -> int:
        """At most `depth`: a turn loads one scale of each row, so it stays within the columns that share one."""
        if self.element_bytes < 1:
            return INT4_GROUP  # a byte holds two columns, half a group apart: a turn is a whole group
        if 0 < self.scale_columns < self.num_inputs:
            return min(depth, self.scale_columns & -self.scale_columns)
        return depth


def choose_tile(work: Work, card: Card) -> Tile:
    """The measured tile of this card and work, or the formula's; never more shared memory than the card has."""
    return fitting(measured_tiles().get(_key(work, card)) or formula_tile(work, card), work, card)


def formula_tile(work: Work, card: Card) -> Tile:
    """Loops as deep as a scale allows, and columns for which the last round of programs is nearly full.

    Depth before width: bytes in flight are what counts (a deep loop measured 1.3 times as fast as a shallow one at half
    the occupancy on another card). A wave is what all processors run at once, two programs on each.
    """
    depth = min(128, max(MIN_DEPTH, _power_below(work.num_inputs)))
    depth, at_once = work.allowed_depth(depth), 2 * card.num_processors
    sizes = [size for size in (64, 32, 16) if size <= max(16, _power_below(work.num_outputs))]
    # With fewer columns than make a tile of 16 bytes for each thread, each would load less at a time.
    sizes = [size for size in sizes if size * depth * work.element_bytes >= 16 * 32 * NUM_WARPS] or sizes[:1]

    def filled(columns: int) -> float:
        waves = math.ceil(work.num_outputs / columns) * work.num_lists / at_once
        return waves / math.ceil(waves)

    # Narrow tiles read x more often: worth it for a fuller round, not for a slightly fuller one.
    fullest = max(map(filled, sizes))
    columns = next(size for size in sizes if filled(size) >= fullest - MAX_IDLE)
    return Tile(columns, depth, NUM_WARPS, num_stages=4 if work.bucket < 64 else 3)


def fitting(tile: Tile, work: Work, card: Card) -> Tile:
    """The tile, no deeper than scales allow, with fewer stages, then narrower, then shallower until a card holds it."""
    tile = replace(tile, depth=work.allowed_depth(tile.depth))
    while tile.shared_bytes(work) > card.shared_bytes - _RESERVED_BYTES:
        if tile.num_stages > 2:
            tile = replace(tile, num_stages=tile.num_stages - 1)
        elif tile.columns > 16:
            tile = replace(tile, columns=tile.columns // 2)
        else:
            tile = replace(tile, depth=tile.depth // 2)
    return tile


def _power_below(size: int) -> int:
    """The largest power of two that is not above `size`."""
    return 1 << (size.bit_length() - 1)


def _key(work: Work, card: Card) -> tuple:
    return card.name, work.kernel, work.num_outputs, work.num_inputs, work.element_bytes, work.bucket


@functools.cache
def measured_tiles(path: Path = TABLE) -> dict[tuple, Tile]:
    """The table: one entry per card, kernel, shape, bytes of an element and bucket of rows."""
    entries = json.loads(path.read_text(encoding="utf-8"))
    return {
        tuple(entry[name] for name in ("card", "kernel", "num_outputs", "num_inputs", "element_bytes", "bucket")): Tile(
            **entry["tile"]
        )
        for entry in entries
    }
