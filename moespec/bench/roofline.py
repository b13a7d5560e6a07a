"""From times of a layer to what they mean: share of the memory's bandwidth, cost of an expert, targets met or missed.

Pure arithmetic on records; owns the targets. Knows nothing of how anything was timed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from moespec.bench.machine import Timing

MIN_FIT_POINTS = 3
FITTED = ("layer", "experts")
MAX_ERROR = 0.02  # of a layer's output against fp32: bf16 products lie below 1e-2
TARGET_SHAPE, TARGET_DTYPE, TARGET_CARD = "Qwen3-30B-A3B", "bfloat16", "H200"
TARGET_TOP_K = 8
# (rows, budget): the least share of the measured read bandwidth; None is no budget
TARGET_SHARES = {(1, None): 0.55, (8, 16): 0.70, (32, 32): 0.82, (64, 32): 0.82, (64, None): 0.88}
TARGET_SELECT_US = 8.0  # 64 rows of 128 experts
BASELINE = "router + grouped_mm"
LEGEND = "Microseconds per layer, medians; with * by the clock on the wall, else by replays of a graph."


@dataclass(frozen=True)
class Fit:
    """median = intercept + slope * experts active, least squares over the budgets at one number of rows.

    contestant      layer, or experts: the same without routing, whose cost need not be that of any other budget
    slope_of_floor  slope / (expert bytes / read bandwidth): 1 where one more expert costs only its bytes
    worst_deviation largest |measured - fitted| / measured
    """

    contestant: str
    num_rows: int
    num_points: int
    intercept_us: float
    slope_us: float
    slope_of_floor: float
    worst_deviation: float


@dataclass(frozen=True)
class Target:
    """What was wanted, what was measured; None where the case was not run."""

    what: str
    num_rows: int
    budget: int | None
    wanted: str
    measured: float | None
    passed: bool | None


def contestant_record(
    timing: Timing, clock: str, num_calls: int, active_bytes: float | None, ceilings: Mapping[str, Any]
) -> dict[str, Any]:
    """One contestant of one case; shares of bandwidth for those that read experts."""
    record = {name: round(value, 2) for name, value in asdict(timing).items()}
    record |= {"clock": clock, "num_calls": num_calls}
    if active_bytes is None:
        return record
    seconds = 1e-6 * timing.median_us
    shares = {kind: active_bytes / ceilings[f"{kind}_bytes_per_s"] / seconds for kind in ("read", "copy")}
    return record | {f"share_of_{kind}": round(share, 4) for kind, share in shares.items()}


def fits(cells: Sequence[Mapping[str, Any]], expert_bytes: int, read_bytes_per_s: float) -> list[Fit]:
    """Of one shape's cells, for each number of rows with three or more different numbers of active experts."""
    found = []
    floor_us = 1e6 * expert_bytes / read_bytes_per_s
    for num_rows in sorted({cell["num_rows"] for cell in cells}):
        timed = [cell for cell in cells if cell["num_rows"] == num_rows and cell["contestants"]]
        for name in FITTED:
            points = [(cell["experts_active"], cell["contestants"][name]["median_us"]) for cell in timed]
            if len({active for active, _ in points}) >= MIN_FIT_POINTS:
                found.append(Fit(name, num_rows, len(points), *_line(points, floor_us)))
    return found


def _line(points: Sequence[tuple[float, float]], floor_us: float) -> tuple[float, float, float, float]:
    """Intercept, slope, slope over the floor, worst deviation."""
    mean_x, mean_y = sum(x for x, _ in points) / len(points), sum(y for _, y in points) / len(points)
    slope = sum((x - mean_x) * (y - mean_y) for x, y in points) / sum((x - mean_x) ** 2 for x, _ in points)
    intercept = mean_y - slope * mean_x
    worst = max(abs(y - intercept - slope * x) / y for x, y in points)
    return round(intercept, 2), round(slope, 3), round(slope / floor_us, 3), round(worst, 3)


