"""`python -m moespec bench batch`: tokens a second of several requests side by side, against one with like settings.

Owns the arms (a way to write, a number of requests, and whom a budget is for), the order of runs and the record. Every
arm writes the same groups of prompts, as many at a time as it has requests, arms in rotation; what is timed are the
steps in which all requests take part, prompts not included. Those steps are of other answers than one request's, for
the last and longest is left alone: every token is held against the speed of its own answer by itself.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from moespec.batch import Batch
from moespec.bench.arms import Arm, parse_arms
from moespec.bench.cli import PROMPTS
from moespec.bench.machine import checked_out_commit
from moespec.bench.measure import read_prompts
from moespec.bench.timed import Timed, overall, paired_ratio
from moespec.config import SCOPES, BudgetConfig, GenerationConfig, TreeConfig
from moespec.engine import Engine
from moespec.policies.profiles import profiles_folder
from moespec.request import Request
from moespec.trace import StepTrace

PER_GROUP = 4  # prompts for each of the most requests: answers are short and long, and each must meet others
Delivered = StepTrace | BaseException  # what a request in a batch hears of
ARMS = "plain eagle3 moe-spec:substitution:12"  # the page's budget


@dataclass(frozen=True)
class Sample:
    """What a group of prompts gave: by prompt, its answer's tokens and its share of the time of the steps that wrote
    them, where everyone's share is equal; and the steps as the requests saw them."""

    answers: list[Timed]
    steps: list[StepTrace]

    @property
    def together(self) -> Timed:
        return _together(self.answers)

    def alone(self, others: Sample) -> Timed:
        """The time that this sample's tokens took in another one, where every answer was written at its own speed.

        An answer that has no step there, as a lossy one may, is taken at the speed of all.
        """
        speeds = [overall([theirs]) or overall(others.answers) for theirs in others.answers]
        return _together([Timed(n, n / speed) for (n, _), speed in zip(self.answers, speeds, strict=True)])


@dataclass
class BatchArm:
    """One way to write with `size` requests at a time; one sample per group of prompts."""

    name: str
    tree: TreeConfig
    budget: BudgetConfig
    size: int
    samples: list[Sample] = field(default_factory=list)

    def write(self, engine: Engine, prompts: Sequence[list[int]], num_tokens: int) -> Sample:
        """Answer all prompts to their ends, `size` at a time, the next joining when one has ended.

        Timed are the steps in which all take part and no prompt is read. ValueError if there is none.
        """
        engine.forget()
        generation = GenerationConfig(max_new_tokens=num_tokens)
        batch, outcomes = Batch(engine, self.size), list[tuple[int, Delivered]]()
        for place, prompt in enumerate(prompts):
            request = Request(prompt, generation, self.budget, self.tree)
            batch.join(request, partial(_note, outcomes, place))
        answers, steps, goes_on = [Timed(0, 0.0) for _ in prompts], list[StepTrace](), True
        while goes_on:
            outcomes.clear()
            began = time.perf_counter()
            goes_on = batch.step()
            elapsed = time.perf_counter() - began
            found = [(place, outcome) for place, outcome in outcomes if isinstance(outcome, StepTrace)]
            if len(found) < len(outcomes):
                batch.close()
                raise next(outcome for _, outcome in outcomes if isinstance(outcome, BaseException))
            if len(found) == self.size and all(step.kind != "prefill" for _, step in found):
                steps += [step for _, step in found]
                for place, step in found:
                    answers[place] = _together([answers[place], Timed(len(step.token_ids), elapsed / self.size)])
        if not steps:
            raise ValueError(f"max-new-tokens={num_tokens} is too few: an answer ended before all were under way.")
        return Sample(answers, steps)


def batch_arms(arms: Sequence[Arm], sizes: Sequence[int]) -> list[BatchArm]:
    """Every arm at every size; a budget for one request is the same whomever it is for."""
    found = []
    for arm in arms:
        assert arm.tree is not None and arm.budget is not None
        for size in sizes:
            scopes = SCOPES if arm.is_lossy and size > 1 else SCOPES[:1]
            found += [BatchArm(arm.name, arm.tree, replace(arm.budget, scope=scope), size) for scope in scopes]
    return found


def measure_batches(engine: Engine, arms: list[BatchArm], groups: list[list[list[int]]], num_tokens: int) -> None:
    """A sample of every arm and group; the first group is written twice, and its first time thrown away."""
    for number, group in enumerate([groups[0], *groups]):
        shift = number % len(arms)
        for arm in arms[shift:] + arms[:shift]:
            sample = arm.write(engine, group, num_tokens)
            if number:
                arm.samples.append(sample)
        print(f"group {number} of {len(groups)}" if number else "warm-up", file=sys.stderr, flush=True)


