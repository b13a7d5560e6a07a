"""The decode benchmark's loop: every arm on every prompt, interleaved, then the measures along the lossless text.

Owns the order of things: speed first, then what needs the lossless texts. Knows nothing of statistics or of how it is
shown.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from moespec.bench.agreement import agreement_by_position, replay
from moespec.bench.arms import Arm
from moespec.bench.contestants import Contestants, Written
from moespec.bench.timed import Timed, middle_place
from moespec.engine import Engine
from moespec.trace import RunSummary

Progress = Callable[[str], None]
BLOCK = 8  # prompts that an arm answers in a row


@dataclass
class ArmMeasurements:
    """What was seen of one arm; all lists have one entry per prompt. The replay's are empty for lossless arms.

    timed, summaries: of the answer whose speed is the middle one of all rounds'. rounds: of every round.
    """

    arm: Arm
    timed: list[Timed] = field(default_factory=list)
    rounds: list[list[Timed]] = field(default_factory=list)
    summaries: list[RunSummary] = field(default_factory=list)
    equal_prefix: list[int] = field(default_factory=list)
    agreement: list[list[bool]] = field(default_factory=list)
    kl: list[list[float]] = field(default_factory=list)
    agreement_own_kv: list[list[bool]] = field(default_factory=list)
    replays: list[RunSummary] = field(default_factory=list)


@dataclass(frozen=True)
class BenchPrompt:
    """One prompt of `assets/bench/prompts.jsonl` and its ids."""

    name: str
    source: str
    token_ids: list[int]


def read_prompts(path: Path, engine: Engine, limit: int | None) -> list[BenchPrompt]:
    """The prompts of a file, or `limit` of them spread evenly over it, which keeps the sources' shares."""
    entries = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not entries or any(not {"id", "source", "messages"} <= entry.keys() for entry in entries):
        raise ValueError(f"{path} is no file of prompts: every line has an id, a source and messages.")
    if limit is not None:
        if limit < 1:
            raise ValueError(f"limit={limit} is not allowed: use 1 or more.")
        entries = [entries[n] for n in _spread(len(entries), limit)]
    return [BenchPrompt(entry["id"], entry["source"], engine.encode(entry["messages"])) for entry in entries]


def measure(
    contestants: Contestants,
    arms: list[Arm],
    prompts: list[BenchPrompt],
    num_rounds: int,
    num_followed: int,
    progress: Progress,
) -> list[ArmMeasurements]:
    """Run everything. The lossless text that others are compared with is plain decoding's.

    All prompts are answered in every round. Agreement takes a verify step per arm and position: it is measured on
    `num_followed` of the prompts that have an answer behind its first token.
    """
    measured = [ArmMeasurements(arm) for arm in arms]
    texts = _measure_speed(contestants, measured, prompts, num_rounds, progress)
    lossless = texts[next(arm.key for arm in arms if arm.name == "plain")]
    for entry in measured:
        entry.equal_prefix = [_equal_prefix(*pair) for pair in zip(texts[entry.arm.key], lossless, strict=True)]
    answered = [pair for pair in zip(prompts, lossless, strict=True) if len(pair[1]) > 1]
    followed = [answered[n] for n in _spread(len(answered), num_followed)]
    _measure_agreement(contestants, [m for m in measured if m.arm.is_lossy], followed, progress)
    return measured


def _measure_speed(
    contestants: Contestants,
    measured: list[ArmMeasurements],
    prompts: list[BenchPrompt],
    num_rounds: int,
    progress: Progress,
) -> dict[str, list[list[int]]]:
    """Fills in what was timed, and returns the texts: by arm, one per prompt.

    Arms take turns at blocks of prompts, rotated from block to block, so that none has a favourite place. An arm's
    first answer of a block only prepares: in use a setting runs by itself, and finds its code in the processor's
    caches.
    """
    found: dict[str, list[list[Written]]] = {entry.arm.key: [[] for _ in prompts] for entry in measured}
    blocks = [range(first, min(first + BLOCK, len(prompts))) for first in range(0, len(prompts), BLOCK)]
    for number, (turn, block) in itertools.product(range(num_rounds), enumerate(blocks)):
        shift = (number + turn) % len(measured)
        for entry in measured[shift:] + measured[:shift]:
            contestants.write(entry.arm, prompts[block[0]].token_ids)
            for place in block:
                found[entry.arm.key][place].append(contestants.write(entry.arm, prompts[place].token_ids))
        progress(f"speed: round {number + 1} of {num_rounds}, prompt {block[-1] + 1} of {len(prompts)}")
    for entry in measured:
        entry.rounds = [[written.timed for written in rounds] for rounds in found[entry.arm.key]]
        # An arm's texts of one prompt may differ where a governor chooses budgets.
        pairs = zip(found[entry.arm.key], entry.rounds, strict=True)
        middle = [rounds[middle_place(timed)] for rounds, timed in pairs]
        entry.timed = [written.timed for written in middle]
        entry.summaries = [written.summary for written in middle if written.summary is not None]
    return {key: [rounds[-1].token_ids for rounds in answers] for key, answers in found.items()}


def _spread(num_all: int, num_wanted: int) -> list[int]:
    """Places of `num_wanted` things spread evenly over `num_all`, or of all."""
    num_wanted = min(num_wanted, num_all)
    return [n * num_all // num_wanted for n in range(num_wanted)]


def _measure_agreement(
    contestants: Contestants,
    measured: list[ArmMeasurements],
    followed: list[tuple[BenchPrompt, list[int]]],
    progress: Progress,
) -> None:
    engine = contestants.engine
    for number, (prompt, text) in enumerate(followed):
        # A governor that chooses budgets has none of its own for a position by itself.
        budgeted = [entry for entry in measured if not entry.arm.has_floor]
        answers = agreement_by_position(engine, [entry.arm for entry in budgeted], prompt.token_ids, text)
        for entry, found in zip(budgeted, answers, strict=True):
            entry.agreement.append(found.top1)
            entry.kl.append(found.kl)
        for entry in measured:
            governor = contestants.governors.of(entry.arm)
            root_agrees, summary = replay(engine, entry.arm, prompt.token_ids, text, governor)
            entry.agreement_own_kv.append(root_agrees)
            entry.replays.append(summary)
        progress(f"agreement: prompt {number + 1} of {len(followed)}")


def _equal_prefix(ours: list[int], theirs: list[int]) -> int:
    pairs = zip(ours, theirs, strict=False)
    return next((n for n, (one, other) in enumerate(pairs) if one != other), min(len(ours), len(theirs)))
