"""`python -m moespec bench decode`: arguments, progress on stderr, the record on stdout. Knows no measure."""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
from pathlib import Path

from moespec.bench.arms import parse_arms
from moespec.bench.contestants import Contestants
from moespec.bench.measure import measure, read_prompts
from moespec.bench.report import arm_record, ratios, table
from moespec.engine import Engine

PROMPTS = Path(__file__).resolve().parents[2] / "assets" / "bench" / "prompts.jsonl"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--arms", metavar="LIST", help="names joined by spaces; default: all. See moespec/bench/arms.py"
    )
    parser.add_argument("--limit", type=int, metavar="N", help="use N of the prompts, spread over all sources")
    parser.add_argument("--follow", type=int, default=16, metavar="N", help="measure agreement on N of them")
    parser.add_argument("--prompts", type=Path, default=PROMPTS)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--json", action="store_true", help="the record as the last line, instead of a table")


def bench_decode(engine: Engine, target: str | Path, args: argparse.Namespace) -> int:
    """Measure and print. The reference is loaded again from `target`: an untouched transformers model."""
    if engine.drafter is None:
        raise ValueError("bench decode compares drafting with not drafting: give it a drafter.")
    if args.max_new_tokens < 2:
        raise ValueError(f"max-new-tokens={args.max_new_tokens} is not allowed: use 2 or more.")
    if args.follow < 1:
        raise ValueError(f"follow={args.follow} is not allowed: use 1 or more.")
    arms = parse_arms(args.arms)
    for arm in arms:
        if arm.budget is not None:
            engine.check_budget(arm.budget)
    prompts = read_prompts(args.prompts, engine, args.limit)
    longest = max(len(prompt.token_ids) for prompt in prompts)
    if longest + args.max_new_tokens > engine.info.max_context:
        raise ValueError(
            f"the longest prompt has {longest} tokens: with max-new-tokens={args.max_new_tokens} it leaves the context "
            f"of {engine.info.max_context}."
        )
    contestants = Contestants(engine, target, args.max_new_tokens)
    speeds = contestants.choose_experts(prompts[0].token_ids)
    measured = measure(contestants, arms, prompts, args.follow, lambda line: print(line, file=sys.stderr, flush=True))
    records = [arm_record(entry) for entry in measured]
    found = ratios(measured)
    document = {
        "device": engine.card(),
        "commit": checked_out_commit(),
        "model": {"name": engine.name, "drafter": engine.drafter.name},
        "prompts": {
            "file": args.prompts.name,
            "sha256": hashlib.sha256(args.prompts.read_bytes()).hexdigest(),
            "num_prompts": len(prompts),
            "num_followed": min(args.follow, len(prompts)),
            "max_new_tokens": args.max_new_tokens,
        },
        "transformers_experts": {"chosen": contestants.experts_implementation, "tokens_per_s": speeds},
        "ratios": found,
        "arms": records,
    }
    if args.json:
        print(json.dumps(document))
    else:
        print(table(records))
        for ratio in found:
            low, high = ratio["interval_95"]
            print(f"{ratio['of']} is {ratio['median']:.2f} times as fast as {ratio['to']} ({low:.2f} to {high:.2f})")
    return 0


def checked_out_commit() -> str | None:
    """The checked-out commit, "+" behind it where files differ from it; None outside a git checkout."""
    folder = Path(__file__).resolve().parents[2]
    try:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=folder, capture_output=True, text=True, check=True)
        changes = subprocess.run(
            ["git", "status", "--porcelain"], cwd=folder, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit.stdout.strip() + ("+" if changes.stdout.strip() else "")
