"""A small sweep: the same few prompts under several budgets, and what that did to speed and text.

Owns what is tried, what is kept of an answer, and how answers become a figure and a table. Pure; who runs them is the
tab's to say. Quality here is agreement with the text that no budget writes: nobody knows the right answers to these.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import plotly.graph_objects as go

from app.frontier import COLOURS, Table, in_words
from app.plots import GRID, in_both_themes
from app.race.outcome import num_equal
from app.settings import Settings
from moespec import RunSummary

PROMPTS = Path(__file__).resolve().parent.parent / "assets" / "bench" / "prompts.jsonl"
NO_BUDGET, PLAIN = "no budget", "plain decoding"
BUDGETS = "budgets"  # what the figure calls all others
NOTHING_TO_TRY = "Choose at least one budget to try."
ONE_ROW = (
    "The chat's controls ask for trees of one row, which no budget touches: choose a drafter and a larger tree there."
)
COLUMNS = (
    "setting",
    "tokens/s (lowest to highest)",
    "text as without a budget",
    "same answers",
    "tokens/step",
    "experts",
)


def spread_prompts(count: int) -> list[list[dict[str, str]]]:
    """`count` of the benchmark's prompts, evenly over the file, which has them by kind."""
    lines = PROMPTS.read_text(encoding="utf-8").splitlines()
    return [json.loads(lines[n * len(lines) // count])["messages"] for n in range(count)]


def to_try(base: Settings, budgets: Iterable[int], max_new_tokens: int) -> dict[str, Settings]:
    """Settings by name: no budget, which the others are compared with, plain decoding, and the budgets, all greedy.

    `base` says how experts are ranked and how trees are drafted. ValueError where there is nothing to compare.
    """
    unbudgeted = replace(
        base, budget=None, method="", governor="fixed", temperature=0.0, system="", ignore_eos=False,
        max_new_tokens=max_new_tokens,
    )  # fmt: skip
    if unbudgeted.tree_config.total_tokens == 1:
        raise ValueError(ONE_ROW)
    budgeted = {f"B = {budget}": replace(unbudgeted, budget=int(budget)) for budget in sorted(budgets)}
    if not budgeted:
        raise ValueError(NOTHING_TO_TRY)
    return {NO_BUDGET: unbudgeted, PLAIN: replace(unbudgeted, drafter="none")} | budgeted


@dataclass(frozen=True)
class Trial:
    """One prompt's answer under one setting. tokens_per_s: None where the first token was the only one."""

    name: str
    prompt: int
    token_ids: Sequence[int]
    tokens_per_s: float | None
    tokens_per_step: float
    experts: float | None
    is_beside_others: bool

    @staticmethod
    def of(name: str, prompt: int, summary: RunSummary, is_beside_others: bool) -> Trial:
        speed = summary.tokens_per_s if len(summary.token_ids) > 1 else None
        return Trial(
            name, prompt, summary.token_ids, speed, summary.tokens_per_step, summary.experts_active, is_beside_others
        )


@dataclass(frozen=True)
class Spread:
    """Mean, least and most over prompts."""

    mean: float
    low: float
    high: float

    @staticmethod
    def over(values: Sequence[float]) -> Spread | None:
        return Spread(statistics.fmean(values), min(values), max(values)) if values else None

    def text(self, show: Callable[[float], str]) -> str:
        return f"{show(self.mean)} ({show(self.low)} to {show(self.high)})"


@dataclass(frozen=True)
class Found:
    """What a setting's answers say so far. agreement: share of the unbudgeted text that is the same, from its start."""

    name: str
    settings: Settings
    trials: Sequence[Trial]
    speed: Spread | None
    agreement: Spread | None
    num_same: int


def agreement(ours: Sequence[int], theirs: Sequence[int]) -> float:
    """The share of the longer text that both begin with: 1 for the same texts alone."""
    return num_equal(ours, theirs) / max(len(ours), len(theirs))


def found(settings: dict[str, Settings], trials: Sequence[Trial]) -> list[Found]:
    """One for each setting that has an answer. An answer is compared where its prompt's unbudgeted one is there."""
    unbudgeted = {trial.prompt: trial.token_ids for trial in trials if trial.name == NO_BUDGET}
    result = []
    for name, of_name in settings.items():
        own = [trial for trial in trials if trial.name == name]
        if own:
            agreed = [agreement(one.token_ids, unbudgeted[one.prompt]) for one in own if one.prompt in unbudgeted]
            speed = Spread.over([one.tokens_per_s for one in own if one.tokens_per_s is not None])
            result.append(Found(name, of_name, own, speed, Spread.over(agreed), agreed.count(1.0)))
    return result


def sweep_table(entries: Sequence[Found]) -> Table:
    """A row for each setting tried so far, with the range of its speeds on one scale for all."""
    most = max((entry.speed.high for entry in entries if entry.speed), default=1.0)
    return {
        "caption": "Measured here, in this sweep",
        "columns": [*COLUMNS],
        "rows": [
            {
                "name": entry.name,
                "cells": [
                    "–" if entry.speed is None else _ranged(entry.speed, most),
                    "–" if entry.agreement is None else entry.agreement.text(_percent),
                    f"{entry.num_same} of {len(entry.trials)}",
                    f"{statistics.fmean(trial.tokens_per_step for trial in entry.trials):.2f}",
                    _mean_experts(entry.trials),
                ],
                "settings": entry.settings.changed(),
            }
            for entry in entries
        ],
    }


def sweep_figure(entries: Sequence[Found]) -> go.Figure:
    """Agreement against speed, whiskers from the lowest to the highest prompt. customdata: settings, as JSON."""
    figure = go.Figure()
    kinds = {NO_BUDGET: ("star", COLOURS[1]), PLAIN: ("x", COLOURS[2]), BUDGETS: ("circle", COLOURS[0])}
    for kind, (symbol, colour) in kinds.items():
        shown = [entry for entry in entries if (entry.name if entry.name in kinds else BUDGETS) == kind]
        places = [(entry, entry.speed, entry.agreement) for entry in shown if entry.speed and entry.agreement]
        figure.add_scatter(
            name=kind,
            x=[speed.mean for _, speed, _ in places],
            y=[agreed.mean for _, _, agreed in places],
            error_x=_whiskers([speed for _, speed, _ in places]),
            error_y=_whiskers([agreed for _, _, agreed in places]),
            mode="markers+text" if kind == BUDGETS else "markers",
            text=[entry.name for entry, _, _ in places],
            textposition="top center",
            marker={"symbol": symbol, "size": 10, "color": colour},
            customdata=[json.dumps(entry.settings.changed()) for entry, _, _ in places],
            hovertext=[_hover(*place) for place in places],
            hovertemplate="%{hovertext}<extra></extra>",
        )
    figure.update_layout(hovermode="closest", legend={"orientation": "h", "y": -0.22, "x": 0})
    figure.update_xaxes(title_text="tokens/s, measured in this sweep", gridcolor=GRID, zeroline=False)
    figure.update_yaxes(
        title_text="text as without a budget", tickformat=".0%", range=[0, 1.15], gridcolor=GRID, zeroline=False
    )
    return in_both_themes(figure, height=380)


def beside_note(trials: Sequence[Trial]) -> str:
    """Said where speeds are not those of a machine that does nothing else."""
    beside = sum(trial.is_beside_others for trial in trials)
    if not beside:
        return ""
    return f" {beside} of {len(trials)} answers were written beside other visitors': their speeds are of shared steps."


def _ranged(speed: Spread, most: float) -> dict[str, Any]:
    """A cell that is drawn too: shares of the scale's end."""
    parts = {"low": speed.low / most, "at": speed.mean / most, "high": speed.high / most}
    return {"text": speed.text(lambda value: f"{value:,.0f}"), **parts}


def _whiskers(spreads: Sequence[Spread]) -> dict[str, Any]:
    up, down = [one.high - one.mean for one in spreads], [one.mean - one.low for one in spreads]
    return {"type": "data", "symmetric": False, "array": up, "arrayminus": down, "thickness": 1}


def _mean_experts(trials: Sequence[Trial]) -> str:
    known = [trial.experts for trial in trials if trial.experts is not None]
    return f"{statistics.fmean(known):.1f}" if known else "–"


def _hover(entry: Found, speed: Spread, agreed: Spread) -> str:
    return (
        f"{in_words(entry.settings)}<br>{speed.text(lambda value: f'{value:,.0f}')} tokens/s<br>"
        f"{agreed.text(_percent)} of the text as without a budget<br>"
        f"{len(entry.trials)} prompts; in brackets, and as whiskers, the lowest and the highest"
    )


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"
