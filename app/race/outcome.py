"""What came of a contest, as small JSON: figures, where texts part, and the steps that the race plays. Pure.

Owns the form that race.js reads, and how figures are told of runs. Knows nothing of services and widgets.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from app.race.contest import Contest, description
from app.recordings import Recording, Recordings
from moespec import StepTrace, TraceHeader

ENDINGS = {"eos": "ended by itself", "length": "at its maximum", "context": "context full"}
Frame = dict[str, Any]


@dataclass
class Measured:
    """One run of a contestant. is_shared: others' answers were written at the time."""

    header: TraceHeader
    steps: list[StepTrace] = field(default_factory=list)
    is_shared: bool = False

    @property
    def is_finished(self) -> bool:
        """Come to an end of its own, and not stopped."""
        summary = self.steps[-1].summary if self.steps else None
        return summary is not None and summary.finish_reason != "stopped"

    @property
    def num_tokens(self) -> int:
        return sum(len(step.token_ids) for step in self.steps)

    @property
    def token_ids(self) -> list[int]:
        return [token for step in self.steps for token in step.token_ids]

    def kept(self, recordings: Recordings) -> Recording:
        """It, for the panels that replay and export answers."""
        recording = recordings.begin(self.header)
        recording.steps += self.steps
        return recording

    def figures(self) -> dict[str, float | None]:
        """tokens_per_s: after the first token. accepted: draft tokens per step. experts: read per layer, in a step with
        a tree; where there is none, in any. mass: router mass kept. bytes: of experts, read per token."""
        summary = self.steps[-1].summary
        assert summary is not None, "of a finished run"
        decoded = [step for step in self.steps if step.kind != "prefill"]
        if not decoded:
            return dict.fromkeys(("tokens_per_s", "accepted", "experts", "mass", "bytes"))
        read = [step for step in decoded if step.kind == "tree"] or decoded
        return {
            "tokens_per_s": summary.tokens_per_s,
            "accepted": statistics.fmean(step.num_accepted for step in decoded),
            "experts": statistics.fmean(statistics.fmean(step.experts_active) for step in read),
            "mass": summary.mass_kept,
            "bytes": sum(step.expert_bytes for step in decoded) / sum(len(step.token_ids) for step in decoded),
        }


def middle(runs: Sequence[Measured]) -> Measured:
    """The run of the middle speed, of two the slower: the one whose text is shown and raced."""
    return sorted(runs, key=lambda run: run.figures()["tokens_per_s"] or 0)[(len(runs) - 1) // 2]


def spread(runs: Sequence[Measured]) -> dict[str, list[float] | None]:
    """Of each figure the median over runs, the least and the most."""
    found: dict[str, list[float] | None] = {}
    all_figures = [run.figures() for run in runs]
    for name in all_figures[0]:
        values = [value for figures in all_figures if (value := figures[name]) is not None]
        found[name] = [statistics.median(values), min(values), max(values)] if values else None
    return found


def num_equal(ours: Sequence[int], theirs: Sequence[int]) -> int:
    """How many tokens both begin with."""
    pairs = zip(ours, theirs, strict=False)
    return next((n for n, (one, other) in enumerate(pairs) if one != other), min(len(ours), len(theirs)))


def race_frame(contest: Contest, names: Sequence[str], results: Sequence[Sequence[Measured]]) -> Frame:
    """What is known of the contestants so far."""
    reference, shown = contest.reference, [middle(runs) if runs else None for runs in results]
    held_against = shown[reference]
    lanes = []
    for name, settings, runs, run in zip(names, contest.contestants, results, shown, strict=True):
        lane: Frame = {"name": name, "what": description(settings)}
        if run is not None:
            lane |= _outcome(runs, run)
        if run is not None and held_against is not None:
            ours, theirs = run.token_ids, held_against.token_ids
            lane["equal"], lane["is_same"] = num_equal(ours, theirs), ours == theirs
        lanes.append(lane)
    return {"link": contest.to_link(), "reference": reference, "lanes": lanes}


def _outcome(runs: Sequence[Measured], run: Measured) -> Frame:
    """Steps are [ms since the first token, accepted draft tokens, pieces]."""
    began, summary = run.steps[0].t_ms, run.steps[-1].summary
    assert summary is not None, "of a finished run"
    steps = [[round(s.t_ms - began, 2), s.num_accepted, s.pieces] for s in run.steps]
    return {
        "steps": steps,
        "ending": ENDINGS[summary.finish_reason],
        "lossless": all(other.steps[-1].lossless for other in runs),
        "figures": spread(runs),
        "num_runs": len(runs),
        "num_texts": len({tuple(other.token_ids) for other in runs}),
        "num_shared": sum(other.is_shared for other in runs),
    }
