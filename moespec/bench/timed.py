"""How fast, of answers that were timed one by one; and how much faster than others, with an interval.

Owns the statistics of speed. Answers end where the model ends them, so they are long and short: speeds are those of all
answers together, as if one waited for the whole pile. Knows nothing of arms, prompts or engines.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, NamedTuple

NUM_RESAMPLES = 2000


class Timed(NamedTuple):
    """So many tokens in so many seconds."""

    num_tokens: int
    seconds: float


def overall(answers: Sequence[Timed]) -> float:
    """Tokens per second of all answers together; 0 if nothing was written."""
    seconds = sum(answer.seconds for answer in answers)
    return sum(answer.num_tokens for answer in answers) / seconds if seconds else 0.0


def middle_place(answers: Sequence[Timed]) -> int:
    """Place of the answer of middle speed."""
    by_speed = sorted(range(len(answers)), key=lambda n: answers[n].seconds / max(1, answers[n].num_tokens))
    return by_speed[(len(by_speed) - 1) // 2]


def speeds(answers: Sequence[Timed]) -> dict[str, float]:
    """Tokens per second: of all answers together, and the 20th and 80th percentile over answers."""
    single = sorted(answer.num_tokens / answer.seconds for answer in answers if answer.num_tokens)
    last = len(single) - 1
    low, high = (single[round(0.2 * last)], single[round(0.8 * last)]) if single else (0.0, 0.0)
    return {"all": round(overall(answers), 2), "p20": round(low, 2), "p80": round(high, 2)}


def paired_ratio(ours: Sequence[Timed], theirs: Sequence[Timed]) -> dict[str, Any]:
    """Our speed over theirs, pair by pair on the same prompts, and a 95 % interval of it from resampled pairs."""
    pairs, rng = list(zip(ours, theirs, strict=True)), random.Random(0)
    found = sorted(_ratio(rng.choices(pairs, k=len(pairs))) for _ in range(NUM_RESAMPLES))
    low, high = found[int(0.025 * NUM_RESAMPLES)], found[int(0.975 * NUM_RESAMPLES)]
    return {"ratio": round(_ratio(pairs), 3), "interval_95": [round(low, 3), round(high, 3)]}


def _ratio(pairs: Sequence[tuple[Timed, Timed]]) -> float:
    theirs = overall([pair[1] for pair in pairs])
    return overall([pair[0] for pair in pairs]) / theirs if theirs else 0.0
