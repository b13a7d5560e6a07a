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

NUM_PARTS = 4  # of the prompts, each held against what was found on the others
LEAST_SWEPT = 8  # prompts, of which a sweep tells anything


def governor_ratios(measured: Sequence[ArmMeasurements], prompts: Sequence[BenchPrompt]) -> list[dict[str, Any]]:
    """Of one group, per governor and class of prompts: against the fastest fixed setting that it might have chosen, and
    against plain decoding. Paired by prompt, with 95 % intervals, given the settings that are held against.

    to_best_fixed       every prompt against the setting that was the fastest on others of the same class (or of all),
                        as whoever sweeps settings finds it; None of fewer than `LEAST_SWEPT` prompts
    to_best_afterwards  against `best_afterwards`, the fastest on these very prompts: of a dozen that are about as good,
                        one has been lucky with them
    """
    places: dict[str, list[int]] = {"all": list(range(len(prompts)))}
    for place, prompt in enumerate(prompts):
        places.setdefault(prompt.name.rsplit("-", 1)[0], []).append(place)
    plain = next(entry for entry in measured if entry.arm.name == "plain")
    found = []
    for entry in (entry for entry in measured if entry.arm.governor != "fixed"):
        allowed = [rival for rival in measured if rival.arm.governor == "fixed" and _might_choose(entry.arm, rival)]
        for name, chosen in places.items():
            best, order = _fastest(allowed, chosen), sorted(chosen, key=lambda place: prompts[place].source)
            swept = _against(entry, _swept(allowed, order), order) if len(chosen) >= LEAST_SWEPT else None
            found.append(
                {"governor": entry.arm.key, "class": name, "num_prompts": len(chosen)}
                | {"to_best_fixed": swept}
                | {"to_best_afterwards": _against(entry, [best] * len(chosen), chosen), "best_afterwards": best.arm.key}
                | {"to_plain": _against(entry, [plain] * len(chosen), chosen)}
            )
    return found


def _swept(rivals: Sequence[ArmMeasurements], chosen: Sequence[int]) -> list[ArmMeasurements]:
    """For every chosen prompt the fastest rival on the chosen prompts that are not of its part. They lie in the order
    of their sources, of which all parts have about as much."""
    others = [[place for n, place in enumerate(chosen) if n % NUM_PARTS != part] for part in range(NUM_PARTS)]
    best = [_fastest(rivals, places) for places in others]
    return [best[n % NUM_PARTS] for n in range(len(chosen))]


def _against(entry: ArmMeasurements, rivals: Sequence[ArmMeasurements], chosen: Sequence[int]) -> dict[str, Any]:
    """On every chosen prompt against a rival of its own. Of its rounds the middle one counts, or both middle ones, by
    ratio."""
    pairs = [
        _middle([*zip(entry.rounds[place], rival.rounds[place], strict=True)])
        for place, rival in zip(chosen, rivals, strict=True)
    ]
    return paired_ratio([ours for ours, _ in pairs], [other for _, other in pairs])


def _fastest(rivals: Sequence[ArmMeasurements], chosen: Sequence[int]) -> ArmMeasurements:
    """Most often ahead of all together: a machine that others use is fast for minutes and slow for minutes, so that
    speeds of different rounds tell little of each other."""
    rounds = range(len(rivals[0].rounds[chosen[0]]))

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