def targets(cells: Sequence[Mapping[str, Any]], num_experts: int) -> list[Target]:
    """The project's targets, judged on Qwen3-30B-A3B's cells in bf16. A wrong output passes none."""
    by_case = {(cell["num_rows"], cell["budget"]): cell for cell in cells}
    found = []
    for (num_rows, budget), share in TARGET_SHARES.items():
        cell = by_case.get((num_rows, budget))
        measured = _figure(cell, "layer", "share_of_read")
        found.append(_target("share of the read bandwidth", num_rows, budget, share, measured, cell))
        active = budget or (TARGET_TOP_K if num_rows == 1 else num_experts)
        times = 2.0 if active <= num_experts / 4 else 1.0
        # At the worse ends of both spreads: a win within them is noise.
        theirs, ours = _figure(cell, BASELINE, "p20_us"), _figure(cell, "layer", "p80_us")
        faster = theirs / ours if theirs is not None and ours is not None else None
        on_the_wall = " (on the wall: it waits for the host)" if _figure(cell, BASELINE, "clock") == "plain" else ""
        found.append(_target(f"times as fast as {BASELINE}{on_the_wall}", num_rows, budget, times, faster, cell))
    at_64 = [_figure(cell, "select", "median_us") for cell in cells if cell["num_rows"] == 64]
    select_us = max((us for us in at_64 if us is not None), default=None)
    passed = None if select_us is None else select_us <= TARGET_SELECT_US
    what = "select at its slowest budget, microseconds"
    return [*found, Target(what, 64, None, f"at most {TARGET_SELECT_US:g}", select_us, passed)]


def _figure(cell: Mapping[str, Any] | None, contestant: str, name: str) -> Any:
    return None if cell is None else cell["contestants"].get(contestant, {}).get(name)


def _target(
    what: str, num_rows: int, budget: int | None, least: float, measured: float | None, cell: Mapping[str, Any] | None
) -> Target:
    is_right = cell is not None and cell["error"] is not None and cell["error"] <= MAX_ERROR
    passed = None if measured is None else measured >= least and is_right
    return Target(what, num_rows, budget, f"at least {least:g}", measured and round(measured, 3), passed)


def layer_table(shapes: Sequence[Mapping[str, Any]]) -> str:
    """Every case of every shape as Markdown; microseconds per layer, medians."""
    columns = ["shape", "dtype", "rows", "budget", "active", "MB", "layer µs (p20–p80)", "of read", "of copy"]
    others = ["experts", "select", "load-only", "grouped_mm", BASELINE, "batched_mm", "eager"]
    present = {name for shape in shapes for cell in shape["cells"] for name in cell["contestants"]}
    others = [name for name in others if name in present]
    lines = ["| " + " | ".join(columns + others) + " |", "|---" * (len(columns) + len(others)) + "|"]
    for shape in shapes:
        for cell in shape["cells"]:
            if "failed" in cell:
                continue
            ours = cell["contestants"]["layer"]
            timed = [f"{_median(ours)} {_spread(ours)}", f"{ours['share_of_read']:.2f}", f"{ours['share_of_copy']:.2f}"]
            parts = [shape["name"], shape["dtype"], cell["num_rows"], cell["budget"] or "none"]
            parts += [f"{cell['experts_active']:.1f}", f"{cell['active_bytes'] / 1e6:.1f}", *timed]
            parts += [_median(cell["contestants"].get(name)) for name in others]
            lines.append("| " + " | ".join(map(str, parts)) + " |")
    return "\n".join(lines)


def fit_table(shapes: Sequence[Mapping[str, Any]]) -> str:
    """What one more expert costs, as Markdown."""
    lines = [
        "| shape | dtype | of | rows | µs at no expert | µs per expert | of the floor | worst deviation |",
        "|---" * 8 + "|",
    ]
    for shape in shapes:
        for fit in shape["fits"]:
            lines.append(
                f"| {shape['name']} | {shape['dtype']} | {fit['contestant']} | {fit['num_rows']} "
                f"| {fit['intercept_us']:.1f} "
                f"| {fit['slope_us']:.2f} | {fit['slope_of_floor']:.2f} | {100 * fit['worst_deviation']:.0f} % |"
            )
    return "\n".join(lines)


def target_lines(found: Sequence[Mapping[str, Any]]) -> str:
    """Passed, missed or not measured, one a line."""
    words = {True: "passed", False: "MISSED", None: "not measured"}
    return "\n".join(
        f"- {words[one['passed']]}: {one['what']}, {one['num_rows']} rows, budget {one['budget'] or 'none'}: "
        f"{'–' if one['measured'] is None else one['measured']}, {one['wanted']}"
        for one in found
    )


def _spread(one: Mapping[str, Any]) -> str:
    return f"({one['p20_us']:.1f}–{one['p80_us']:.1f})"


def _median(one: Mapping[str, Any] | None) -> str:
    return "–" if one is None else f"{one['median_us']:.1f}{'*' if one['clock'] == 'plain' else ''}"
