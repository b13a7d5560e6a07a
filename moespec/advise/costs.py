"""What a step costs by its bytes: modelled, for a model that is not loaded on a device that may not be here.

Owns the model and its bounds. Answers the same questions as a measured `CostTable`. Everything here is calculated.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from moespec.advise.devices import Device
from moespec.advise.unions import Unions
from moespec.cost import ModelShape, floor_s, step_bytes, step_flops

# How well a verify step uses the memory, to how well a plain step does. At least: drafting and the rest of a step are
# many small kernels. At most: with more rows a kernel reads its experts better; published timings of Mixtral's have
# 87 % of the bandwidth at 8 rows and more, 73 % at one (small experts gain more, with kernels that waste most of it).
LEAST_EFFICIENCY, MOST_EFFICIENCY = 0.8, 1.2
NUM_DRAFT_WORDS = 32_000  # the draft vocabulary of the public EAGLE-3 heads
# How far another card and host may be from the overhead that was measured on one.
LEAST_OVERHEAD, MOST_OVERHEAD = 0.7, 1.5


class Costs(Protocol):
    """Milliseconds of steps, whoever knows them."""

    @property
    def plain_ms(self) -> float: ...

    def predict_ms(self, num_rows: float, budget: int | None, num_levels: float = 0, draft_top_k: int = 8) -> float: ...

    def union(self, num_rows: float) -> float: ...


@dataclass(frozen=True)
class DraftShape:
    """Bytes that drafting reads: once a step, and for every level."""

    step_bytes: float
    level_bytes: float

    @staticmethod
    def eagle3(hidden_size: int, vocab_size: int, bytes_per_weight: float) -> DraftShape:
        """A head as the public ones are: one layer of the target's width D, its MLP three times as wide, fed two
        vectors a position; 32,000 words at most. Attention takes about 4 D^2 weights, the MLP 9 D^2, joining three
        taps 3 D^2.
        """
        square, words = hidden_size**2 * bytes_per_weight, min(vocab_size, NUM_DRAFT_WORDS)
        return DraftShape(3 * square, 13 * square + words * hidden_size * bytes_per_weight)


FREE_DRAFTS = DraftShape(0, 0)  # prompt look-up reads no weights


@dataclass(frozen=True)
class Overhead:
    """What steps take beside the time in which the memory, as measured, reads their bytes: small kernels, the host.

    reading      times that time
    step_ms      once; layer_ms for every MoE layer; doubling_ms more of it for every doubling of the rows
    level_ms     for every level of drafting
    """

    reading: float = 1.0
    step_ms: float = 0.0
    layer_ms: float = 0.0
    doubling_ms: float = 0.0
    level_ms: float = 0.0

    def scaled(self, factor: float) -> Overhead:
        """As many times the milliseconds."""
        milliseconds = (self.step_ms, self.layer_ms, self.doubling_ms, self.level_ms)
        return Overhead(self.reading, *(factor * ms for ms in milliseconds))

    @property
    def in_words(self) -> str:
        return (
            f"{self.reading:g} times the reading, {self.step_ms:g} ms a step, {self.layer_ms:g} ms a layer and "
            f"{self.doubling_ms:g} more whenever the rows double, and {self.level_ms:g} ms a level of drafting"
        )


NO_OVERHEAD = Overhead()
# This engine's on CUDA: graphs, Triton, bf16. Fitted to 79 kinds of whole steps of OLMoE-1B-7B, Qwen3-30B-A3B and the
# embedded model on an H200 (assets/bench/step-models-h200.json and step-h200.json): steps within 8 %, and within 11 %
# what they cost in plain ones. Fitted without Qwen3's, those were within 10 %.
ENGINE_ON_CUDA = Overhead(reading=1.085, step_ms=0.645, layer_ms=0.114, doubling_ms=0.008, level_ms=0.179)
MEASURED_OF_DATASHEET = 0.92  # of the bandwidth that an H200's promises


@dataclass(frozen=True)
class ModelledCosts:
    """Bytes over bandwidth, on a CPU the arithmetic besides, and an engine's overhead.

    efficiency   a tree step's to a plain step's
    """

    shape: ModelShape
    device: Device
    draft: DraftShape
    kv_bytes: int
    union: Callable[[float], float]
    efficiency: float = 1.0
    overhead: Overhead = NO_OVERHEAD

    @property
    def plain_ms(self) -> float:
        return self._ms(self.shape.top_k, 1)

    def num_read(self, num_rows: float, budget: int | None) -> float:
        """Experts per layer: the budget, where the tree would use more."""
        union = self.union(num_rows)
        return union if budget is None else min(union, budget)

    def num_bytes(self, num_rows: float, budget: int | None) -> int:
        return round(step_bytes(self.shape, self.num_read(num_rows, budget), self.kv_bytes))

    def verify_ms(self, num_rows: float, budget: int | None) -> float:
        """Without an overhead, at the least."""
        return self._ms(self.num_read(num_rows, budget), num_rows)

    def draft_ms(self, num_levels: float) -> float:
        """Without an overhead, at the least."""
        if num_levels == 0 or self.draft == FREE_DRAFTS:
            return 0.0
        seconds = floor_s(self.draft.step_bytes + num_levels * self.draft.level_bytes, self.device.bytes_per_s)
        return self.overhead.reading * 1e3 * seconds + num_levels * self.overhead.level_ms

    def predict_ms(self, num_rows: float, budget: int | None, num_levels: float = 0, draft_top_k: int = 8) -> float:
        """As much above what was calculated as a plain step is above its own, and more or less by `efficiency`."""
        if num_rows <= 1 and num_levels == 0:
            return self.plain_ms
        return (self.verify_ms(num_rows, budget) + self.draft_ms(num_levels)) / self.efficiency

    def _ms(self, num_read: float, num_rows: float) -> float:
        seconds = floor_s(step_bytes(self.shape, num_read, self.kv_bytes), self.device.bytes_per_s)
        if self.device.flops_per_s is not None:
            seconds += step_flops(self.shape, num_rows) / self.device.flops_per_s
        layer_ms = self.overhead.layer_ms + self.overhead.doubling_ms * math.log2(max(1.0, num_rows))
        beside_ms = self.overhead.step_ms + self.shape.num_moe_layers * layer_ms
        return self.overhead.reading * 1e3 * seconds + beside_ms


@dataclass(frozen=True)
class BoundedCosts:
    """Costs as expected, and for everything that is not known for sure, with it at its worst and at its best."""

    expected: Costs
    bounds: Sequence[tuple[Costs, Costs]]


def modelled_bounds(costs: ModelledCosts, unions: Unions) -> BoundedCosts:
    """Neither how many experts a tree uses nor how well its step uses the memory is known, nor an overhead elsewhere.

    As a rule, the more overhead a plain step has, the less a tree costs of plain steps.
    """
    bounds = [
        (replace(costs, union=unions.most), replace(costs, union=unions.least)),
        (replace(costs, efficiency=LEAST_EFFICIENCY), replace(costs, efficiency=MOST_EFFICIENCY)),
    ]
    if costs.overhead != NO_OVERHEAD:
        least, most = (replace(costs, overhead=costs.overhead.scaled(by)) for by in (LEAST_OVERHEAD, MOST_OVERHEAD))
        bounds.append((least, most))
    return BoundedCosts(costs, bounds)
