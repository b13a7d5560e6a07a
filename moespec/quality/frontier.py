"""The frontier as a picture: exact match against tokens per second, one line per policy and score.

Owns the figure, a plain Plotly specification, and the page that shows it without a network. Imports no plotting
library: the page carries the script that the package plotly ships. Knows nothing of how quality was measured.
"""

from __future__ import annotations

import importlib.resources
import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from moespec.quality.summary import MARGIN, ArmQuality, Estimate

SYMBOLS = ("circle", "square", "diamond", "triangle-up", "x")


def frontier_figure(entries: Sequence[ArmQuality], temperature: float) -> dict[str, Any]:
    """{"data", "layout"} for Plotly. An arm without scored answers is not in it."""
    lines: dict[str, list[tuple[int, ArmQuality]]] = defaultdict(list)
    references = []
    for entry in entries:
        if entry.temperature != temperature or entry.overall is None:
            continue
        name, budget = _line_and_budget(entry.arm)
        if budget is None:
            references.append(entry)
        else:
            lines[name].append((budget, entry))
    data = [_trace(name, sorted(points, key=lambda point: point[0]), SYMBOLS[n % len(SYMBOLS)])
            for n, (name, points) in enumerate(sorted(lines.items()))]  # fmt: skip
    data += [_trace(f"no budget ({entry.arm})", [(0, entry)], "star") for entry in references]
    return {
        "data": data,
        "layout": {
            "title": {"text": f"Quality against speed, temperature {temperature:g}"},
            "xaxis": {"title": {"text": "tokens/s"}},
            "yaxis": {"title": {"text": "exact match, all families"}, "tickformat": ".0%"},
            "shapes": [_margin_line(entry) for entry in references],
            "legend": {"orientation": "h", "y": -0.2},
        },
    }


def plotly_script() -> str:
    """The script that draws figures. ValueError without the package plotly."""
    try:
        return importlib.resources.files("plotly").joinpath("package_data/plotly.min.js").read_text(encoding="utf-8")
    except (ModuleNotFoundError, FileNotFoundError) as error:
        raise ValueError("--plot needs the package plotly: pip install plotly.") from error


def write_page(figures: Sequence[dict[str, Any]], path: Path) -> None:
    """One HTML file that needs nothing else, with a figure below the other."""
    drawn = json.dumps(figures).replace("</", "<\\/")
    draw = "figures.forEach((f, n) => Plotly.newPlot('frontier' + n, f.data, f.layout, {responsive: true}))"
    places = "".join(f'<div id="frontier{n}" style="height:90vh"></div>' for n in range(len(figures)))
    path.write_text(
        f'<!doctype html><meta charset="utf-8"><title>Quality against budget</title><script>{plotly_script()}</script>'
        f"{places}<script>const figures = {drawn}; {draw}</script>",
        encoding="utf-8",
    )


def _line_and_budget(arm: str) -> tuple[str, int | None]:
    """moe-spec:substitution:16:natural@8,4,3,0 is 16 on the line substitution:natural@8,4,3,0; eagle3 has no budget."""
    name, mark, tree = arm.partition("@")
    method, *parts = name.split(":")
    if method != "moe-spec":
        return arm, None
    policy, budget, *score = parts
    return ":".join([policy, *score]) + mark + tree, int(budget)


def _trace(name: str, points: list[tuple[int, ArmQuality]], symbol: str) -> dict[str, Any]:
    overall = [cast(Estimate, entry.overall) for _, entry in points]  # arms without are not drawn
    return {
        "type": "scatter",
        "name": name,
        "mode": "lines+markers+text",
        "x": [round(entry.tokens_per_s, 1) for _, entry in points],
        "y": [round(found.mean, 4) for found in overall],
        "text": [f"B={budget}" if budget else "" for budget, _ in points],
        "textposition": "top center",
        "marker": {"symbol": symbol, "size": 9},
        "error_y": {
            "type": "data",
            "symmetric": False,
            "array": [round(found.high - found.mean, 4) for found in overall],
            "arrayminus": [round(found.mean - found.low, 4) for found in overall],
            "thickness": 1,
        },
    }


def _margin_line(entry: ArmQuality) -> dict[str, Any]:
    """Where a budget would have lost more than the margin."""
    assert entry.overall is not None
    level = entry.overall.mean - MARGIN
    return {
        "type": "line",
        "xref": "paper",
        "x0": 0,
        "x1": 1,
        "y0": level,
        "y1": level,
        "line": {"dash": "dot", "width": 1},
    }
