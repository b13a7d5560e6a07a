"""The decision: which tree and which budget, or none. Plain Python over whoever knows the costs, modelled or measured.

Owns the maximum, its bounds and the sentence that says it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from moespec.advise.acceptance import Acceptance, Candidate
from moespec.advise.costs import BoundedCosts, Costs

SPECULATE, WITH_A_BUDGET, DO_NOT, UNKNOWN = "speculate", "only with a budget", "do not speculate", "unknown"
MODELLED, MEASURED = "modelled", "measured"
WORTH_A_LOSS = 1.05  # a lossy choice is named beside a lossless one if it is so much faster

Kept = Callable[[float, int | None], float]  # (rows, budget) to the share of accepted tokens that the budget leaves


@dataclass(frozen=True)
class Choice:
    """A tree and a budget, and what they are expected to bring.

    tree                as `TreeConfig.parse` reads it
    num_rows, experts   mean rows of its trees, experts read per layer
    break_even          tokens per step, drafting included, above which it beats plain decoding
    speedup, low, high  over plain decoding; what is not known for sure is taken for independent
    """

    tree: str
    budget: int | None
    num_rows: float
    experts: float
    tokens_per_step: float
    step_ms: float
    break_even: float
    speedup: float
    low: float
    high: float

    @property
    def setting(self) -> str:
        budget = "no budget" if self.budget is None else f"B = {self.budget}"
        return f"--tree {self.tree} with {budget}"

    @property
    def gain(self) -> str:
        return f"{self.speedup:.2f} times plain decoding ({self.low:.2f} to {self.high:.2f})"


def choose(acceptance: Acceptance, costs: BoundedCosts, budgets: Iterable[int | None], kept: Kept) -> Choice | None:
    """The fastest pair of a tree and one of these budgets (None: without) that binds; None where there is none."""
    pairs = [
        (tree, budget)
        for budget in budgets
        for tree in acceptance.candidates
        if budget is None or costs.expected.union(tree.num_rows) > budget
    ]
    choices = (weigh(tree, budget, acceptance, costs, kept) for tree, budget in pairs)
    return max(choices, key=lambda choice: choice.speedup, default=None)


def weigh(candidate: Candidate, budget: int | None, acceptance: Acceptance, costs: BoundedCosts, kept: Kept) -> Choice:
    """What the tree brings under the budget: its tokens per step over the time of its steps in plain ones."""
    accepted = candidate.num_accepted * kept(candidate.num_rows, budget)
    in_plain_steps = _in_plain_steps(candidate, budget, costs.expected)
    speedup, union = (1 + accepted) / in_plain_steps, costs.expected.union(candidate.num_rows)
    # By how much each uncertainty alone would change it.
    lows, highs = (
        [(1 + accepted * acceptance.low) / (1 + accepted)],
        [(1 + accepted * acceptance.high) / (1 + accepted)],
    )
    for worst, best in costs.bounds:
        lows.append(in_plain_steps / _in_plain_steps(candidate, budget, worst))
        highs.append(in_plain_steps / _in_plain_steps(candidate, budget, best))
    return Choice(
        tree=",".join(f"{number:g}" for number in candidate.tree.numbers),
        budget=budget,
        num_rows=candidate.num_rows,
        experts=union if budget is None else min(union, budget),
        tokens_per_step=1 + accepted,
        step_ms=in_plain_steps * costs.expected.plain_ms,
        break_even=in_plain_steps,
        speedup=speedup,
        low=speedup / _together(lows),
        high=speedup * _together(highs),
    )


def _in_plain_steps(candidate: Candidate, budget: int | None, costs: Costs) -> float:
    """The mean time of a step, with its drafting."""
    step_ms = (
        share * costs.predict_ms(num_rows, budget, num_levels, candidate.tree.top_k)
        for (num_rows, num_levels), share in candidate.sizes.items()
    )
    return sum(step_ms) / costs.plain_ms


def _together(factors: Sequence[float]) -> float:
    """Independent relative errors joined: the root of the sum of their squared logarithms, as a factor of 1 or more."""
    return math.exp(math.hypot(*(math.log(factor) for factor in factors)))


def say(lossless: Choice | None, budgeted: Choice | None, basis: str) -> tuple[str, str]:
    """(verdict, one sentence)."""
    found = [choice for choice in (lossless, budgeted) if choice is not None]
    if not found:
        return DO_NOT, "Do not speculate: the drafter gets nothing accepted."
    fastest = max(found, key=lambda choice: choice.speedup)
    if fastest.speedup <= 1:
        unsure = "; only a measurement could rule it in" if fastest.high > 1 else ""
        return DO_NOT, f"Do not speculate: the best, {fastest.setting}, is expected at {fastest.gain}, {basis}{unsure}."
    if lossless is None or lossless.speedup <= 1:
        sentence = "Speculate only with a budget, which is lossy"
        return WITH_A_BUDGET, f"{sentence}: {fastest.setting}, expected at {fastest.gain}, {basis}."
    sentence = f"Speculate: {lossless.setting}, expected at {lossless.gain}, {basis}"
    if budgeted is not None and budgeted.speedup > WORTH_A_LOSS * lossless.speedup:
        sentence += f"; {budgeted.setting}, which is lossy, at {budgeted.gain}"
    return SPECULATE, f"{sentence}."
