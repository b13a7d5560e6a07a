"""From measurements to the record: one row per arm, the ratios that matter, and the table a person reads.

Owns the statistics. Speeds are per prompt; their ratios are paired by prompt, medians with a bootstrap interval.
Knows nothing of how anything was measured.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Sequence
from typing import Any

from moespec.bench.measure import ArmMeasurements
from moespec.trace import RunSummary

NUM_RESAMPLES = 2000


def arm_record(measured: ArmMeasurements) -> dict[str, Any]:
    """One arm's row of the record; None where a figure does not apply to the arm."""
    summaries, replays = measured.summaries, measured.replays
    return {
        "name": measured.arm.name,
        "tree": measured.arm.tree_numbers,
        "tokens_per_s": _spread(measured.tokens_per_s),
        "tokens_per_step": _mean(summaries, lambda s: s.tokens_per_step),
        "draft_ms": _mean(summaries, lambda s: s.draft_ms / s.num_steps),
        "verify_ms": _mean(summaries, lambda s: s.verify_ms / s.num_steps),
        "other_ms": _mean(summaries, lambda s: s.other_ms / s.num_steps),
        "experts_natural": _mean(summaries, lambda s: s.experts_natural),
        "experts_kept": _mean(summaries, lambda s: s.experts_kept),
        "experts_active": _mean(summaries, lambda s: s.experts_active),
        "mass_kept": _mean(summaries, lambda s: s.mass_kept, digits=4),
        "agreement_top1": _share(measured.agreement),
        "agreement_top1_own_kv": _share(measured.agreement_own_kv),
        "equal_prefix": round(statistics.mean(measured.equal_prefix), 2),
        "replay": {
            "tokens_per_step": _mean(replays, lambda s: s.tokens_per_step),
            "step_ms": _mean(replays, lambda s: (s.draft_ms + s.verify_ms + s.other_ms) / s.num_steps),
            "tokens_per_s": _mean(replays, lambda s: s.tokens_per_s, digits=1),
        }
        if replays
        else None,
    }


def ratios(all_measured: Sequence[ArmMeasurements]) -> list[dict[str, Any]]:
    """Is plain fast, does speculation pay, does the budget pay on top? Those that can be asked, each side at its best.

    Last, the budget of 16 against none at the same tree: what it saves where the tree is given.
    """
    best = {
        "transformers": _best(all_measured, lambda name: name == "transformers"),
        "plain": _best(all_measured, lambda name: name == "plain"),
        "eagle3": _best(all_measured, lambda name: name == "eagle3"),
        "moe-spec at 16": _best(all_measured, lambda name: name.startswith("moe-spec:") and name.split(":")[2] == "16"),
    }
    found = []
    for over, under in (("plain", "transformers"), ("eagle3", "plain"), ("moe-spec at 16", "eagle3")):
        ours, theirs = best[over], best[under]
        if ours is not None and theirs is not None:
            found.append(_compared(ours, theirs))
    unbudgeted = {measured.arm.tree: measured for measured in all_measured if measured.arm.name == "eagle3"}
    for measured in all_measured:
        if measured.arm.name == "moe-spec:substitution:16" and measured.arm.tree in unbudgeted:
            compared = _compared(measured, unbudgeted[measured.arm.tree])
            if compared not in found:
                found.append(compared)
    return found


def _compared(ours: ArmMeasurements, theirs: ArmMeasurements) -> dict[str, Any]:
    return {"of": ours.arm.key, "to": theirs.arm.key} | paired_ratio(ours.tokens_per_s, theirs.tokens_per_s)


def paired_ratio(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, Any]:
    """Median over prompts of ours / theirs, and a 95 % interval of it from resampled prompts (seed 0)."""
    by_prompt = [one / other for one, other in zip(ours, theirs, strict=True)]
    rng = random.Random(0)
    medians = sorted(statistics.median(rng.choices(by_prompt, k=len(by_prompt))) for _ in range(NUM_RESAMPLES))
    low, high = medians[int(0.025 * NUM_RESAMPLES)], medians[int(0.975 * NUM_RESAMPLES)]
    return {"median": round(statistics.median(by_prompt), 3), "interval_95": [round(low, 3), round(high, 3)]}


def table(records: Sequence[dict[str, Any]]) -> str:
    """The rows as Markdown, for the terminal and the README."""
    columns = "arm | tree | tokens/s (p20–p80) | tokens/step | draft + verify + other ms"
    lines = [f"| {columns} | experts in trees | mass | agreement |", "|---|---|---|---|---|---|---|---|"]
    for row in records:
        speed = row["tokens_per_s"]
        timed = row["verify_ms"] is not None
        parts = " + ".join(f"{row[name]:.1f}" for name in ("draft_ms", "verify_ms", "other_ms")) if timed else "–"
        experts = (
            "–" if row["experts_natural"] is None else f"{row['experts_active']:.1f} of {row['experts_natural']:.1f}"
        )
        lines.append(
            f"| {row['name']} | {_or_dash(row['tree'])} "
            f"| {speed['median']:.0f} ({speed['p20']:.0f}–{speed['p80']:.0f}) "
            f"| {_or_dash(row['tokens_per_step'])} | {parts} | {experts} | {_or_dash(row['mass_kept'])} "
            f"| {_or_dash(row['agreement_top1'])} |"
        )
    return "\n".join(lines)


def _best(all_measured: Sequence[ArmMeasurements], is_one: Callable[[str], bool]) -> ArmMeasurements | None:
    matching = [measured for measured in all_measured if is_one(measured.arm.name)]
    return max(matching, key=lambda measured: statistics.median(measured.tokens_per_s), default=None)


def _spread(values: Sequence[float]) -> dict[str, float]:
    ordered = sorted(values)
    last = len(ordered) - 1
    return {
        "median": round(statistics.median(ordered), 2),
        "p20": round(ordered[round(0.2 * last)], 2),
        "p80": round(ordered[round(0.8 * last)], 2),
    }


def _mean(
    summaries: Sequence[RunSummary], value: Callable[[RunSummary], float | None], digits: int = 3
) -> float | None:
    values = [found for found in map(value, summaries) if found is not None]
    return round(statistics.mean(values), digits) if values else None


def _share(answers: Sequence[Sequence[bool]]) -> float | None:
    flat = [answer for by_prompt in answers for answer in by_prompt]
    return round(sum(flat) / len(flat), 4) if flat else None


def _or_dash(value: object) -> str:
    if isinstance(value, list):
        return ",".join(f"{part:g}" for part in value)
    return "–" if value is None else str(value)
