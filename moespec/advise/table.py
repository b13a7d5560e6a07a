"""The advice as a person reads it. Knows nothing of how it was found."""

from __future__ import annotations

from collections.abc import Iterable

from moespec.advise.advice import Advice
from moespec.advise.choice import Choice
from moespec.advise.measure import NEAR, MeasuredAdvice

BUSY = 1.5  # times its undisturbed time: a median plain step that says that something else ran
BUSY_NOTE = "The machine was busy with other things: measure again when it is not."


def advice_text(advice: Advice) -> str:
    """What was asked about, the tables, the choice; beside each, what is modelled and what its inputs are."""
    shape, device = advice.model["shape"], advice.device
    kv = f", {advice.model['kv_bytes'] / 1e9:.2f} GB of keys and values" if advice.context else ""
    lines = [
        f"{shape['name']}, from its config: {shape['num_moe_layers']} MoE layers, {shape['top_k']} of "
        f"{shape['num_experts']} experts of {shape['expert_bytes'] / 1e6:.3g} MB, "
        f"{shape['dense_bytes'] / 1e9:.3g} GB beside them{kv}",
        f"{device['name']}: reads {device['bytes_per_s'] / 1e9:.0f} GB/s, {device['source']}",
        *advice.notes,
        "",
        advice.plain_in_words,
        "",
        "Verifying without a budget, modelled; it pays above so many tokens per step, the bonus token included.",
        f"Experts per layer: {advice.unions_source}; in brackets those of independent rows, the upper bound.",
        "",
        *_table(
            ("rows", "experts", "GB", "at least ms", "pays above", "with drafting", "in this engine"),
            (
                (
                    str(row.num_rows),
                    f"{row.experts:.1f} ({row.experts_most:.1f})",
                    f"{row.num_bytes / 1e9:.3g}",
                    f"{row.verify_ms:.3g}",
                    f"{row.break_even:.1f} ({row.break_even_most:.1f})",
                    f"{row.with_drafting:.1f}",
                    _or_dash(row.in_engine),
                )
                for row in advice.sizes
            ),
        ),
        "",
        "Verifying with a budget that binds, modelled:",
        "",
        *_table(
            ("B", "GB", "at least ms", "pays above", "16 rows in this engine, with drafting"),
            (
                (
                    str(row.budget),
                    f"{row.num_bytes / 1e9:.3g}",
                    f"{row.verify_ms:.3g}",
                    f"{row.break_even:.1f}",
                    _or_dash(row.in_engine),
                )
                for row in advice.budgets
            ),
        ),
        "",
        f"Acceptance: {advice.acceptance_source or 'not known'}",
        *_judged(advice),
        "",
        *advice.headlines,
    ]
    return "\n".join(lines)


def _judged(advice: Advice) -> list[str]:
    if advice.in_engine is None:
        return _choices(advice.lossless, advice.budgeted, advice.least_budget)
    loaded = advice.in_engine.judgement
    return [
        *_choices(advice.lossless, advice.budgeted, advice.least_budget, " where reading is all"),
        *_choices(loaded.lossless, loaded.budgeted, advice.least_budget, " in this engine"),
    ]


def _or_dash(pays_above: float | None) -> str:
    return "–" if pays_above is None else f"{pays_above:.1f}"


def measured_text(advice: MeasuredAdvice, modelled: Advice) -> str:
    """The measurement's tables, what was left out and predicted, the choice and what it really did."""
    about, plain = advice.about, advice.plain_ms
    modelled_ms = {row.num_rows: row.verify_ms for row in modelled.sizes}
    trees = [row for row in advice.steps if row.num_rows > 1]
    shown = {min((row.num_rows for row in trees), key=lambda rows: abs(rows - 16)), trees[-1].num_rows}
    lines = [
        f"Measured on {about['name']}, {about['threads']} threads, {about['dtype']}, {about['backend']} experts, "
        f"drafter {about['drafter']}, {advice.prefix[0]} to {advice.prefix[1]} positions in the cache.",
        f"Times are undisturbed ones, 20th percentiles. A plain step takes {plain['p20']:.2f} ms (median "
        f"{plain['median']:.2f}, 80th percentile {plain['p80']:.2f}).",
        *([BUSY_NOTE] if plain["median"] > BUSY * plain["p20"] else []),
        "",
        *_table(
            ("rows", "experts", "verify ms", "modelled, at least", "whole step ms", "in plain steps"),
            (
                (
                    str(row.num_rows),
                    f"{row.experts:.1f}",
                    f"{row.verify_ms:.2f}",
                    f"{modelled_ms[row.num_rows]:.2f}" if row.num_rows in modelled_ms else "–",
                    f"{row.step_ms:.2f}",
                    f"{row.in_plain_steps:.2f}",
                )
                for row in advice.steps
                if row.budget is None
            ),
        ),
        "",
        *_table(
            ("rows", "B", "experts", "router mass kept", "verify ms"),
            (
                (
                    str(row.num_rows),
                    str(row.budget),
                    f"{row.experts:.1f}",
                    f"{row.mass_kept:.2f}",
                    f"{row.verify_ms:.2f}",
                )
                for row in trees
                if row.budget is not None and row.num_rows in shown
            ),
        ),
        "",
        f"Left out of the table and predicted by the rest of it: {advice.num_near} of {len(advice.left_out)} within "
        f"{NEAR:.0%} ({advice.fit}, held-out error {advice.held_out_error:.0%}).",
        "",
        *_table(
            ("rows", "B", "predicted ms", "measured ms", "off by"),
            (
                (
                    str(pair.num_rows),
                    "–" if pair.budget is None else str(pair.budget),
                    f"{pair.predicted_ms:.2f}",
                    f"{pair.measured_ms:.2f}",
                    f"{pair.error:+.0%}",
                )
                for pair in advice.left_out
            ),
        ),
        "",
        f"Acceptance: {advice.acceptance['source']}",
        "",
        *_table(
            ("B", "fastest tree", "rows", "router mass kept", "tokens per step", "to plain decoding"),
            (
                (
                    str(found.choice.budget),
                    found.choice.tree,
                    f"{found.choice.num_rows:.1f}",
                    f"{found.mass_kept:.2f}",
                    f"{found.choice.tokens_per_step:.2f}",
                    f"{found.choice.speedup:.2f}",
                )
                for found in advice.by_budget
            ),
        ),
        "",
        *_choices(advice.lossless, advice.budgeted, advice.least_budget),
    ]
    lines += [
        f"Run beside plain decoding, {name}: {found['ratio']:.2f} times as fast "
        f"({found['interval_95'][0]:.2f} to {found['interval_95'][1]:.2f})."
        for name, found in advice.confirmed.items()
    ]
    return "\n".join([*lines, "", advice.headline])


def _table(heads: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> list[str]:
    """Markdown lines."""
    return [f"| {' | '.join(cells)} |" for cells in (heads, ["---"] * len(heads), *rows)]


def _choices(lossless: Choice | None, budgeted: Choice | None, least_budget: int, where: str = "") -> list[str]:
    found = (("without a budget", lossless), (f"with one of {least_budget} or more, lossy", budgeted))
    return [
        f"Fastest{where} {what}: {choice.setting}: {choice.num_rows:.1f} rows, {choice.experts:.1f} experts, "
        f"{choice.tokens_per_step:.2f} tokens per step, pays above {choice.break_even:.2f}: {choice.gain}"
        for what, choice in found
        if choice is not None
    ]
