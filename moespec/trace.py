"""What a step reports, as plain Python, and its JSON-lines form. The page sees nothing else of the engine.

Owns the trace schema. Line 1 of a trace file is a header, then one object per step. Knows nothing of tensors or models.
"""

from __future__ import annotations

import base64
import json
import struct
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

SCHEMA = 1
READABLE_SCHEMAS = (1,)  # the current schema and, once there is one, the one before


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
    active: expert ids; ids and weights: [T, K] routing that was run, base64 of uint16 and float16, row-major.
    """

    layer: int
    score: list[float]
    natural: list[int]
    kept: list[int]
    active: list[int]
    ids: str
    weights: str
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
    origins: per emitted token, the depth of the accepted draft node it was, or 0 for the target's own.
    `tree` and `layers` of a running engine's steps are made when they are first read: they take as long as a layer.
    """

    step: int
    kind: str
    t_ms: float
    token_ids: list[int]
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
    def deferred(cls, details: Callable[[], tuple[TreeTrace | None, list[LayerTrace]]], **values: Any) -> StepTrace:
        """A step whose `tree` and `layers` are what `details` returns, asked for once and only if they are read."""
        step = cls(tree=None, layers=[], **values)
        del step.tree, step.layers
        step.__dict__["_details"] = details
        return step

    def __getattr__(self, name: str) -> Any:
        details = self.__dict__.pop("_details", None) if name in ("tree", "layers") else None
        if details is None:
            raise AttributeError(f"{type(self).__name__} has no {name!r}")
        self.tree, self.layers = details()
        return self.__dict__[name]

    def to_json(self) -> dict:
        """Plain dict, safe for `json.dumps`."""
        return asdict(self)

    @staticmethod
    def from_json(values: dict) -> StepTrace:
        """The inverse of `to_json`."""
        values = dict(values)
        values["settings"] = StepSettings(**values["settings"])
        values["tree"] = TreeTrace(**values["tree"]) if values["tree"] else None
        values["layers"] = [LayerTrace(**layer) for layer in values["layers"]]
        values["summary"] = RunSummary(**values["summary"]) if values["summary"] else None
        return StepTrace(**values)


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


def write_trace(path: Path, header: TraceHeader, steps: Iterable[StepTrace]) -> None:
    """Write a JSON-lines trace file."""
    with path.open("w", encoding="utf-8") as file:
        file.write(json.dumps(asdict(header)) + "\n")
        for step in steps:
            file.write(json.dumps(step.to_json()) + "\n")


def read_trace(path: Path) -> tuple[TraceHeader, list[StepTrace]]:
    """Read a trace file. ValueError names the line that is no trace of a readable schema."""
    lines = iter(path.read_text(encoding="utf-8").splitlines())
    header = _parse_header(path, lines)
    steps = []
    for number, line in enumerate(lines, start=2):
        try:
            steps.append(StepTrace.from_json(json.loads(line)))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: line {number} is not a step of a trace ({error}).") from error
    return header, steps


def _parse_header(path: Path, lines: Iterator[str]) -> TraceHeader:
    try:
        values = json.loads(next(lines))
        schema = values["schema"]
    except (StopIteration, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: line 1 is not a trace header.") from error
    if schema not in READABLE_SCHEMAS:
        raise ValueError(f"{path}: trace schema {schema} is not one of {READABLE_SCHEMAS}.")
    return TraceHeader(**values)


def unpack_routing(layer: LayerTrace, num_rows: int) -> tuple[list[list[int]], list[list[float]]]:
    """The layer's [T, K] expert ids and routing weights as nested lists."""
    ids = _unpack("H", layer.ids)
    weights = _unpack("e", layer.weights)
    top_k = len(ids) // num_rows
    rows = range(0, len(ids), top_k)
    return [ids[i : i + top_k] for i in rows], [weights[i : i + top_k] for i in rows]


def _unpack(code: str, packed: str) -> list:
    data = base64.b64decode(packed)
    return list(struct.unpack(f"<{len(data) // 2}{code}", data))
