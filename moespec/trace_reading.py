"""Reads trace files, which may come from anywhere: every type and every number that points somewhere is checked.

Owns what a readable trace is. A file is only ever parsed as JSON, line by line; a bad line is named.
"""

from __future__ import annotations

import binascii
import dataclasses
import functools
import json
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from moespec.config import MAX_TREE_TOKENS
from moespec.trace import SCHEMA, LayerTrace, StepTrace, TraceHeader, TreeTrace, unpack_ids, unpack_weights

READABLE_SCHEMAS = (SCHEMA, SCHEMA - 1)
MAX_BYTES = 64 << 20  # 2,000 tokens of the embedded model are a tenth of it
MAX_EXPERTS = 1 << 16
MOST = 2**63  # no number of a trace is larger; also false of what is not a number
MAX_ALTERNATIVES = 16
MAX_DEPTH = 16
Made = TypeVar("Made")


def read_trace(path: Path) -> tuple[TraceHeader, list[StepTrace]]:
    """Read a trace file. ValueError names the line that is no trace of a readable schema, and what is wrong with it."""
    if path.stat().st_size > MAX_BYTES:
        limit = f"{MAX_BYTES >> 20} MB, which is the most a trace may have"
        raise ValueError(f"{path.name} has more than {limit}: export fewer steps.")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path.name} is not a trace: it is not text ({error.reason}).") from error
    lines = iter(text.split("\n"))
    header = _at(path, 1, lambda: _header(next(lines)))
    steps: list[StepTrace] = []
    for number, line in enumerate(lines, start=2):
        if line.strip():
            steps.append(_at(path, number, functools.partial(_step, line, header.schema, steps)))
    if not steps:
        raise ValueError(f"{path.name} has a header and no step: the recording was cut off.")
    return header, steps


def _at(path: Path, number: int, parse: Callable[[], Made]) -> Made:
    try:
        return parse()
    except (ValueError, RecursionError, StopIteration) as error:
        what = "a trace header" if number == 1 else "a step of a trace"
        raise ValueError(f"{path.name}: line {number} is not {what} ({_reason(error)}).") from error


