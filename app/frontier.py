"""What quality costs in speed: the committed record of the embedded model, and what the paper is reported to reach.

Owns how records become figures and tables, and which settings a point stands for. Pure; knows nothing of widgets. What
is measured is drawn solid. What is reported is of other models on other axes, and stands in a table of its own.
"""

from __future__ import annotations

import functools
import json
import lzma
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import plotly.graph_objects as go

from app.plots import GRID, INK, in_both_themes
from app.settings import Settings
from moespec.quality.frontier import frontier_figure
from moespec.quality.summary import MARGIN, ArmQuality, summarise

RECORD = Path(__file__).resolve().parent.parent / "assets" / "bench" / "frontier-cpu.jsonl.xz"
# Of middle lightness, for both themes. Symbols tell lines apart without them.
COLOURS = ("#0d9488", "#8b6fd0", "#c2760c", "#5b84b1")
Table = dict[str, Any]  # what `points.points_table` shows


@dataclass(frozen=True)
class Reported:
    """A result of the paper: times plain decoding, without a budget and with one."""

    model: str
    task: str
    budget: str
    unbudgeted: float
    budgeted: float


# arXiv 2602.16052 as others' notes give it, on an A100 with 80 GB at batch 1. The quality that each kept is not given.
REPORTED = (
    Reported("OLMoE-1B-7B", "MATH500", "32 of 64", 2.1, 2.5),
    Reported("Qwen3-30B-A3B", "GSM8K", "64 of 128", 1.9, 2.4),
    Reported("Mixtral-8x7B", "MBPP", "4 to 6 of 8", 1.7, 2.3),
)


@dataclass(frozen=True)
class Committed:
    """What was measured on which device; `reference` is without a budget."""

    device: dict[str, Any]
    entries: Sequence[ArmQuality]

    @property
    def reference(self) -> ArmQuality:
        return next(entry for entry in self.entries if entry.difference is None)


@functools.cache
def committed() -> Committed:
    """The committed record, summed up: half a second, the first time."""
    with lzma.open(RECORD, "rt", encoding="utf-8") as file:
        header, *records = [json.loads(line) for line in file]
    return Committed(header["settings"]["device"], summarise(records))


def settings_of(arm: str) -> Settings:
    """The page's settings of an arm of the record, such as `moe-spec:substitution:12@16,8,3,0.12`."""
    from moespec.bench.arms import parse_arm  # here, because torch takes seconds

    parsed = parse_arm(arm)
    assert parsed.tree is not None and parsed.budget is not None
    tree, budget = parsed.tree, parsed.budget
    return Settings.from_json(
        {name: getattr(budget, name) for name in ("budget", "policy", "score", "row_weight", "protect_root")}
        | {name: getattr(tree, name) for name in ("total_tokens", "depth", "top_k", "min_path_p")}
    )


def in_words(settings: Settings) -> str:
    """How much is loaded and how far is guessed, in a line."""
    return f"{_loaded(settings)}, {_guessed(settings)}"


def committed_figure(record: Committed) -> go.Figure:
    """Exact match against tokens/s. A point's customdata are its settings, as JSON."""
    by_arm = {entry.arm: entry for entry in record.entries}
    figure = go.Figure(frontier_figure(record.entries, 0.0))
    for trace, colour in zip(figure.data, COLOURS, strict=True):
        found = [by_arm[arm] for arm in trace.customdata]
        settings = [settings_of(entry.arm) for entry in found]
        trace.update(
            name=_line_name(trace.name),
            mode="markers" if found == [record.reference] else "lines+markers+text",
            line_color=colour,
            customdata=[json.dumps(one.changed()) for one in settings],
            hovertext=[
                "<br>".join([in_words(one), *_facts(entry)]) for one, entry in zip(settings, found, strict=True)
            ],
            hovertemplate="%{hovertext}<extra></extra>",
        )
    figure.update_shapes(line_color=INK)
    figure.update_layout(title=None, hovermode="closest", legend={"orientation": "h", "y": -0.18, "x": 0})
    figure.update_xaxes(title_text="tokens/s, measured", gridcolor=GRID, zeroline=False)
    figure.update_yaxes(title_text="exact match against no budget, points", gridcolor=GRID, zerolinecolor=GRID)
    return in_both_themes(figure, height=430)


