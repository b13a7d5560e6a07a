"""Tries tiles of the expert kernels on this card and keeps the fastest for `kernels/tiles.json`.

Owns the grid: 48 tiles for each bucket of rows, less those that a card or a shape cannot have, for each of two kernels:
288 at most for a shape. Never runs while text is generated. Knows nothing of how a launch chooses (`kernels/tiles.py`).
Compiling is what takes time: 308 tiles of Qwen3-30B-A3B in bf16 took three minutes for sm_90 on one core of a busy
machine [measured]; all are timed side by side, in seconds.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from triton.errors import TritonError

from kernels.down import down
from kernels.experts import works_for
from kernels.gate_up import gate_up
from kernels.lists import group
from kernels.tiles import ROW_BUCKETS, TABLE, Card, Tile, Work, fitting, formula_tile, measured_tiles
from kernels.weights import ExpertWeights
from moespec.bench.layers import Layers
from moespec.bench.machine import Call, time_in_rotation
from moespec.bench.routings import Case, RoutedLayer, random_rows, route

GRID = {"columns": (16, 32, 64, 128), "depth": (128, 256), "num_warps": (4, 8), "num_stages": (2, 3, 4)}
KERNELS = ("gate_up", "down")
NUM_ROUNDS = 10
MAX_DIFFERENCE = 1e-2  # of a tile's output from the formula's: sums in another order, not another result


def sweep(
    layers: Layers, device: torch.device, progress: Callable[[str], None], is_over: Callable[[], bool]
) -> list[dict[str, Any]]:
    """The table's entries for this shape and number format, as far as time allows.

    Rows fill their bucket; a quarter of the experts is kept, or as few as one row has: where a budget acts.
    """
    shape = layers.shape
    entries: list[dict[str, Any]] = []
    for bucket in ROW_BUCKETS:
        budget = max(shape.top_k, shape.num_experts // 4)
        x_TD = random_rows(layers, bucket, device)
        trial = _Trial(layers, route(layers, Case(bucket, budget), x_TD), x_TD)
        for kernel in KERNELS:
            if is_over():
                progress(f"sweep: no time for {kernel} at {bucket} rows and what follows")
                return entries
            entries.append(trial.best(kernel))
            entry = entries[-1]
            progress(
                f"sweep: {kernel}, {bucket} rows: {entry['tile']} {entry['median_us']:.1f} us, "
                f"the formula's {entry['formula_us']:.1f} us, {entry['num_tried']} tried"
            )
    return entries


def tiles_to_try(work: Work, card: Card) -> list[Tile]:
    """The formula's tile, then those of the grid that this work and card can have."""
    tiles = [Tile(**dict(zip(GRID, sizes, strict=True))) for sizes in itertools.product(*GRID.values())]
    usable = [tile for tile in tiles if tile.depth <= work.num_inputs and tile.columns <= work.num_outputs]
    kept = [tile for tile in usable if fitting(tile, work, card) == tile]
    return list(dict.fromkeys([fitting(formula_tile(work, card), work, card), *kept]))


def write_tiles(entries: list[dict[str, Any]], path: Path = TABLE) -> None:
    """Put entries into the table, in place of older ones for the same work; launches see them from now on."""
    names = ("card", "kernel", "num_outputs", "num_inputs", "element_bytes", "bucket")
    table = {tuple(entry[name] for name in names): entry for entry in json.loads(path.read_text(encoding="utf-8"))}
    table |= {tuple(entry[name] for name in names): entry for entry in entries}
    path.write_text(json.dumps([table[key] for key in sorted(table)], indent=1) + "\n", encoding="utf-8")
    measured_tiles.cache_clear()


class _Trial:
    """All layers, routed, at one number of rows: what a tile is tried on."""

    def __init__(self, layers: Layers, routed: list[RoutedLayer], x_TD: Tensor) -> None:
        self._routed, self._x_TD, self._card = routed, x_TD, Card.of(x_TD.device)
        self._weights: list[ExpertWeights] = [layer.weights for layer in layers.layers]
        num_experts = layers.shape.num_experts
        self._lists = [group(route.ids_TK, route.weights_TK, num_experts) for route in routed]
        # The formula's, not the table's: an entry is compared with what stands there without one.
        self._tiles = {kernel: tiles_to_try(self._work(kernel), self._card)[0] for kernel in KERNELS}
        self._hidden = [
            gate_up(x_TD, lists, weights, self._tiles["gate_up"])
            for lists, weights in zip(self._lists, self._weights, strict=True)
        ]

    def best(self, kernel: str) -> dict[str, Any]:
        """The table's entry: the fastest tile, its time and that of the formula's."""
        work, formula = self._work(kernel), self._tiles[kernel]
        wanted = self._output(kernel, formula)
        tried = [tile for tile in tiles_to_try(work, self._card) if self._works(kernel, tile, wanted)]
        calls = {str(tile): self._calls(kernel, tile) for tile in tried}
        timings = time_in_rotation(calls, self._x_TD.device, NUM_ROUNDS)
        best = min(tried, key=lambda tile: timings[str(tile)].median_us)
        return {
            "card": self._card.name,
            "kernel": kernel,
            "num_outputs": work.num_outputs,
            "num_inputs": work.num_inputs,
            "element_bytes": work.element_bytes,
            "scale_columns": work.scale_columns,
            "bucket": work.bucket,
            "tile": asdict(best),
            "median_us": round(timings[str(best)].median_us, 2),
            "formula_tile": asdict(formula),
            "formula_us": round(timings[str(formula)].median_us, 2),
            "num_tried": len(tried),
        }

    def _work(self, kernel: str) -> Work:
        top_k = self._routed[0].ids_TK.shape[1]
        return works_for(self._x_TD, top_k, self._weights[0])[KERNELS.index(kernel)]

    def _works(self, kernel: str, tile: Tile, wanted: Tensor) -> bool:
        """Whether it compiles, launches and computes the same."""
        try:
            output = self._output(kernel, tile)
        except (TritonError, RuntimeError):
            return False
        return bool((output - wanted).norm() <= MAX_DIFFERENCE * wanted.norm())

    def _output(self, kernel: str, tile: Tile) -> Tensor:
        output: Any = self._calls(kernel, tile)[0]()
        return output.float()

    def _calls(self, kernel: str, tile: Tile) -> list[Call]:
        def call(layer: int) -> Tensor:
            weights, lists = self._weights[layer], self._lists[layer]
            if kernel == "gate_up":
                return gate_up(self._x_TD, lists, weights, tile)
            return down(self._hidden[layer], lists, weights, tile)

        return [lambda layer=layer: call(layer) for layer in range(len(self._weights))]  # type: ignore[misc]
