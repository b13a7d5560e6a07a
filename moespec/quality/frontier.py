"""The frontier as a picture: exact match against tokens per second, one line per policy and score.

Exact match is drawn as what a budget adds to that of its unbudgeted reference, whose share the legend gives: the paired
interval shows what the two shares' own, much wider ones would hide.

Owns the figure, a plain Plotly specification, and the page that shows it without a network. Imports no plotting
library: the page carries the script that the package plotly ships. Knows nothing of how quality was measured.
"""

from __future__ import annotations

import importlib.resources
import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from moespec.quality.summary import MARGIN, ArmQuality, Estimate

# Symbol of a line's points and place of their labels, so that lines near each other can be told apart.
STYLES = (
    ("circle", "top center"),
    ("square", "bottom center"),
    ("diamond", "top right"),
    ("triangle-up", "bottom left"),
)
# Of the figure's width and height: where a label's middle is from its point, and how large the label is.
LABEL_AT = {
    "top center": (0.0, 0.04),
    "bottom center": (0.0, -0.04),
    "top right": (0.03, 0.03),
    "bottom left": (-0.03, -0.03),
}
LABEL_SIZE = (0.05, 0.05)


# What a budget may not lose: its interval must end above.
MARGIN_LINE: dict[str, Any] = {
    "type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": -100 * MARGIN, "y1": -100 * MARGIN,
    "line": {"dash": "dot", "width": 1},
}  # fmt: skip


def frontier_figure(entries: Sequence[ArmQuality], temperature: float) -> dict[str, Any]:
    """{"data", "layout"} for Plotly. An arm without scored answers, or without its reference, is not in it."""
    lines: dict[str, list[tuple[_Place, ArmQuality]]] = defaultdict(list)
    references = []
    for entry in entries:
        if entry.temperature != temperature or entry.overall is None:
            continue
        name, place = _line_and_place(entry.arm)
        if place is None:
            no_budget = f"no budget: {entry.overall.mean:.1%} ({entry.arm})"
            references.append(_trace(no_budget, [(_Place(0.0, ""), entry)], "star"))
        elif entry.difference is not None:
            lines[name].append((place, entry))
    data = [_trace(name, sorted(points, key=lambda point: point[0]), *STYLES[n % len(STYLES)])
            for n, (name, points) in enumerate(sorted(lines.items()))]  # fmt: skip
    _leave_out_crowded_labels(data)
    data += references
    return {
        "data": data,
        "layout": {
            "title": {"text": f"Quality against speed, temperature {temperature:g}"},
            "xaxis": {"title": {"text": "tokens/s"}},
            "yaxis": {"title": {"text": "exact match against no budget, points (paired 95 % interval)"}},
            "shapes": [MARGIN_LINE],
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


class _Place(NamedTuple):
    """Where an arm stands on its line, and what its point is called there."""

    size: float
    label: str


def _line_and_place(arm: str) -> tuple[str, _Place | None]:
    """moe-spec:substitution:16:natural@8,4,3,0 is B=16 on the line substitution:natural@8,4,3,0.

    And sere:s=2,rho=0.3 is s=2 on sere:rho=0.3: a policy's first number is its size. eagle3 has no place.
    """
    name, mark, tree = arm.partition("@")
    method, *parts = name.split(":")
    if method == "eagle3":
        return arm, None
    if method == "moe-spec" and "=" not in name:
        policy, budget, *score = parts
        return ":".join([policy, *score]) + mark + tree, _Place(float(budget), f"B={budget}")
    first, _, others = "".join(parts).partition(",")
    size = first.partition("=")[2]
    is_size = size.replace(".", "", 1).isdecimal()
    line = ":".join(filter(None, [method, others if is_size else "".join(parts)]))
    return line + mark + tree, _Place(float(size), first) if is_size else _Place(0.0, "")


def _leave_out_crowded_labels(lines: list[dict[str, Any]]) -> None:
    """Smaller budgets are named first, a label that would lie on another is left out: hovering names every point."""
    x_all, y_all = ([value for line in lines for value in line[axis]] for axis in "xy")
    width, height = (max(values, default=0) - min(values, default=0) or 1 for values in (x_all, y_all))
    named: list[tuple[float, float]] = []
    for place in range(max((len(line["text"]) for line in lines), default=0)):
        for line in lines:
            if place >= len(line["text"]):
                continue
            aside, above = LABEL_AT[line["textposition"]]
            x, y = line["x"][place] / width + aside, line["y"][place] / height + above
            if any(abs(x - other_x) < LABEL_SIZE[0] and abs(y - other_y) < LABEL_SIZE[1] for other_x, other_y in named):
                line["text"][place] = ""
            else:
                named.append((x, y))


def _trace(
    name: str, points: list[tuple[_Place, ArmQuality]], symbol: str, label_place: str = "top center"
) -> dict[str, Any]:
    differences = [entry.difference or Estimate(0.0, 0.0, 0.0, 0) for _, entry in points]
    return {
        "type": "scatter",
        "name": name,
        "mode": "lines+markers+text",
        "x": [round(entry.tokens_per_s, 1) for _, entry in points],
        "y": [round(100 * found.mean, 2) for found in differences],
        "text": [place.label for place, _ in points],
        "hovertext": [place.label for place, _ in points],
        "customdata": [entry.arm for _, entry in points],  # what a point is: a page may ask for its settings
        "textposition": label_place,
        "textfont": {"size": 10},
        "marker": {"symbol": symbol, "size": 9},
        "error_y": {
            "type": "data",
            "symmetric": False,
            "array": [round(100 * (found.high - found.mean), 2) for found in differences],
            "arrayminus": [round(100 * (found.mean - found.low), 2) for found in differences],
            "thickness": 1,
        },
    }
