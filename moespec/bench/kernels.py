"""`python -m moespec bench kernels`: one MoE layer by rows and budget, against what the memory allows and transformers.

Owns the order of things and the record. On CUDA every contestant that never waits for the host is timed by replays of
a graph of all layers, interleaved; the others by the clock on the wall, and marked so. On the CPU the same runs with
the backend that the engine has there. All that is known on an H200 within five minutes:

    python -m moespec bench kernels --shapes Qwen3-30B-A3B OLMoE-1B-7B --seconds-limit 270 --json > $OUT/kernels.json

The card can be smaller: Qwen3-30B's 48 layers take 58 GB, an H100 holds them, and a record says how many were used.
With `--sweep` tiles are tried first, some three minutes a shape, and the best written to `kernels/tiles.json`, which
must be fetched, too: `--shapes Qwen3-30B-A3B --sweep --rows 1 8 32 64 --budgets 16 32 none --seconds-limit 400`.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from moespec.bench.layer_contestants import cpu_contest, kernel_contest
from moespec.bench.layer_times import relative_error, time_contest
from moespec.bench.layers import (
    EMBEDDED,
    Layers,
    build_layers,
    cache_bytes,
    find_shape,
)
from moespec.bench.machine import machine_card, measure_ceilings
from moespec.bench.roofline import (
    TARGET_CARD,
    TARGET_DTYPE,
    TARGET_SHAPE,
    TARGET_SHARES,
    contestant_record,
    fits,
    targets,
)
from moespec.bench.routings import BUDGETS, ROWS, Case, cases, random_rows, route
from moespec.cost import WORKED_SHAPES

SELECT = "select"  # reads no expert


@dataclass(frozen=True)
class Settings:
    """What is measured. `shapes`, `dtypes`: None for what suits the device."""

    shapes: Sequence[str] | None = None
    dtypes: Sequence[str] | None = None
    rows: Sequence[int] = ROWS
    budgets: Sequence[int | None] = BUDGETS
    sweeps: bool = False
    seconds_limit: float | None = None
    note: str | None = None

    def __post_init__(self) -> None:
        for num_rows in self.rows:
            if not 1 <= num_rows <= max(ROWS):
                raise ValueError(f"rows={num_rows} is not allowed: a step has 1 to {max(ROWS)} rows.")
        for budget in self.budgets:
            if budget is not None and budget < 1:
                raise ValueError(f"budget={budget} is not allowed: use 1 or more, or none.")
        if self.seconds_limit is not None and self.seconds_limit <= 0:
            raise ValueError(f"seconds-limit={self.seconds_limit} is not allowed: use more than 0.")


@dataclass(frozen=True)
class Bench:
    """A run: of what, where, against which ceilings, until when."""

    settings: Settings
    device: torch.device
    card: dict[str, Any]
    deadline_s: float | None

    @property
    def is_over(self) -> bool:
        return self.deadline_s is not None and time.monotonic() > self.deadline_s


def bench_kernels(settings: Settings, device: torch.device) -> dict[str, Any]:
    """The record, JSON-safe. ValueError in one sentence for what cannot be measured here."""
    is_cuda = device.type == "cuda"
    if settings.sweeps and not is_cuda:
        raise ValueError("the sweep times tiles of Triton kernels: it needs a CUDA device, and this run has none.")
    names = settings.shapes or (tuple(WORKED_SHAPES) if is_cuda else (EMBEDDED,))
    dtypes = settings.dtypes or (("bfloat16",) if is_cuda else ("float32",))
    shapes = [find_shape(name) for name in names]
    began_s = time.monotonic()
    limit_s = None if settings.seconds_limit is None else began_s + settings.seconds_limit
    card = machine_card(device)
    if is_cuda:
        torch.cuda.empty_cache()  # the ceilings' buffers
    _progress(json.dumps(card))
    runs = [(shape, dtype) for shape in shapes for dtype in dtypes]
    records, skipped = [], []
    for number, (shape, dtype) in enumerate(runs):
        # Time is shared evenly, and what one leaves the next may use.
        now_s = time.monotonic()
        deadline_s = None if limit_s is None else now_s + (limit_s - now_s) / (len(runs) - number)
        try:
            layers = build_layers(shape, dtype, device, for_kernels=is_cuda)
        except ValueError as error:
            if len(runs) == 1:
                raise
            skipped.append({"shape": shape.name, "dtype": dtype, "reason": str(error)})
            continue
        records.append(_shape_record(layers, Bench(settings, device, card, deadline_s)))
        del layers
        if is_cuda:
            torch.cuda.empty_cache()
    judged = next((one for one in records if (one["name"], one["dtype"]) == (TARGET_SHAPE, TARGET_DTYPE)), None)
    found = [] if judged is None else [asdict(one) for one in targets(judged["cells"], judged["num_experts"])]
    return {
        "bench": "kernels",
        "schema": 1,
        "device": card,
        "ceilings_after": asdict(measure_ceilings(device)),  # how far the machine moved meanwhile
        "note": settings.note,
        "seconds": round(time.monotonic() - began_s, 1),
        "shapes": records,
        "targets": {"are_for": TARGET_CARD, "is_that_card": TARGET_CARD in card["name"], "list": found},
        "skipped": skipped,
    }


def _shape_record(layers: Layers, bench: Bench) -> dict[str, Any]:
    """All cases of one shape and number format; those that targets are set for come first."""
    shape, settings = layers.shape, bench.settings
    num_layers, layer_bytes = len(layers.layers), layers.expert_bytes * shape.num_experts
    _progress(f"{shape.name} {layers.dtype_name}: {num_layers} layers, {num_layers * layer_bytes / 1e9:.1f} GB")
    swept: list[dict[str, Any]] = []
    if settings.sweeps:
        from moespec.bench.sweep import sweep, write_tiles

        swept = sweep(layers, bench.device, _progress, lambda: bench.is_over)
        write_tiles(swept)
    wanted = cases(shape, settings.rows, settings.budgets)
    if not wanted:
        raise ValueError(
            f"budgets {settings.budgets} leave nothing to measure: {shape.name} takes {shape.top_k} or more."
        )
    cells, left = [], []
    for case in sorted(wanted, key=lambda case: (case.num_rows, case.budget) not in TARGET_SHARES):
        if bench.is_over:
            left.append([case.num_rows, case.budget])
            continue
        cells.append(_cell(layers, case, bench))
        _progress(_line(shape.name, cells[-1]))
    order = {(case.num_rows, case.budget): place for place, case in enumerate(wanted)}
    cells.sort(key=lambda cell: order[cell["num_rows"], cell["budget"]])
    read_bytes_per_s = bench.card["ceilings"]["read_bytes_per_s"]
    return {
        "name": shape.name,
        "dtype": layers.dtype_name,
        "backend": layers.backend.name,
        "num_experts": shape.num_experts,
        "top_k": shape.top_k,
        "expert_bytes": layers.expert_bytes,
        "num_layers": num_layers,
        "num_layers_of_model": shape.num_layers,
        "weights_bytes": num_layers * layer_bytes,
        "cache_bytes": cache_bytes(bench.device),
        "cells": cells,
        "not_reached": left,
        "fits": [asdict(fit) for fit in fits(cells, layers.expert_bytes, read_bytes_per_s)],
        "swept": swept,
    }


def _cell(layers: Layers, case: Case, bench: Bench) -> dict[str, Any]:
    """One case, timed. What fails is said in the cell and loses no other: device time is short."""
    record: dict[str, Any] = {"num_rows": case.num_rows, "budget": case.budget}
    try:
        x_TD = random_rows(layers, case.num_rows, bench.device)
        make = kernel_contest if bench.device.type == "cuda" else cpu_contest
        contest = make(layers, case, route(layers, case, x_TD), x_TD)
        active_bytes = contest.num_active * layers.expert_bytes
        timed, error_share = time_contest(contest, active_bytes, bench.device), relative_error(contest)
    except Exception as error:  # out of memory, and whatever Triton's compiler or a driver raises
        return record | {"failed": f"{type(error).__name__}: {error}", "contestants": {}, "error": None}
    return record | {
        "experts_active": contest.num_active,
        "active_bytes": round(active_bytes),
        "error": float(f"{error_share:.2e}"),
        "contestants": {
            name: contestant_record(
                timing, clock, num_calls, None if name == SELECT else active_bytes, bench.card["ceilings"]
            )
            for name, (timing, clock, num_calls) in timed.items()
        },
        "skipped": dict(contest.skipped),
    }


def _progress(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _line(name: str, cell: dict[str, Any]) -> str:
    where = f"{name}: {cell['num_rows']} rows, budget {cell['budget'] or 'none'}"
    if "layer" not in cell["contestants"]:
        return f"{where}: {cell['failed']}"
    us, share = (cell["contestants"]["layer"][name] for name in ("median_us", "share_of_read"))
    return f"{where}: {us:.1f} us, {share:.2f} of the read bandwidth, error {cell['error']:.1e}"
