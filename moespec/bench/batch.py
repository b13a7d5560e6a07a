"""`python -m moespec bench batch`: tokens a second of several requests side by side, against one with like settings.

Owns the arms (a way to write, a number of requests, and whom a budget is for), the order of runs and the record. Every
arm writes the same groups of prompts, as many at a time as it has requests, arms in rotation; what is timed are the
steps in which all requests take part, prompts not included. Ratios are paired by group.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from moespec.batch import Batch
from moespec.bench.arms import Arm, parse_arms
from moespec.bench.cli import PROMPTS
from moespec.bench.machine import checked_out_commit
from moespec.bench.measure import BenchPrompt, read_prompts
from moespec.bench.timed import Timed, overall, paired_ratio
from moespec.config import SCOPES, BudgetConfig, GenerationConfig, TreeConfig
from moespec.engine import Engine
from moespec.request import Request
from moespec.trace import StepTrace

ARMS = "plain eagle3 moe-spec:substitution:12"  # the page's budget


@dataclass(frozen=True)
class Sample:
    """What a group of prompts gave: all requests' tokens together, and the steps as the requests saw them."""

    timed: Timed
    steps: list[StepTrace]


@dataclass
class BatchArm:
    """One way to write with `size` requests at a time; one sample per group of prompts."""

    name: str
    tree: TreeConfig
    budget: BudgetConfig
    size: int
    samples: list[Sample] = field(default_factory=list)

    @property
    def timed(self) -> list[Timed]:
        return [sample.timed for sample in self.samples]

    def write(self, engine: Engine, prompts: Sequence[list[int]], num_tokens: int) -> Sample:
        """Answer all prompts to their ends, `size` at a time, the next joining when one has ended.

        Timed are the steps in which all take part and no prompt is read. ValueError if there is none.
        """
        engine.forget()
        generation = GenerationConfig(max_new_tokens=num_tokens)
        batch, outcomes = Batch(engine, self.size), list[StepTrace | BaseException]()
        for prompt in prompts:
            batch.join(Request(prompt, generation, self.budget, self.tree), outcomes.append)
        steps, seconds, goes_on = list[StepTrace](), 0.0, True
        while goes_on:
            outcomes.clear()
            began = time.perf_counter()
            goes_on = batch.step()
            elapsed = time.perf_counter() - began
            found = [outcome for outcome in outcomes if isinstance(outcome, StepTrace)]
            if len(found) < len(outcomes):
                raise next(outcome for outcome in outcomes if isinstance(outcome, BaseException))
            if len(found) == self.size and all(step.kind != "prefill" for step in found):
                steps, seconds = steps + found, seconds + elapsed
        if not steps:
            raise ValueError(f"max-new-tokens={num_tokens} is too few: an answer ended before all were under way.")
        return Sample(Timed(sum(len(step.token_ids) for step in steps), seconds), steps)


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
        read = statistics.fmean(step.expert_bytes for step in steps) * arm.size / bytes_per_expert / num_layers
        rows.append(
            {
                "name": arm.name,
                "tree": arm.tree.numbers,
                "requests": arm.size,
                "scope": arm.budget.scope if arm.size > 1 and not arm.budget.is_lossless else None,
                "tokens_per_s": round(overall(arm.timed), 1),
                "to_one_request": paired_ratio(arm.timed, alone.timed),
                "tokens_per_step_of_each": round(statistics.fmean(len(step.token_ids) for step in steps), 3),
                **{name: round(statistics.median(getattr(step, name) for step in steps), 3) for name in _PARTS},
                "experts_read": round(read, 2),
            }
        )
    return rows


_PARTS = ("draft_ms", "verify_ms", "other_ms")


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
    parser.add_argument(
        "--groups", type=int, default=8, metavar="N", help="groups of prompts, twice the largest size each"
    )
    parser.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="of an answer that does not end")
    parser.add_argument("--json", action="store_true", help="the record as the last line, instead of a table")


def bench_batch(engine: Engine, args: argparse.Namespace) -> int:
    """Measure and print."""
    if engine.drafter is None:
        raise ValueError("bench batch compares drafting with not drafting: give it a drafter.")
    if args.groups < 1 or args.max_new_tokens < 2 or min(args.sizes) < 1:
        raise ValueError("use 1 or more groups, 2 or more max-new-tokens and sizes of 1 or more.")
    arms = [arm for arm in parse_arms(args.arms) if arm.budget is not None]
    for arm in arms:
        assert arm.budget is not None
        engine.check_budget(arm.budget)
    sizes = sorted({1, *args.sizes})
    per_group = 2 * sizes[-1]
    groups = _groups(read_prompts(PROMPTS, engine, args.groups * per_group), per_group)
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
            "groups": len(groups),
            "prompts_per_group": per_group,
            "max_new_tokens": args.max_new_tokens,
        },
        "arms": rows,
    }
    print(json.dumps(document) if args.json else batch_table(rows))
    return 0


def _groups(prompts: list[BenchPrompt], size: int) -> list[list[list[int]]]:
    """Token ids in groups of `size`, each with prompts from all over the file; the rest is left out."""
    num_groups = len(prompts) // size
    return [[prompt.token_ids for prompt in prompts[n::num_groups][:size]] for n in range(num_groups)]