def batch_record(arms: Sequence[BatchArm], num_layers: int, bytes_per_expert: int) -> list[dict[str, Any]]:
    """One row per arm: speed of all requests together and against one alone, and what a step takes and reads."""
    rows = []
    for arm in arms:
        alone = next(one for one in arms if (one.name, one.tree, one.size) == (arm.name, arm.tree, 1))
        steps = [step for sample in arm.samples for step in sample.steps]
        together = [sample.together for sample in arm.samples]
        apart = [sample.alone(other) for sample, other in zip(arm.samples, alone.samples, strict=True)]
        read = statistics.fmean(step.expert_bytes for step in steps) * arm.size / bytes_per_expert / num_layers
        rows.append(
            {
                "name": arm.name,
                "tree": arm.tree.numbers,
                "requests": arm.size,
                "scope": arm.budget.scope if arm.size > 1 and not arm.budget.is_lossless else None,
                "tokens_per_s": round(overall(together), 1),
                "to_one_request": paired_ratio(together, apart),
                "tokens_per_step_of_each": round(statistics.fmean(len(step.token_ids) for step in steps), 3),
                **{name: round(statistics.median(getattr(step, name) for step in steps), 3) for name in _PARTS},
                "experts_read": round(read, 2),
            }
        )
    return rows


_PARTS = ("draft_ms", "verify_ms", "other_ms")


def _note(outcomes: list[tuple[int, Delivered]], place: int, outcome: Delivered) -> None:
    outcomes.append((place, outcome))


def _together(answers: Sequence[Timed]) -> Timed:
    return Timed(sum(answer.num_tokens for answer in answers), sum(answer.seconds for answer in answers))


def batch_table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = [
        "| arm | budget for | requests | tokens/s, all | to one (95 %) | tokens/step, each | draft + verify + other ms "
        "| experts read |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        low, high = row["to_one_request"]["interval_95"]
        parts = " + ".join(f"{row[name]:.2f}" for name in _PARTS)
        lines.append(
            f"| {row['name']} | {row['scope'] or '–'} | {row['requests']} | {row['tokens_per_s']:.0f} "
            f"| {row['to_one_request']['ratio']:.2f} ({low:.2f}–{high:.2f}) | {row['tokens_per_step_of_each']:.2f} "
            f"| {parts} | {row['experts_read']:.1f} |"
        )
    return "\n".join(lines)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--arms", default=ARMS, metavar="LIST", help="names joined by spaces; see moespec/bench/arms.py"
    )
    parser.add_argument("--sizes", nargs="+", type=int, default=[1, 2, 4], metavar="R", help="requests at a time")
    parser.add_argument("--groups", type=int, default=8, metavar="N", help="groups of prompts, drawn by chance")
    parser.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="of an answer that does not end")
    parser.add_argument("--json", action="store_true", help="the record as the last line, instead of a table")


def bench_batch(engine: Engine, args: argparse.Namespace) -> int:
    """Measure and print."""
    if engine.drafter is None:
        raise ValueError("bench batch compares drafting with not drafting: give it a drafter.")
    if args.groups < 1 or args.max_new_tokens < 2 or min(args.sizes) < 1:
        raise ValueError("use 1 or more groups, 2 or more max-new-tokens and sizes of 1 or more.")
    arms = [arm for arm in parse_arms(args.arms, profiles_folder(args.target, args.profiles)) if arm.budget is not None]
    for arm in arms:
        if arm.governor != "fixed":
            raise ValueError(f"arm {arm.name} cannot be run: a governor decides for one request; use fixed settings.")
        assert arm.budget is not None
        engine.check_budget(arm.budget)
    sizes = sorted({1, *args.sizes})
    prompts = [prompt.token_ids for prompt in read_prompts(PROMPTS, engine, None)]
    per_group = min(PER_GROUP * sizes[-1], len(prompts))
    groups = [random.Random(number).sample(prompts, per_group) for number in range(args.groups)]
    all_arms = batch_arms(arms, sizes)
    measure_batches(engine, all_arms, groups, args.max_new_tokens)
    rows = batch_record(all_arms, len(engine.target.moe_layers), engine.target.bytes_per_expert)
    document = {
        "device": engine.card(),
        "commit": checked_out_commit(),
        "model": {"name": engine.name, "drafter": engine.drafter.name},
        "prompts": {
            "file": PROMPTS.name,
            "sha256": hashlib.sha256(PROMPTS.read_bytes()).hexdigest(),
            "groups": args.groups,
            "prompts_per_group": per_group,
            "max_new_tokens": args.max_new_tokens,
        },
        "arms": rows,
    }
    print(json.dumps(document) if args.json else batch_table(rows))
    return 0
