"""What a step reports, as plain Python, and its JSON-lines form. The page sees nothing else of the engine.

Owns the trace schema. Line 1 of a trace file is a header, then one object per step; `trace_reading.py` reads it. Knows
nothing of tensors or models.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

SCHEMA = 2  # 2 has each token's text and each row's natural experts


@dataclass
class TreeTrace:
    """The draft tree of one step, one entry per row, the root first.

    draft_p: the drafter's probability of the node given its parent; path_p: of the whole path from the root;
    target_p: the target's probability of the node given its parent (None at the root); missing: natural (row, expert)
    pairs of the node that were not run, summed over layers; the alternatives are [token id, piece, probability] of the
    best next tokens below each row, by the target and by the drafter.
    """

    token_ids: list[int]
    pieces: list[str]
    parents: list[int]
    depths: list[int]
    draft_p: list[float]
    path_p: list[float]
    target_p: list[float | None]
    accepted: list[bool]
    missing: list[int]
    target_top: list[list[list]]
    draft_top: list[list[list]]


@dataclass
class LayerTrace:
    """One MoE layer of one step.

    score: router probability per expert, summed over the rows, whatever the budget ranks by; natural, kept,
    active: expert ids; ids and weights: [T, K] routing that was run, base64 of uint16 and float16, row-major;
    natural_ids: [T, K] what the router chose, as `ids`, or "" in a trace of schema 1.
    """

    layer: int
    score: list[float]
    natural: list[int]
    kept: list[int]
    active: list[int]
    ids: str
    weights: str
    natural_ids: str
    mass_kept: float
    natural_weight_kept: float
    num_displaced: int


@dataclass
class StepSettings:
    """The settings in force at one step; `effective_budget` is None where no budget acted."""

    budget: int | None
    effective_budget: int | None
    coverage: float | None
    policy: str
    score: str
    row_weight: str
    protect_root: bool
    tree: list[int | float]  # total tokens, depth, top-k


@dataclass
class RunSummary:
    """Totals and means of a run. Means of experts and mass are over tree steps (two rows or more) and layers.

    tokens_per_s counts the tokens after the first over the time after the first: the prompt is not in it.
    """

    text: str
    prompt_token_ids: list[int]
    token_ids: list[int]
    num_steps: int
    tokens_per_step: float
    tokens_per_s: float
    first_token_ms: float
    total_ms: float
    draft_ms: float
    verify_ms: float
    other_ms: float
    experts_natural: float | None
    experts_kept: float | None
    experts_active: float | None
    mass_kept: float
    lossless: bool
    finish_reason: str  # "eos", "stop", "length", "context", "stopped"
    settings: dict
    device: dict


@dataclass
class StepTrace:
    """One step: what it emitted, under which settings, what it cost. The terms are defined in `counts.py`.

    kind: "prefill" (the prompt; emits the first token), "plain" (one row), "tree".
    verify_ms: the forward, what the target says of the tree, and the walk.
    pieces, origins: per emitted token, what a reader sees of it alone, and the depth of the accepted draft node it was,
    or 0 for the target's own.
    `tree` and `layers` of a running engine's steps are made when they are first read: they take as long as a layer.
    """

    step: int
    kind: str
    t_ms: float
    token_ids: list[int]
    pieces: list[str]
    text: str
    origins: list[int]
    settings: StepSettings
    tree: TreeTrace | None
    layers: list[LayerTrace]
    experts_natural: list[int]
    experts_kept: list[int]
    experts_active: list[int]
    mass_kept: float
    expert_bytes: int
    draft_ms: float
    verify_ms: float
    other_ms: float
    lossless: bool
    summary: RunSummary | None = None

    @classmethod
    def deferred(
        cls, tree: Callable[[], TreeTrace | None], layers: Callable[[], list[LayerTrace]], **values: Any
    ) -> StepTrace:
        """A step whose `tree` and `layers` are what these return, asked only if they are read."""
        step = cls(tree=None, layers=[], **values)
        del step.tree, step.layers
        step.__dict__["_makers"] = {"tree": tree, "layers": layers}
        return step

    def __getattr__(self, name: str) -> Any:
        make = self.__dict__.get("_makers", {}).get(name)
        if make is not None:
            self.__dict__[name] = make()  # two threads at once may both make it: it is the same
            self.__dict__["_makers"].pop(name, None)
        elif name not in self.__dict__:
            raise AttributeError(f"{type(self).__name__} has no {name!r}")
        return self.__dict__[name]

    def __getstate__(self) -> dict[str, Any]:
        """A step that goes to another process takes its `tree` and `layers` along."""
        _ = self.tree, self.layers
        return {name: value for name, value in self.__dict__.items() if name != "_makers"}

    @property
    def num_accepted(self) -> int:
        """Emitted tokens that were drafted."""
        return sum(origin > 0 for origin in self.origins)

    def to_json(self) -> dict:
        """Plain dict, safe for `json.dumps`."""
        return asdict(self)


@dataclass
class TraceHeader:
    """Line 1 of a trace file: what the run was asked and where it ran."""

    settings: dict
    seed: int
    device: dict
    model: dict
    drafter: dict | None
    prompt: str | list
    schema: int = field(default=SCHEMA)


def trace_lines(header: TraceHeader, steps: Iterable[StepTrace]) -> Iterator[str]:
    """The lines of a trace file, each with its end."""
    yield json.dumps(asdict(header)) + "\n"
    for step in steps:
        yield json.dumps(step.to_json()) + "\n"


def write_trace(path: Path, header: TraceHeader, steps: Iterable[StepTrace]) -> None:
    """Write a JSON-lines trace file."""
    with path.open("w", encoding="utf-8") as file:
        file.writelines(trace_lines(header, steps))


def unpack_routing(layer: LayerTrace, num_rows: int) -> tuple[np.ndarray, np.ndarray]:
    """The layer's expert ids, uint16 [T, K], and routing weights, fp16 [T, K]."""
    return unpack_ids(layer.ids).reshape(num_rows, -1), unpack_weights(layer.weights).reshape(num_rows, -1)


def unpack_ids(packed: str) -> np.ndarray:
    """Expert ids, uint16, row by row, of a LayerTrace's `ids` or `natural_ids`."""
    return np.frombuffer(base64.b64decode(packed, validate=True), "<u2")


def unpack_weights(packed: str) -> np.ndarray:
    """Routing weights, fp16, row by row, of a LayerTrace."""
    return np.frombuffer(base64.b64decode(packed, validate=True), "<f2")
