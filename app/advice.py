"""How advice is shown: in lines, tables and a figure. Pure.

All that `advise` gives is modelled: drawn hollow and dashed, and called so. What was measured stands beside it in solid
marks. What the page itself should be set to is the advice for the engine under it, where that differs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import plotly.graph_objects as go

from app.frontier import COLOURS, Table
from app.plots import GRID, in_both_themes
from app.settings import Settings
from moespec.advise.choice import DO_NOT, SPECULATE, WITH_A_BUDGET, WORTH_A_LOSS
from moespec.config import TreeConfig
from moespec.cost import ModelShape

if TYPE_CHECKING:
    from moespec.advise import Acceptance, Advice, Choice, Judgement
    from moespec.advise.advice import BudgetRow, SizeRow

GREY = "#64748b"


def recommended(advice: Advice) -> Settings | None:
    """The page's settings of what is advised first for its engine, plain decoding included; None without a verdict."""
    if _judgement(advice).verdict == DO_NOT:
        return Settings(budget=None, drafter="none")
    choice = _advised(advice)
    if choice is None:
        return None
    return Settings(budget=choice.budget, **asdict(TreeConfig.parse(choice.tree)))


def advice_in_words(advice: Advice) -> str:
    """What is advised for the page's engine, in the words of its controls."""
    judgement, choice = _judgement(advice), _advised(advice)
    budgeted = judgement.budgeted
    if choice is None:
        found = [choice for choice in (judgement.lossless, budgeted) if choice is not None]
        if judgement.verdict != DO_NOT or not found:
            return judgement.headline
        return f"guess nothing; the best would be {_in_words(max(found, key=lambda choice: choice.speedup))}."
    line = f"{'only with a budget: ' if judgement.verdict == WITH_A_BUDGET else ''}{_in_words(choice)}"
    if choice.budget is None and budgeted is not None and budgeted.speedup > WORTH_A_LOSS * choice.speedup:
        line += f"; with {budgeted.budget} experts per layer, lossy, {budgeted.speedup:.2f} times"
    return f"{line}."


def advice_lines(advice: Advice, accepted: str) -> list[str]:
    """What was asked about, what plain decoding costs at the least, and what `advise` notes. accepted: in words."""
    shape, device = advice.model["shape"], advice.device
    return [
        f"{shape['name']}: {shape['num_moe_layers']} MoE layers, {shape['top_k']} of {shape['num_experts']} experts of "
        f"{shape['expert_bytes'] / 1e6:.3g} MB, {shape['dense_bytes'] / 1e9:.3g} GB beside them.",
        f"{device['name']}: {device['bytes_per_s'] / 1e9:,.0f} GB/s, {device['source']}.",
        advice.plain_in_words,
        f"Experts that a tree reads: {advice.unions_source}. Acceptance: {accepted}.",
        *advice.notes,
    ]


def choices_table(advice: Advice) -> Table:
    """The fastest tree without a budget and with one."""
    found = (
        ("no budget, lossless", advice.lossless),
        (f"B of {advice.least_budget} or more, lossy", advice.budgeted),
    )
    return {
        "caption": "Recommended where reading is all, modelled",
        "columns": ["", "tree", "B", "rows", "experts", "tokens/step", "pays above", "times plain decoding"],
        "rows": [
            {
                "name": name,
                "cells": [
                    choice.tree,
                    "–" if choice.budget is None else f"{choice.budget}",
                    f"{choice.num_rows:.1f}",
                    f"{choice.experts:.1f}",
                    f"{choice.tokens_per_step:.2f}",
                    f"{choice.break_even:.2f}",
                    f"{choice.speedup:.2f} ({choice.low:.2f} to {choice.high:.2f})",
                ],
            }
            for name, choice in found
            if choice is not None
        ],
    }


def floors_table(advice: Advice) -> Table:
    """The floor and the break-even of each tree without a budget, then of 16 rows under each."""
    rows: list[tuple[str, float, SizeRow | BudgetRow, str]] = [
        *((f"{row.num_rows} rows", row.experts, row, f"{row.with_drafting:.1f}") for row in advice.sizes),
        *((f"B = {row.budget}, 16 rows", float(row.budget), row, "–") for row in advice.budgets),
    ]
    return {
        "caption": "Floor and break-even, modelled: a step pays above so many tokens, the bonus token included",
        "columns": ["tree", "experts", "GB", "at least ms", "pays above", "with drafting", "in this engine"],
        "rows": [
            {
                "name": name,
                "cells": [
                    f"{experts:.1f}",
                    f"{row.num_bytes / 1e9:.3g}",
                    f"{row.verify_ms:.3g}",
                    f"{row.break_even:.1f}",
                    with_drafting,
                    "–" if row.in_engine is None else f"{row.in_engine:.1f}",
                ],
            }
            for name, experts, row, with_drafting in rows
        ],
    }


