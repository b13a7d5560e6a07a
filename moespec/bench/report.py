"""From measurements to the record: one row per arm, the ratios that matter, and the table a person reads.

Knows nothing of how anything was measured, nor of the statistics of speed (`timed.py`).
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

from moespec.bench.measure import ArmMeasurements
from moespec.bench.timed import overall, paired_ratio, speeds
from moespec.trace import RunSummary


def arm_record(measured: ArmMeasurements) -> dict[str, Any]:
    """One arm's row of the record; None where a figure does not apply to the arm."""
    summaries, replays = measured.summaries, measured.replays
    return {
        "name": measured.arm.name,
        "tree": measured.arm.tree_numbers,
        "tokens_per_s": speeds(measured.timed),
        "tokens_per_step": _per_step(summaries, lambda s: len(s.token_ids) - 1),
        "draft_ms": _per_step(summaries, lambda s: s.draft_ms),
        "verify_ms": _per_step(summaries, lambda s: s.verify_ms),
        "other_ms": _per_step(summaries, lambda s: s.other_ms),
        "experts_natural": _mean(summaries, lambda s: s.experts_natural),
        "experts_kept": _mean(summaries, lambda s: s.experts_kept),
        "experts_active": _mean(summaries, lambda s: s.experts_active),
        "mass_kept": _mean(summaries, lambda s: s.mass_kept, digits=4),
        "num_positions": sum(map(len, measured.agreement)),
        "agreement_top1": _share(measured.agreement),
        "kl": _share(measured.kl),
        "agreement_top1_own_kv": _share(measured.agreement_own_kv),
        "equal_prefix": round(statistics.mean(measured.equal_prefix), 2),
        "replay": {
            "tokens_per_step": _per_step(replays, lambda s: len(s.token_ids) - 1),
            "step_ms": _per_step(replays, lambda s: s.draft_ms + s.verify_ms + s.other_ms),
            "tokens_per_s": _mean(replays, lambda s: s.tokens_per_s, digits=1),
        }
        if replays
        else None,
    }


def ratios(all_measured: Sequence[ArmMeasurements]) -> list[dict[str, Any]]:
    """Is plain fast, does speculation pay, does each budget pay on top? Those that can be asked, each side at its best.

    Last, the budget of 16 against none at the same tree: what it saves where the tree is given.
    """
    transformers, plain, eagle3 = (_best(all_measured, name) for name in ("transformers", "plain", "eagle3"))
    pairs = [(plain, transformers), (eagle3, plain)]
    budgets = {_budget(measured) for measured in all_measured} - {None}
    for budget in sorted(budgets, key=lambda budget: (budget != 16, budget)):
        pairs.append((_fastest([m for m in all_measured if _budget(m) == budget]), eagle3))
    unbudgeted = {measured.arm.tree: measured for measured in all_measured if measured.arm.name == "eagle3"}
    at_16 = [measured for measured in all_measured if measured.arm.name == "moe-spec:substitution:16"]
    pairs += [(measured, unbudgeted.get(measured.arm.tree)) for measured in at_16]
    found = [_compared(ours, theirs) for ours, theirs in pairs if ours is not None and theirs is not None]
    return [ratio for number, ratio in enumerate(found) if ratio not in found[:number]]


def _compared(ours: ArmMeasurements, theirs: ArmMeasurements) -> dict[str, Any]:
    return {"of": ours.arm.key, "to": theirs.arm.key} | paired_ratio(ours.timed, theirs.timed)


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
            f"| {speed['all']:.0f} ({speed['p20']:.0f}–{speed['p80']:.0f}) "
            f"| {_or_dash(row['tokens_per_step'])} | {parts} | {experts} | {_or_dash(row['mass_kept'])} "
            f"| {_or_dash(row['agreement_top1'])} |"
        )
    return "\n".join(lines)


def _best(all_measured: Sequence[ArmMeasurements], name: str) -> ArmMeasurements | None:
    return _fastest([measured for measured in all_measured if measured.arm.name == name])


def _fastest(some_measured: Sequence[ArmMeasurements]) -> ArmMeasurements | None:
    return max(some_measured, key=lambda measured: overall(measured.timed), default=None)


def _budget(measured: ArmMeasurements) -> int | None:
    """Experts per layer of a MoE-Spec arm; None for all others."""
    return measured.arm.budget.budget if measured.arm.is_lossy and measured.arm.budget is not None else None


def _per_step(summaries: Sequence[RunSummary], value: Callable[[RunSummary], float]) -> float | None:
    """Of all answers together; None where no step was taken."""
    num_steps = sum(summary.num_steps for summary in summaries)
    return round(sum(map(value, summaries)) / num_steps, 3) if num_steps else None


def _mean(
    summaries: Sequence[RunSummary], value: Callable[[RunSummary], float | None], digits: int = 3
) -> float | None:
    values = [found for found in map(value, summaries) if found is not None]
    return round(statistics.mean(values), digits) if values else None


def _share(answers: Sequence[Sequence[float]]) -> float | None:
    flat = [answer for by_prompt in answers for answer in by_prompt]
    return round(sum(flat) / len(flat), 4) if flat else None


def _or_dash(value: object) -> str:
    if isinstance(value, list):
        return ",".join(f"{part:g}" for part in value)
    return "–" if value is None else str(value)
