"""What to do by costs and an acceptance: for a server that only reads, and for this engine with its overhead.

Owns the two judgements. Knows nothing of how a model or a device is described, nor of tables.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from moespec.advise.acceptance import Acceptance
from moespec.advise.choice import MODELLED, UNKNOWN, Choice, choose, say
from moespec.advise.costs import ENGINE_ON_CUDA, MEASURED_OF_DATASHEET, ModelledCosts, modelled_bounds
from moespec.advise.devices import MEASURED
from moespec.advise.unions import Unions
from moespec.cost import break_even_tokens, budget_ladder

# The mean fall of accepted tokens under the paper's budgets, about half of the experts: arXiv 2602.16052, second-hand.
ACCEPTED_UNDER_BUDGET = 1 - 0.014
USUAL_ROWS = 16  # of the tree that is named where no other is asked for


@dataclass(frozen=True)
class Judgement:
    """What to do, in one word and one sentence.

    lossless, budgeted   the fastest choice without a budget, and with one of `least_budget` or more; None where no
                         acceptance is known, or no such budget is left
    """

    verdict: str
    headline: str
    lossless: Choice | None
    budgeted: Choice | None


@dataclass(frozen=True)
class InEngine:
    """The judgement where steps take more than reading: with this engine's overhead on a GPU. plain_ms: expected."""

    plain_ms: float
    judgement: Judgement


def with_engine(costs: ModelledCosts) -> ModelledCosts | None:
    """With this engine's overhead, where its kernels run."""
    if not costs.device.runs_kernels:
        return None
    share = 1.0 if costs.device.source == MEASURED else MEASURED_OF_DATASHEET
    return replace(costs, overhead=replace(ENGINE_ON_CUDA, reading=round(ENGINE_ON_CUDA.reading / share, 2)))


def judge(known: Acceptance | None, costs: ModelledCosts, unions: Unions, least: int) -> Judgement:
    """The fastest choices, and what is said of them. least: no smaller budget is chosen."""
    if known is None:
        pays = break_even_tokens(costs.verify_ms(USUAL_ROWS, None), costs.plain_ms)
        headline = f"No verdict without an acceptance: verifying {USUAL_ROWS} rows costs as much as {pays:.1f} plain "
        return Judgement(UNKNOWN, f"{headline}steps; give what your drafter reaches.", None, None)
    bounded, shape = modelled_bounds(costs, unions), costs.shape
    budgets = [budget for budget in budget_ladder(shape.top_k, shape.num_experts) if budget >= least]
    lossless, budgeted = (choose(known, bounded, some, _accepted_under) for some in ([None], budgets))
    return Judgement(*say(lossless, budgeted, MODELLED), lossless, budgeted)


def _accepted_under(num_rows: float, budget: int | None) -> float:
    return 1.0 if budget is None else ACCEPTED_UNDER_BUDGET
