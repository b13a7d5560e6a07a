"""What a step costs: one target with one drafter on one machine, as measured, and what follows for a step not measured.

Owns the table, its predictions and its JSON; `profile.py` measures it. Knows nothing of engines.

A step's cost here is the 20th percentile of its times, that of the plain step too: what it takes undisturbed. Machines
are shared. On two busy cores, eight rounds over 63 kinds of steps: medians of ratios to plain steps timed beside them
were off by 5 % (median; 14 % at the 90th percentile) from those of the quiet rounds, the 20th percentiles by 1 % (8 %).

Letters: T rows of a step (the root is one), B budget, n experts read per layer.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from moespec.cost_fits import FITS, Curve, Predict, Sample, between, held_out_errors, least_squares

SCHEMA = 2


@dataclass(frozen=True)
class Spread:
    """Milliseconds: 20th percentile, median and 80th percentile of what was measured."""

    p20: float
    median: float
    p80: float

    @classmethod
    def of(cls, samples: Iterable[float]) -> Spread:
        ordered = sorted(samples)
        last = len(ordered) - 1
        return cls(ordered[round(0.2 * last)], statistics.median(ordered), ordered[round(0.8 * last)])


@dataclass(frozen=True)
class StepPoint:
    """Steps of `num_rows` rows under a budget (None: without). One row is the plain step.

    experts_natural, experts_read   per layer: the trees' union without the budget, and what was run; means
    mass_kept       mean share of the router probability on the shortlist
    num_accepted    mean accepted draft tokens, without the bonus token
    """

    num_rows: int
    budget: int | None
    num_steps: int
    verify_ms: Spread
    other_ms: Spread
    total_ms: Spread
    experts_natural: float
    experts_read: float
    mass_kept: float
    num_accepted: float


@dataclass(frozen=True)
class DraftPoint:
    """Drafting `num_levels` levels below the root, `top_k` nodes expanded on each."""

    num_levels: int
    top_k: int
    num_steps: int
    draft_ms: Spread


@dataclass(frozen=True)
class CostTable:
    """Measured costs. `about`: what they are true of. `prefix`: positions in the cache, least and most, at the steps.

    steps   the plain step first, then trees by rows and budget
    fit     the name in `FITS` of how verify times are interpolated: the one with the smallest held-out error
    held_out_error   its relative error at steps it was not fitted to, each left out in turn; median
    """

    about: dict[str, Any]
    num_experts: int
    top_k: int
    prefix: tuple[int, int]
    steps: tuple[StepPoint, ...]
    drafts: tuple[DraftPoint, ...]
    fit: str
    held_out_error: float

    @staticmethod
    def of(
        about: dict[str, Any],
        sizes: tuple[int, int],
        prefix: tuple[int, int],
        steps: Sequence[StepPoint],
        drafts: Sequence[DraftPoint],
    ) -> CostTable:
        """Choose the interpolation. `sizes`: experts and top-k. ValueError if no tree was measured."""
        trees = [point for point in steps if point.num_rows > 1]
        if not trees:
            raise ValueError("the drafter drafted no tree while steps were measured: there is nothing to predict from.")
        samples = _samples(trees)
        errors = {name: statistics.median(held_out_errors(fit, samples)) for name, fit in FITS.items()}
        best = min(errors, key=lambda name: round(errors[name], 3))  # the first, and simplest, of equals
        return CostTable(about, *sizes, prefix, tuple(steps), tuple(drafts), best, errors[best])

    @property
    def plain_ms(self) -> float:
        """A whole step of plain decoding."""
        return self.steps[0].total_ms.p20

    def predict_ms(self, num_rows: float, budget: int | None, num_levels: float = 0, draft_top_k: int = 8) -> float:
        """A whole step: drafting `num_levels` levels, verifying `num_rows` rows, and the rest. 0 levels: no drafter."""
        if num_rows <= 1 and num_levels == 0:
            return self.plain_ms
        verify_and_rest = self.verify_ms(num_rows, budget) + self.other_ms(num_rows)
        return verify_and_rest + self.draft_ms(num_levels, draft_top_k)

    def draft_ms(self, num_levels: float, top_k: int = 8) -> float:
        """Growing a tree of so many levels, `top_k` nodes expanded on each; 0 levels cost nothing."""
        return 0.0 if num_levels == 0 else float(_growth_terms(num_levels, top_k) @ self.growth_ms)

    def verify_ms(self, num_rows: float, budget: int | None) -> float:
        """The forward over all rows, what the target says of them, and the walk."""
        if num_rows <= 1:
            return self.steps[0].verify_ms.p20
        return self._verify(num_rows, self.experts_read(num_rows, budget))

    def other_ms(self, num_rows: float) -> float:
        """What is neither drafting nor verifying: text, cache, trace."""
        return between(self._other_by_rows, num_rows)

    def union(self, num_rows: float) -> float:
        """Experts per layer that a tree of so many rows uses without a budget."""
        return self.experts_read(num_rows, None)

    def experts_read(self, num_rows: float, budget: int | None) -> float:
        """Experts per layer that are read under the budget."""
        return self._at(num_rows, budget, self._read_by_rows)

    def mass_kept(self, num_rows: float, budget: int | None) -> float:
        """Share of the router probability that the budget keeps; 1 without one, and for a single row."""
        return self._at(num_rows, budget, self._mass_by_rows)

    def to_json(self) -> dict[str, Any]:
        return {"schema": SCHEMA, **asdict(self)}

    @staticmethod
    def from_json(values: dict[str, Any]) -> CostTable:
        """The inverse of `to_json`. ValueError, KeyError or TypeError for anything else."""
        values = dict(values)
        if values.pop("schema") != SCHEMA or values["fit"] not in FITS:
            raise ValueError(f"this table of costs is not of schema {SCHEMA}.")
        steps = [{**step, **_spreads(step, "verify_ms", "other_ms", "total_ms")} for step in values.pop("steps")]
        drafts = [{**draft, **_spreads(draft, "draft_ms")} for draft in values.pop("drafts")]
        return CostTable(
            **{**values, "prefix": tuple(values["prefix"])},
            steps=tuple(StepPoint(**step) for step in steps),
            drafts=tuple(DraftPoint(**draft) for draft in drafts),
        )

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(self.to_json(), indent=1) + "\n", encoding="utf-8")

    @staticmethod
    def load(path: Path) -> CostTable:
        """ValueError names a file that is no table of costs."""
        try:
            return CostTable.from_json(json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is no table of costs: {error}") from error

    @property
    def trees(self) -> list[StepPoint]:
        return [point for point in self.steps if point.num_rows > 1]

    @cached_property
    def _verify(self) -> Predict:
        return FITS[self.fit](_samples(self.trees))

    @cached_property
    def growth_ms(self) -> list[float]:
        """What drafting is made of: the root's children, every further level, every node that is expanded for it."""
        rows = [_growth_terms(point.num_levels, point.top_k) for point in self.drafts]
        return least_squares(rows, [point.draft_ms.p20 for point in self.drafts]).tolist()

    @cached_property
    def _other_by_rows(self) -> Curve:
        num_rows = sorted({point.num_rows for point in self.steps})
        return [
            (rows, statistics.fmean(point.other_ms.p20 for point in self.steps if point.num_rows == rows))
            for rows in num_rows
        ]

    @cached_property
    def _read_by_rows(self) -> dict[int, Curve]:
        return self._curves(lambda point: point.experts_read)

    @cached_property
    def _mass_by_rows(self) -> dict[int, Curve]:
        return self._curves(lambda point: point.mass_kept)

    def _curves(self, value: Callable[[StepPoint], float]) -> dict[int, Curve]:
        """By rows: the value over the budget, where no budget is that of all experts."""
        curves: dict[int, list[tuple[float, float]]] = {}
        for point in self.steps:
            budget = self.num_experts if point.budget is None else point.budget
            curves.setdefault(point.num_rows, []).append((budget, value(point)))
        return {num_rows: sorted(curve) for num_rows, curve in sorted(curves.items())}

    def _at(self, num_rows: float, budget: int | None, curves: dict[int, Curve]) -> float:
        budget = self.num_experts if budget is None else budget
        return between([(rows, between(curve, budget)) for rows, curve in curves.items()], num_rows)


def _samples(points: Sequence[StepPoint]) -> list[Sample]:
    return [Sample(point.num_rows, point.experts_read, point.verify_ms.p20) for point in points]


def _growth_terms(num_levels: float, top_k: int) -> np.ndarray:
    """The root's children take no pass of the head below it; every further level takes one over `top_k` nodes."""
    return np.array([1.0, num_levels - 1, (num_levels - 1) * top_k])


def _spreads(values: dict[str, Any], *names: str) -> dict[str, Spread]:
    return {name: Spread(**values[name]) for name in names}
