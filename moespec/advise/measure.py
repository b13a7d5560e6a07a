"""Advice on a loaded pair, measured: its costs, what its drafter gets accepted, and what the chosen settings really do.

Owns the order of the measurements, the data they are given as, and the check on the costs: pairs of rows and budget are
left out of their table and predicted. What is measured of drafting is in `probes.py`.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from moespec.advise.acceptance import SIZES
from moespec.advise.choice import MEASURED, Choice, choose, say
from moespec.advise.costs import BoundedCosts
from moespec.advise.probes import confirm, kept_by_budget, measure_acceptance
from moespec.advise.unions import sizes_of
from moespec.cost import ModelShape, budget_ladder
from moespec.cost_table import CostTable, StepPoint
from moespec.engine import Engine
from moespec.profile import BRANCHING, DEPTH, measure_costs

NUM_LEFT_OUT = 10
NEAR = 0.2  # a prediction that is off by at most this share


@dataclass(frozen=True)
class LeftOut:
    """A whole step of a tree of so many rows under a budget: predicted by a table without it, and measured."""

    num_rows: int
    budget: int | None
    predicted_ms: float
    measured_ms: float

    @property
    def error(self) -> float:
        return self.predicted_ms / self.measured_ms - 1


@dataclass(frozen=True)
class MeasuredRow:
    """A verify step, measured: experts read, router mass kept, milliseconds, and how many plain steps it takes."""

    num_rows: int
    budget: int | None
    experts: float
    mass_kept: float
    verify_ms: float
    step_ms: float
    in_plain_steps: float


@dataclass(frozen=True)
class BudgetChoice:
    """The fastest tree under one budget, and the router mass that the budget keeps of it."""

    choice: Choice
    mass_kept: float


@dataclass(frozen=True)
class MeasuredAdvice:
    """Plain data, JSON-safe. Milliseconds are undisturbed ones: 20th percentiles (`cost_table.py`).

    confirmed   by choice ("lossless", "budgeted"): its speed to plain decoding's, paired by prompt, median and interval
    """

    headline: str
    verdict: str
    sizes: list[int]
    about: dict[str, Any]
    plain_ms: dict[str, float]
    fit: str
    held_out_error: float
    prefix: list[int]
    unions: list[dict[str, float]]
    steps: list[MeasuredRow]
    left_out: list[LeftOut]
    acceptance: dict[str, Any]
    least_budget: int
    lossless: Choice | None
    budgeted: Choice | None
    by_budget: list[BudgetChoice]
    confirmed: dict[str, dict[str, Any]]

    @property
    def num_near(self) -> int:
        return sum(abs(pair.error) <= NEAR for pair in self.left_out)

    def to_json(self) -> dict[str, Any]:
        """Fractions to four digits behind the point."""
        return json.loads(json.dumps(asdict(self)), parse_float=lambda text: round(float(text), 4))


class MeasuredCosts:
    """A table's predictions, times a factor on all but the plain step; each asked for once."""

    def __init__(self, table: CostTable, factor: float = 1.0) -> None:
        self._table, self._factor = table, factor
        self._known: dict[tuple, float] = {}

    @property
    def plain_ms(self) -> float:
        return self._table.plain_ms

    def union(self, num_rows: float) -> float:
        return self._table.union(num_rows)

    def predict_ms(self, num_rows: float, budget: int | None, num_levels: float = 0, draft_top_k: int = 8) -> float:
        step = num_rows, budget, num_levels, draft_top_k
        if step not in self._known:
            is_plain = num_rows <= 1 and num_levels == 0
            self._known[step] = self._table.predict_ms(*step) * (1 if is_plain else self._factor)
        return self._known[step]


def measure_advice(
    engine: Engine, shape: ModelShape, prompts: Sequence[list[int]], least_budget: int, seconds: float
) -> MeasuredAdvice:
    """Profile, draft, choose, run. ValueError where the engine drafts nothing."""
    table = measure_costs(engine, seconds)
    acceptance = measure_acceptance(engine, prompts)
    error = table.held_out_error
    costs = BoundedCosts(MeasuredCosts(table), [(MeasuredCosts(table, 1 + error), MeasuredCosts(table, 1 - error))])
    ladder = budget_ladder(shape.top_k, shape.num_experts)
    kept = kept_by_budget(engine, prompts[::4], ladder)  # pairs need fewer

    def fastest(budget: int | None) -> Choice | None:
        return choose(acceptance, costs, [budget], lambda num_rows, budget: kept[budget])

    lossless, by_budget = fastest(None), [choice for choice in map(fastest, ladder) if choice is not None]
    allowed = [choice for choice in by_budget if choice.budget is not None and choice.budget >= least_budget]
    budgeted = max(allowed, key=lambda choice: choice.speedup, default=None)
    verdict, headline = say(lossless, budgeted, MEASURED)
    chosen = {"lossless": lossless, "budgeted": budgeted}
    return MeasuredAdvice(
        headline=headline,
        verdict=verdict,
        sizes=[*sizes_of(shape)],
        about=table.about,
        plain_ms=asdict(table.steps[0].total_ms),
        fit=table.fit,
        held_out_error=error,
        prefix=[*table.prefix],
        unions=[{"num_rows": rows, "union": table.union(rows)} for rows in SIZES if rows > 1],
        steps=[_measured_row(point, table) for point in table.steps],
        left_out=leave_out(table),
        acceptance={
            "source": acceptance.source,
            "low": acceptance.low,
            "high": acceptance.high,
            "kept_by_budget": {str(budget): share for budget, share in kept.items()},
            "candidates": [candidate.to_json() for candidate in acceptance.candidates],
        },
        least_budget=least_budget,
        lossless=lossless,
        budgeted=budgeted,
        by_budget=[BudgetChoice(choice, table.mass_kept(choice.num_rows, choice.budget)) for choice in by_budget],
        confirmed=confirm(engine, {name: choice for name, choice in chosen.items() if choice is not None}, prompts),
    )


def leave_out(table: CostTable) -> list[LeftOut]:
    """Ten measured pairs, drawn by chance, predicted by a table that is made without them."""
    trees = table.trees
    left_out = random.Random(0).sample(trees, min(NUM_LEFT_OUT, len(trees) - 1))
    others = [point for point in table.steps if point not in left_out]
    without = CostTable.of(table.about, (table.num_experts, table.top_k), table.prefix, others, table.drafts)
    return [
        LeftOut(
            num_rows=point.num_rows,
            budget=point.budget,
            predicted_ms=without.predict_ms(point.num_rows, point.budget, DEPTH, BRANCHING),
            measured_ms=point.total_ms.p20,
        )
        for point in sorted(left_out, key=lambda point: point.num_rows)
    ]


def _measured_row(point: StepPoint, table: CostTable) -> MeasuredRow:
    return MeasuredRow(
        num_rows=point.num_rows,
        budget=point.budget,
        experts=point.experts_read,
        mass_kept=point.mass_kept,
        verify_ms=point.verify_ms.p20,
        step_ms=point.total_ms.p20,
        in_plain_steps=point.total_ms.p20 / table.plain_ms,
    )
