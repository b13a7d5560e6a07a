"""A quality run's summary as Markdown, for the terminal and the README. Knows nothing of how it was measured."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from moespec.quality.summary import ArmQuality, Estimate


def table(entries: Sequence[ArmQuality]) -> str:
    """One row per arm and temperature, then their exact match by family."""
    columns = ["arm", "T", "exact match (95 %)", "difference (95 %), n", "agreement", "KL", "tokens/s", "tokens/step"]
    columns += ["experts kept; read of natural", "mass kept", "perplexity"]
    return "\n".join([*_rows(columns, map(_cells, entries)), "", *_families(entries)])


def _cells(entry: ArmQuality) -> list[str]:
    difference = entry.difference
    kept, active, natural = (
        _number(value, ".1f") for value in (entry.experts_kept, entry.experts_active, entry.experts_natural)
    )
    groups = [f"{group} {value:.2f}" for group, value in entry.perplexity.items()]
    return [
        entry.arm,
        f"{entry.temperature:g}",
        _interval(entry.overall, ".3f"),
        _interval(difference, "+.4f") + (f", {difference.n}" if difference else ""),
        _number(entry.agreement, ".4f"),
        _number(entry.kl_nats, ".4f"),
        f"{entry.tokens_per_s:.0f}",
        f"{entry.tokens_per_step:.2f}",
        f"{kept}; {active} of {natural}",
        f"{entry.mass_kept:.3f}",
        ", ".join(groups) or "–",
    ]


def _families(entries: Sequence[ArmQuality]) -> list[str]:
    families = list(dict.fromkeys(family for entry in entries for family in entry.families))
    rows = (
        [entry.arm, f"{entry.temperature:g}", *(_with_n(entry.families.get(family)) for family in families)]
        for entry in entries
    )
    return _rows(["arm", "T", *families], rows) if families else []


def _rows(columns: list[str], rows: Iterable[list[str]]) -> list[str]:
    return ["| " + " | ".join(row) + " |" for row in (columns, ["---"] * len(columns), *rows)]


def _with_n(found: Estimate | None) -> str:
    return f"{_interval(found, '.2f')}, {found.n}" if found else "–"


def _interval(found: Estimate | None, form: str) -> str:
    return f"{found.mean:{form}} ({found.low:{form}} to {found.high:{form}})" if found else "–"


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else f"{value:{form}}"