def committed_table(record: Committed) -> Table:
    """The figure's points, a row each."""
    unbudgeted = record.reference.tokens_per_s
    return {
        "caption": f"The points of the figure, measured; {_guessed(settings_of(record.reference.arm))}",
        "columns": ["setting", "tokens/s", "times no budget", "exact match, points", "same next token", "experts read"],
        "rows": [
            {
                "name": _loaded(settings := settings_of(entry.arm)),
                "cells": [
                    f"{entry.tokens_per_s:,.0f}",
                    f"{entry.tokens_per_s / unbudgeted:.2f}",
                    _difference(entry),
                    "–" if entry.agreement is None else f"{100 * entry.agreement:.1f} %",
                    "–" if entry.experts_active is None else f"{entry.experts_active:.1f}",
                ],
                "settings": settings.changed(),
            }
            for entry in record.entries
        ],
    }


def committed_note(record: Committed) -> str:
    """What was measured, and how a difference is to be read."""
    device, overall = record.device, record.reference.overall
    assert overall is not None
    return (
        f"Measured, greedy, over {overall.n:,} held-out questions on {device['name']}, {device['threads']} threads. "
        f"Without a budget the embedded model answers {100 * overall.mean:.1f} % exactly at "
        f"{record.reference.tokens_per_s:,.0f} tokens/s; a point is what a budget adds to that, question by question, "
        f"with its 95 % interval. Dotted: {100 * MARGIN:g} points lost."
    )


def reported_table() -> Table:
    """What the paper is reported to reach: other models, no quality by cell, so not on the figure's axes."""
    return {
        "caption": "Times plain decoding, as reported of the paper",
        "columns": ["model, task", "experts", "EAGLE-3", "MoE-Spec", "gain"],
        "rows": [
            {
                "name": f"{one.model}, {one.task}",
                "cells": [
                    one.budget,
                    f"{one.unbudgeted} ×",
                    f"{one.budgeted} ×",
                    f"{one.budgeted / one.unbudgeted:.2f}",
                ],
            }
            for one in REPORTED
        ],
    }


def reported_note(record: Committed) -> str:
    """The one figure that both have: the gain over the same drafting without a budget."""
    speeds = {settings_of(entry.arm): entry.tokens_per_s for entry in record.entries}
    gain = speeds[Settings()] / record.reference.tokens_per_s
    return (
        "Reported, not measured by us: arXiv 2602.16052, read in others' notes on it; A100 with 80 GB, batch 1. The "
        "quality that each of these kept is not reported, so they have no place on the axes beside. What both have is "
        f"the gain over the same drafting without a budget: {gain:.2f} for the embedded model at B = {Settings.budget} "
        "of 64, measured."
    )


def _guessed(settings: Settings) -> str:
    tree = ",".join(f"{number:g}" for number in settings.tree_config.numbers)
    return "plain decoding" if settings.drafter == "none" else f"tree {tree}"


def _loaded(settings: Settings) -> str:
    if settings.method:
        return settings.method
    if settings.budget is None:
        return "no budget"
    score = "the paper's score" if settings.score == "softmax" else "natural weights"
    rows = {"uniform": "", "depth": " by depth", "path": " by path"}[settings.row_weight]
    root = ", root protected" if settings.protect_root else ""
    return f"B = {settings.budget}, {settings.policy}, {score}{rows}{root}"


def _line_name(name: str) -> str:
    """`substitution:natural+path@16,8,3,0.12` without its tree, and the reference without its share."""
    policy, _, score = name.partition("@")[0].partition(":")
    return f"{policy}, {score}" if score and policy != "no budget" else policy


def _facts(entry: ArmQuality) -> list[str]:
    lines = [f"{entry.tokens_per_s:,.0f} tokens/s", f"exact match {_difference(entry)} points"]
    if entry.agreement is not None:
        lines.append(f"{100 * entry.agreement:.1f} % of next tokens the same")
    if entry.experts_active is not None:
        lines.append(f"{entry.experts_active:.1f} experts read per layer")
    return lines


def _difference(entry: ArmQuality) -> str:
    found = entry.difference
    if found is None:
        return "the reference"
    mean, low, high = (100 * one for one in (found.mean, found.low, found.high))
    return f"{mean:+.1f} ({low:+.1f} to {high:+.1f})".replace("-", "−")
