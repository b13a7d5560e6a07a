"""Advice on a loaded pair, measured: its costs, what its drafter gets accepted, and what the chosen settings really do.

Owns the order of the measurements and the checks on them: pairs of rows and budget are left out of the table of costs
and predicted, and what is recommended is run beside plain decoding.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from moespec.advise.acceptance import SIZES, Acceptance
from moespec.advise.choice import MEASURED, Choice, choose, say
from moespec.advise.costs import BoundedCosts
from moespec.advise.trees import LARGE, candidates_of
from moespec.advise.unions import sizes_of
from moespec.bench.report import paired_ratio
from moespec.config import BudgetConfig, GenerationConfig, TreeConfig
from moespec.control import Control
from moespec.cost import ModelShape, budget_ladder
from moespec.cost_table import CostTable, StepPoint
from moespec.engine import Engine
from moespec.profile import BRANCHING, DEPTH, NUM_TOKENS, conversation, measure_costs
from moespec.trace import StepTrace

NUM_LEFT_OUT = 10
USUAL = TreeConfig(16, 8, 3, min_path_p=0)
PLACES_APART = 8  # tokens between the trees that budgets are compared at
NEAR = 0.2  # a prediction that is off by at most this share
NUM_RESAMPLES = 2000


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
        return asdict(self)


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
    kept = kept_by_budget(engine, prompts[::2], ladder)  # pairs need fewer

    def fastest(budget: int | None) -> Choice | None:
        return choose(acceptance, costs, [budget], lambda _, budget: kept[budget])

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


def measure_acceptance(engine: Engine, prompts: Sequence[list[int]]) -> Acceptance:
    """Large trees without a budget over the prompts; the interval of accepted tokens is from prompts resampled."""
    control = Control()
    control.update(budget=BudgetConfig(), tree=LARGE)
    by_prompt: list[list[StepTrace]] = []
    for prompt in prompts:
        by_prompt.append([step for _, step in conversation(engine, prompt, control)])
    engine.forget()
    steps = [step for found in by_prompt for step in found]
    means = [statistics.fmean(len(step.token_ids) - 1 for step in found) for found in by_prompt if found]
    rng = random.Random(0)
    resampled = sorted(statistics.fmean(rng.choices(means, k=len(means))) for _ in range(NUM_RESAMPLES))
    mean = statistics.fmean(means)
    low, high = (resampled[int(share * NUM_RESAMPLES)] / mean if mean else 1.0 for share in (0.025, 0.975))
    source = f"measured: {len(steps)} steps on {len(prompts)} prompts, {engine.info.drafter_name}"
    return Acceptance(source, candidates_of(steps), low, high)


def kept_by_budget(engine: Engine, prompts: Sequence[list[int]], budgets: Sequence[int]) -> dict[int | None, float]:
    """The share of accepted tokens that each budget leaves, over trees of 16 rows: 1 without one.

    All budgets verify the tree of the same places in the text that the model writes without one, whose keys and values
    no budget has touched: places are visited from the last to the first, and what lies behind one is not kept.
    """
    accepted: dict[int | None, int] = dict.fromkeys((None, *budgets), 0)
    for prompt in prompts:
        engine.forget()
        *_, last = engine.generate(prompt, GenerationConfig(max_new_tokens=NUM_TOKENS))
        assert last.summary is not None
        answer = last.summary.token_ids
        for place in range(len(answer) - 1, 0, -PLACES_APART):
            for budget in accepted:
                accepted[budget] += _num_accepted(engine, prompt + answer[:place], budget)
    engine.forget()
    return {budget: found / accepted[None] if accepted[None] else 1.0 for budget, found in accepted.items()}


def _num_accepted(engine: Engine, token_ids: list[int], budget: int | None) -> int:
    """Accepted draft tokens of the first tree behind these tokens and the next one."""
    generation = GenerationConfig(max_new_tokens=NUM_TOKENS, ignore_eos=True)
    steps = engine.generate(token_ids, generation, BudgetConfig(budget=budget), USUAL)
    return len(next(step for step in steps if step.kind != "prefill").token_ids) - 1


def confirm(engine: Engine, choices: dict[str, Choice], prompts: Sequence[list[int]]) -> dict[str, dict[str, Any]]:
    """What is recommended, run beside plain decoding on every prompt in turn: ratios of tokens/s, paired by prompt."""
    settings = {"plain": (TreeConfig(1), BudgetConfig())}
    settings |= {
        name: (TreeConfig.parse(choice.tree), BudgetConfig(budget=choice.budget)) for name, choice in choices.items()
    }
    speeds: dict[str, list[float]] = {name: [] for name in settings}
    generation = GenerationConfig(max_new_tokens=NUM_TOKENS, ignore_eos=True)
    names = [*settings]
    for tree, budget in settings.values():
        *_, _ = engine.generate(prompts[0], generation, budget, tree)  # what is prepared once is in no figure
    for number, prompt in enumerate(prompts):
        start = number % len(names)
        for name in names[start:] + names[:start]:
            tree, budget = settings[name]
            engine.forget()
            *_, last = engine.generate(prompt, generation, budget, tree)
            assert last.summary is not None
            speeds[name].append(last.summary.tokens_per_s)
    engine.forget()
    return {name: paired_ratio(speeds[name], speeds["plain"]) for name in choices}


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