def _reason(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"no JSON: {error.msg} at character {error.pos + 1}"
    return str(error) or type(error).__name__


def _header(line: str) -> TraceHeader:
    values = _json(line)
    schema = values.get("schema")
    if schema not in READABLE_SCHEMAS:
        raise ValueError(f"schema {schema!r} is not one of {', '.join(map(str, sorted(READABLE_SCHEMAS)))}")
    return _made(TraceHeader, values, "header")


def _step(line: str, schema: int, before: list[StepTrace]) -> StepTrace:
    values = _json(line)
    if schema == 1:
        _upgrade(values)
    step = read_step(values)
    _require(step.step == len(before), f"steps are not in order: {len(before)} is missing")
    shapes = {(len(one.layers), len(one.layers[0].score)) for one in (step, *before[-2:]) if one.layers}
    _require(len(shapes) <= 1, "it has other layers or experts than the step before")
    _require(not before or before[-1].summary is None, "a step comes behind the one with the summary")
    return step


def read_step(values: dict[str, Any]) -> StepTrace:
    """The inverse of `StepTrace.to_json`. ValueError names what is wrong."""
    step = _made(StepTrace, values, "step")
    _check_step(step)
    return step


def _json(line: str) -> dict[str, Any]:
    values = json.loads(line, parse_constant=_refuse_constant)
    if not isinstance(values, dict):
        raise ValueError("no JSON object")
    return values


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number")


def _upgrade(values: dict[str, Any]) -> None:
    """A step of schema 1 as one of schema 2: its text stands with its first token."""
    token_ids = values.get("token_ids")
    more = len(token_ids) - 1 if isinstance(token_ids, list) else 0
    values["pieces"] = [values.get("text"), *[""] * more][: more + 1]
    layers = values.get("layers")
    for layer in layers if isinstance(layers, list) else []:
        if isinstance(layer, dict):
            layer["natural_ids"] = ""


def _made(cls: type[Made], values: Any, where: str) -> Made:
    """A dataclass of JSON values, every field of its declared type."""
    if not isinstance(values, dict):
        raise ValueError(f"{where} is no JSON object")
    assert dataclasses.is_dataclass(cls)
    names = {field.name for field in dataclasses.fields(cls)}
    for problem, found in (("misses", names - values.keys()), ("does not know", values.keys() - names)):
        optional = {"summary"} if problem == "misses" else set()
        if found - optional:
            raise ValueError(f"{where} {problem} {sorted(found - optional)[0]!r}"[:200])
    hints = _hints(cls)
    return cls(**{name: _value(hints[name], value, f"{where}.{name}") for name, value in values.items()})


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _value(hint: Any, value: Any, where: str) -> Any:
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        assert isinstance(hint, type)
        return _made(hint, value, where)
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in inner:
            return None
        kinds = [kind for kind in inner if kind is not type(None)]
        chosen = next((kind for kind in kinds if isinstance(value, typing.get_origin(kind) or kind)), kinds[-1])
        return _value(chosen, value, where)
    if origin is list and isinstance(value, list):
        return [_value(inner[0], one, f"{where}[{n}]") for n, one in enumerate(value)]
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < MOST:
        return float(value)
    if hint is int and isinstance(value, int) and abs(value) >= MOST:
        raise ValueError(f"{where} is too large")
    expected = origin or hint
    if not isinstance(value, expected) or (isinstance(value, bool) and expected is not bool) or expected is float:
        raise ValueError(f"{where} is {type(value).__name__}, not {expected.__name__}")
    return value


def _check_step(step: StepTrace) -> None:
    """What its numbers point at exists."""
    _require(step.kind in ("prefill", "plain", "tree"), f"kind {step.kind[:20]!r} is none")
    _require(
        len(step.token_ids) == len(step.origins) == len(step.pieces), "tokens, pieces and origins differ in number"
    )
    _require(all(0 <= origin <= MAX_DEPTH for origin in step.origins), "an origin is no depth")
    _require(min(step.draft_ms, step.verify_ms, step.t_ms) >= 0, "a time is negative")
    num_rows = 1
    if step.tree is not None:
        num_rows = len(step.tree.token_ids)
        _check_tree(step.tree)
    _require(step.kind != "tree" or (step.tree is not None and bool(step.layers)), "a tree step has no tree or layers")
    sizes = {len(layer.score) for layer in step.layers}
    _require(len(sizes) <= 1, "layers differ in experts")
    for layer in step.layers:
        _check_layer(layer, num_rows)
    _require(len({len(layer.ids) for layer in step.layers}) <= 1, "layers differ in how many experts a row has")


def _check_tree(tree: TreeTrace) -> None:
    lengths = {len(getattr(tree, field.name)) for field in dataclasses.fields(tree)}
    _require(len(lengths) == 1, "the tree's lists differ in length")
    num_rows = lengths.pop()
    _require(1 <= num_rows <= MAX_TREE_TOKENS, f"a tree has 1 to {MAX_TREE_TOKENS} rows, not {num_rows}")
    in_order = all(parent < row for row, parent in enumerate(tree.parents))
    is_rooted = tree.parents[0] == -1 and min(tree.parents[1:], default=0) >= 0
    _require(in_order and is_rooted, "a parent is no earlier row")
    on_path = all(not yes or row == 0 or tree.accepted[tree.parents[row]] for row, yes in enumerate(tree.accepted))
    _require(tree.accepted[0] and on_path, "what was accepted is no path from the root")
    depths = [0 if parent < 0 else tree.depths[parent] + 1 for parent in tree.parents]
    _require(depths == tree.depths, "depths are not those of the parents")
    for alternatives in (*tree.target_top, *tree.draft_top):
        _require(len(alternatives) <= MAX_ALTERNATIVES, f"there are more than {MAX_ALTERNATIVES} alternatives")
        for one in alternatives:
            kinds = [type(part) for part in one]
            _require(kinds in ([int, str, float], [int, str, int]), "an alternative is not [id, text, probability]")


def _check_layer(layer: LayerTrace, num_rows: int) -> None:
    num_experts = len(layer.score)
    _require(0 < num_experts <= MAX_EXPERTS, f"layer {layer.layer} has {num_experts} experts")
    try:
        ids, natural = unpack_ids(layer.ids), unpack_ids(layer.natural_ids)
        weights = unpack_weights(layer.weights)
    except (binascii.Error, ValueError) as error:
        raise ValueError(f"routing of layer {layer.layer} is not packed as it should be") from error
    fits = len(ids) == len(weights) and len(ids) % num_rows == 0 and len(natural) in (0, len(ids))
    _require(fits, f"routing of layer {layer.layer} is not that of {num_rows} rows")
    _require(min(layer.score) >= 0, f"a score of layer {layer.layer} is negative")
    _require(bool(np.isfinite(weights).all()), f"a weight of layer {layer.layer} is no number")
    pointed = (*ids.tolist(), *natural.tolist(), *layer.natural, *layer.kept, *layer.active)
    _require(all(0 <= expert < num_experts for expert in pointed), f"layer {layer.layer} names an expert it has not")


def _require(ok: bool, problem: str) -> None:
    if not ok:
        raise ValueError(problem)
