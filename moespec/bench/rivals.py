"""Governors against fixed settings, class of prompts by class.

Owns which settings a governor is held against, and how the fastest of them is found. Knows nothing of how arms are
measured.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from moespec.bench.arms import Arm
from moespec.bench.measure import ArmMeasurements, BenchPrompt
from moespec.bench.timed import Timed, overall, paired_ratio


def governor_ratios(measured: Sequence[ArmMeasurements], prompts: Sequence[BenchPrompt]) -> list[dict[str, Any]]:
    """Of one group, per governor and class of prompts: against the fastest fixed setting that it might have chosen, and
    against plain decoding. Paired by prompt, with 95 % intervals. `best_fixed`: the fastest over all rounds."""
    places: dict[str, list[int]] = {"all": list(range(len(prompts)))}
    for place, prompt in enumerate(prompts):
        places.setdefault(prompt.name.rsplit("-", 1)[0], []).append(place)
    plain = next(entry for entry in measured if entry.arm.name == "plain")
    found = []
    for entry in (entry for entry in measured if entry.arm.governor != "fixed"):
        allowed = [rival for rival in measured if rival.arm.governor == "fixed" and _might_choose(entry.arm, rival)]
        for name, chosen in places.items():
            every_round = range(len(entry.rounds[chosen[0]]))
            found.append(
                {"governor": entry.arm.key, "class": name, "num_prompts": len(chosen)}
                | {"best_fixed": _fastest(allowed, chosen, every_round).arm.key}
                | {"to_best_fixed": _to_fastest(entry, allowed, chosen)}
                | {"to_plain": _to_fastest(entry, [plain], chosen)}
            )
    return found


def _to_fastest(entry: ArmMeasurements, rivals: Sequence[ArmMeasurements], chosen: Sequence[int]) -> dict[str, Any]:
    """In each round against the rival that was the fastest in the others, as a sweep would have found it before: who is
    the fastest of a dozen in the very round that is compared has been lucky in it (a single round has no others). Of
    every prompt the middle round, or both middle ones, by ratio."""
    rounds = range(len(entry.rounds[chosen[0]]))
    theirs = [_fastest(rivals, chosen, [n for n in rounds if n != number] or rounds) for number in rounds]
    pairs = [
        _middle([(entry.rounds[place][number], theirs[number].rounds[place][number]) for number in rounds])
        for place in chosen
    ]
    return paired_ratio([ours for ours, _ in pairs], [other for _, other in pairs])


def _fastest(rivals: Sequence[ArmMeasurements], chosen: Sequence[int], rounds: Sequence[int]) -> ArmMeasurements:
    """Most often ahead of all together: a machine that others use is fast for minutes and slow for minutes, so that
    speeds of different rounds tell little of each other."""

    def in_round(rival: ArmMeasurements, number: int) -> float:
        return overall([rival.rounds[place][number] for place in chosen])

    together = {number: statistics.fmean(in_round(rival, number) for rival in rivals) or 1.0 for number in rounds}
    return max(rivals, key=lambda rival: statistics.median(in_round(rival, n) / together[n] for n in rounds))


def _middle(pairs: Sequence[tuple[Timed, Timed]]) -> tuple[Timed, Timed]:
    """Of a prompt's rounds, ours and theirs, the one whose ratio is the middle one; of two, both together."""

    def ratio(pair: tuple[Timed, Timed]) -> float:
        ours, theirs = (max(1, one.num_tokens) / one.seconds for one in pair)
        return ours / theirs

    middle = sorted(pairs, key=ratio)[(len(pairs) - 1) // 2 : len(pairs) // 2 + 1]
    ours, theirs = zip(*middle, strict=True)
    return _together(ours), _together(theirs)


def _together(answers: Sequence[Timed]) -> Timed:
    return Timed(sum(one.num_tokens for one in answers), sum(one.seconds for one in answers))


def _might_choose(governed: Arm, rival: ArmMeasurements) -> bool:
    """Lossless settings; MoE-Spec's, too, that keep the floor."""
    if not rival.arm.is_lossy:
        return True
    is_moe_spec = rival.arm.budget is not None and isinstance(rival.arm.budget.policy, str)
    floor = float(governed.governor.partition("=")[2] or 1)
    return governed.has_floor and is_moe_spec and statistics.fmean(s.mass_kept for s in rival.summaries) >= floor
