"""What the records of a quality run say of each arm. Owns the statistics; knows nothing of models or files.

The reference is the unbudgeted arm at the same tree and temperature: every other arm is compared with it question by
question. Answers under several seeds, and questions that ask the same in other words (of one `key`), are not
independent: intervals take each key for one observation.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

MARGIN = 0.02  # of exact match that a budget may cost and still pass
MIN_PAIRS = 1000
Z_95 = 1.959964


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95 % interval. n counts questions."""

    mean: float
    low: float
    high: float
    n: int


class Scored(NamedTuple):
    """One answer's score, or one difference of two, with what it is of."""

    item: str
    key: str
    score: float


@dataclass
class ArmQuality:
    """One arm at one temperature. Expert and mass figures are means over answers that had tree steps.

    `families` has every score; `overall` and `difference` those of exact answers alone, without summaries' ROUGE-L.
    """

    arm: str
    temperature: float
    families: dict[str, Estimate]
    overall: Estimate | None
    difference: Estimate | None  # paired with the reference; None for the reference itself
    tokens_per_s: float
    tokens_per_step: float
    experts_natural: float | None
    experts_kept: float | None
    experts_active: float | None
    mass_kept: float
    perplexity: dict[str, float] = field(default_factory=dict)  # by group of texts; at the lowest temperature alone
    agreement: float | None = None
    kl_nats: float | None = None

    @property
    def is_non_inferior(self) -> bool:
        """Whether exact match is not lower than the reference's by `MARGIN`, at 97.5 % one-sided confidence."""
        found = self.difference
        return found is not None and found.n >= MIN_PAIRS and found.low > -MARGIN


def summarise(records: Iterable[dict]) -> list[ArmQuality]:
    """One entry per arm and temperature: by temperature, arms in the order of their first appearance."""
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
    with_texts: set[str] = set()
    entries.sort(key=lambda entry: entry.temperature)
    for entry in entries:
        if entry.arm not in with_texts:
            with_texts.add(entry.arm)
            _add_texts(entry, texts[entry.arm])
    return entries


def reference_of(arm: str) -> str:
    """The key of the unbudgeted arm at the same tree."""
    _, mark, tree = arm.partition("@")
    return f"eagle3{mark}{tree}"


def recommended(entries: Sequence[ArmQuality]) -> ArmQuality | None:
    """The fastest budgeted arm at temperature 0 that passes and is faster than no budget; None if none is."""
    greedy = {entry.arm: entry for entry in entries if entry.temperature == 0}
    passing = [
        entry
        for entry in greedy.values()
        if entry.is_non_inferior and entry.tokens_per_s > greedy[reference_of(entry.arm)].tokens_per_s
    ]
    return max(passing, key=lambda entry: entry.tokens_per_s, default=None)


def estimate(scores: Sequence[Scored]) -> Estimate:
    """Mean and 95 % interval: Wilson's for rights and wrongs with a key for one trial, the normal one for others."""
    num_keys, mean = len({one.key for one in scores}), statistics.fmean(one.score for one in scores)
    if not {one.score for one in scores} <= {0.0, 1.0}:
        return _normal(scores, 0.0)
    middle = (mean + Z_95**2 / (2 * num_keys)) / (1 + Z_95**2 / num_keys)
    error = math.sqrt(mean * (1 - mean) / num_keys + Z_95**2 / (4 * num_keys * num_keys))
    half = Z_95 / (1 + Z_95**2 / num_keys) * error
    return Estimate(mean, max(0.0, middle - half), min(1.0, middle + half), len({one.item for one in scores}))


def paired_difference(ours: Sequence[dict], theirs: Sequence[dict]) -> Estimate | None:
    """Mean of ours - theirs over the same questions and seeds, with its 95 % interval; None if there are none."""
    reference = {(record["item"], record["seed"]): record["score"] for record in theirs}
    differences = [
        Scored(record["item"], record["key"], record["score"] - reference[record["item"], record["seed"]])
        for record in ours
        if _is_exact(record) and reference.get((record["item"], record["seed"])) is not None
    ]
    return _normal(differences, -1.0) if differences else None


def _is_exact(record: dict) -> bool:
    return record["score"] is not None and record["scorer"] != "rouge"


def _normal(values: Sequence[Scored], least: float) -> Estimate:
    """The interval by the clustered standard error, within the values there can be, `least` to 1."""
    mean = statistics.fmean(one.score for one in values)
    by_key: dict[str, float] = defaultdict(float)
    for one in values:
        by_key[one.key] += one.score - mean
    num_keys = len(by_key)
    half = math.inf
    if num_keys > 1:
        variance = sum(excess * excess for excess in by_key.values()) * num_keys / (num_keys - 1)
        half = Z_95 * math.sqrt(variance) / len(values)
    num_items = len({one.item for one in values})
    return Estimate(mean, max(least, mean - half), min(1.0, mean + half), num_items)


def _arm_quality(arm: str, temperature: float, found: list[dict], reference: list[dict] | None) -> ArmQuality:
    by_family: dict[str, list[Scored]] = defaultdict(list)
    exact = []
    for record in found:
        if record["score"] is not None:
            scored = Scored(record["item"], record["key"], record["score"])
            by_family[record["family"]].append(scored)
            exact += [scored] if _is_exact(record) else []
    seconds = sum(record["ms"] for record in found) / 1e3
    num_timed = sum(record["num_tokens"] - 1 for record in found)  # the first token comes with the prompt
    num_steps = sum(record["num_steps"] for record in found)
    return ArmQuality(
        arm=arm,
        temperature=temperature,
        families={family: estimate(values) for family, values in by_family.items()},
        overall=estimate(exact) if exact else None,
        difference=paired_difference(found, reference) if reference and arm != reference_of(arm) else None,
        tokens_per_s=num_timed / seconds if seconds else 0.0,
        tokens_per_step=num_timed / num_steps if num_steps else 1.0,
        experts_natural=_mean(record["experts_natural"] for record in found),
        experts_kept=_mean(record["experts_kept"] for record in found),
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