def break_even_figure(advice: Advice, acceptance: Acceptance | None, accepted: str) -> go.Figure:
    """Tokens per step that a tree must bring to pay, and what it would bring, by its rows. accepted: in words."""
    rows = [row.num_rows for row in advice.sizes]
    figure = go.Figure()
    _line(figure, "must bring, drafting included (modelled)", rows, [row.with_drafting for row in advice.sizes], 0)
    in_engine = [row.in_engine for row in advice.sizes if row.in_engine is not None]
    if in_engine:
        _line(figure, "must bring in this engine (modelled)", rows, in_engine, 2)
    if acceptance is not None:
        reached = best_by_rows(acceptance)
        _line(figure, f"would bring ({accepted})", [x for x, _ in reached], [y for _, y in reached], 1)
    for place, (name, choice) in enumerate((("no budget", advice.lossless), ("budget", advice.budgeted))):
        if choice is not None:
            figure.add_scatter(
                name=f"recommended where reading is all, {name} (modelled)",
                x=[choice.num_rows],
                y=[choice.tokens_per_step],
                mode="markers",
                marker={"symbol": ("star-open", "diamond-open")[place], "size": 13, "color": COLOURS[2 + place]},
                hovertemplate=f"{choice.setting}<br>{choice.gain}, modelled<extra></extra>",
            )
    measured = measured_steps(advice.model["shape"])
    if measured is not None:
        machine, points = measured
        figure.add_scatter(
            name=f"must bring, measured on {machine}",
            x=[x for x, _ in points],
            y=[y for _, y in points],
            mode="markers",
            marker={"symbol": "square", "size": 8, "color": COLOURS[0]},
            hovertemplate="%{x} rows: %{y:.2f} plain steps, measured<extra></extra>",
        )
    figure.update_layout(legend={"orientation": "h", "y": -0.22, "x": 0})
    figure.update_xaxes(title_text="rows of the tree", type="log", tickvals=rows, ticktext=rows, gridcolor=GRID)
    figure.update_yaxes(title_text="tokens per step", rangemode="tozero", gridcolor=GRID, zeroline=False)
    return in_both_themes(figure, height=400)


def best_by_rows(acceptance: Acceptance) -> list[tuple[float, float]]:
    """(rows, tokens per step) of the trees that no smaller one equals, bonus token included."""
    found: list[tuple[float, float]] = [(1.0, 1.0)]
    for tree in sorted(acceptance.candidates, key=lambda tree: (tree.num_rows, -tree.num_accepted)):
        if 1 + tree.num_accepted > found[-1][1]:
            found.append((tree.num_rows, 1 + tree.num_accepted))
    return found


def measured_steps(shape: dict[str, Any]) -> tuple[str, Sequence[tuple[int, float]]] | None:
    """(machine, whole unbudgeted steps in plain ones by rows), where a model of these sizes was measured."""
    from moespec.advise import read_record
    from moespec.advise.unions import sizes_of

    record = read_record()
    if tuple(record["sizes"]) != sizes_of(ModelShape(**shape)):
        return None
    about, steps = record["about"], record["steps"]
    points = [(step["num_rows"], step["in_plain_steps"]) for step in steps if step["budget"] is None]
    return f"{about['name']}, {about['threads']} threads", points


def _judgement(advice: Advice) -> Advice | Judgement:
    """Of the engine under the page."""
    return advice if advice.in_engine is None else advice.in_engine.judgement


def _advised(advice: Advice) -> Choice | None:
    judgement = _judgement(advice)
    return {SPECULATE: judgement.lossless, WITH_A_BUDGET: judgement.budgeted}.get(judgement.verdict)


def _in_words(choice: Choice) -> str:
    tree = TreeConfig.parse(choice.tree)
    loaded = "no budget" if choice.budget is None else f"{choice.budget} experts per layer, lossy"
    return (
        f"trees of up to {tree.total_tokens} rows, {tree.depth} deep, top-{tree.top_k}, least likely path "
        f"{tree.min_path_p:g}, {loaded}: {choice.gain}"
    )


def _line(figure: go.Figure, name: str, x: Sequence[float], y: Sequence[float], style: int) -> None:
    """Not measured: dashed, with hollow marks."""
    figure.add_scatter(
        name=name,
        x=list(x),
        y=list(y),
        mode="lines+markers",
        line={"dash": ("dash", "dot", "dashdot")[style], "color": (*COLOURS[:2], GREY)[style]},
        marker={"symbol": ("circle-open", "triangle-up-open", "square-open")[style], "size": 8},
        hovertemplate="%{x:.3g} rows: %{y:.2f} tokens per step<extra></extra>",
    )
