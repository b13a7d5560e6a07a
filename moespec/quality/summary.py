"""What the records of a quality run say of each arm. Owns the statistics; knows nothing of models or files.

The reference is the unbudgeted arm at the same tree and temperature: every other arm is compared with it item by item.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

MARGIN = 0.02  # of exact match that a budget may cost and still pass
MIN_PAIRS = 1000
Z_95 = 1.959964


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95 % interval."""

    mean: float
    low: float
    high: float
    n: int


@dataclass
class ArmQuality:
    """One arm at one temperature. Expert and mass figures are means over answers that had tree steps."""

    arm: str
    temperature: float
    families: dict[str, Estimate]
    overall: Estimate | None  # over all scored items
    difference: Estimate | None  # paired with the reference; None for the reference itself
    tokens_per_s: float
    tokens_per_step: float
    experts_natural: float | None
    experts_active: float | None
    mass_kept: float
    perplexity: dict[str, float] = field(default_factory=dict)  # by group of texts; measured once, at temperature 0
    agreement: float | None = None
    kl_nats: float | None = None

    @property
    def is_non_inferior(self) -> bool:
        """Whether exact match is not lower than the reference's by `MARGIN`, at 97.5 % one-sided confidence."""
        found = self.difference
        return found is not None and found.n >= MIN_PAIRS and found.low > -MARGIN


def summarise(records: Iterable[dict]) -> list[ArmQuality]:
    """One entry per arm and temperature, in the order of first appearance sorted by arm."""
    answers: dict[tuple[str, float], list[dict]] = defaultdict(list)
    texts: dict[str, list[dict]] = defaultdict(list)
    for record in records:
        if record["kind"] == "answer":
            answers[record["arm"], record["temperature"]].append(record)
        else:
            texts[record["arm"]].append(record)
    entries = [
        _arm_quality(arm, temperature, found, answers.get((reference_of(arm), temperature)))
        for (arm, temperature), found in answers.items()
    ]
    for entry in entries:
        if entry.temperature == 0:
            _add_texts(entry, texts[entry.arm])
    return sorted(entries, key=lambda entry: (entry.temperature, entry.arm))


def reference_of(arm: str) -> str:
    """The key of the unbudgeted arm at the same tree."""
    _, mark, tree = arm.partition("@")
    return f"eagle3{mark}{tree}"


def recommended(entries: Sequence[ArmQuality]) -> ArmQuality | None:
    """The fastest budgeted arm at temperature 0 that passes; None if none does."""
    passing = [entry for entry in entries if entry.temperature == 0 and entry.is_non_inferior]
    return max(passing, key=lambda entry: entry.tokens_per_s, default=None)


def estimate(scores: Sequence[float]) -> Estimate:
    """Mean and 95 % interval: Wilson's for rights and wrongs, the normal one for other scores."""
    n, mean = len(scores), statistics.fmean(scores)
    if set(scores) <= {0.0, 1.0}:
        middle = (mean + Z_95**2 / (2 * n)) / (1 + Z_95**2 / n)
        half = Z_95 / (1 + Z_95**2 / n) * math.sqrt(mean * (1 - mean) / n + Z_95**2 / (4 * n * n))
        return Estimate(mean, max(0.0, middle - half), min(1.0, middle + half), n)
    return _normal(scores)


def paired_difference(ours: Sequence[dict], theirs: Sequence[dict]) -> Estimate | None:
    """Mean of ours - theirs over the same questions and seeds, with its 95 % interval; None if there are none."""
    reference = {(record["item"], record["seed"]): record["score"] for record in theirs}
    differences = [
        record["score"] - reference[record["item"], record["seed"]]
        for record in ours
        if record["score"] is not None and reference.get((record["item"], record["seed"])) is not None
    ]
    return _normal(differences) if differences else None


def _normal(values: Sequence[float]) -> Estimate:
    mean = statistics.fmean(values)
    half = Z_95 * statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.inf
    return Estimate(mean, mean - half, mean + half, len(values))


def _arm_quality(arm: str, temperature: float, found: list[dict], reference: list[dict] | None) -> ArmQuality:
    by_family: dict[str, list[float]] = defaultdict(list)
    for record in found:
        if record["score"] is not None:
            by_family[record["family"]].append(record["score"])
    scores = [score for family_scores in by_family.values() for score in family_scores]
    seconds = sum(record["ms"] for record in found) / 1e3
    num_timed = sum(record["num_tokens"] - 1 for record in found)  # the first token comes with the prompt
    num_steps = sum(record["num_steps"] for record in found)
    return ArmQuality(
        arm=arm,
        temperature=temperature,
        families={family: estimate(values) for family, values in by_family.items()},
        overall=estimate(scores) if scores else None,
        difference=paired_difference(found, reference) if reference and arm != reference_of(arm) else None,
        tokens_per_s=num_timed / seconds if seconds else 0.0,
        tokens_per_step=num_timed / num_steps if num_steps else 1.0,
        experts_natural=_mean(record["experts_natural"] for record in found),
        experts_active=_mean(record["experts_active"] for record in found),
        mass_kept=_mean(record["mass_kept"] for record in found) or 1.0,
    )


def _add_texts(entry: ArmQuality, found: list[dict]) -> None:
    num_tokens = sum(record["num_tokens"] for record in found)
    if not num_tokens:
        return
    for group in sorted({record["group"] for record in found}):
        of_group = [record for record in found if record["group"] == group]
        nats = sum(record["nats"] for record in of_group) / sum(record["num_tokens"] for record in of_group)
        entry.perplexity[group] = math.exp(nats)
    entry.agreement = sum(record["num_agreed"] for record in found) / num_tokens
    entry.kl_nats = sum(record["kl"] for record in found) / num_tokens


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None
