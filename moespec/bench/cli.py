"""`python -m moespec bench decode | kernels`: arguments, progress on stderr, the record on stdout. Knows no measure."""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from moespec.bench.arms import parse_arms
from moespec.bench.contestants import Contestants
from moespec.bench.kernels import Settings, bench_kernels
from moespec.bench.layers import DTYPE_NAMES, SHAPE_NAMES
from moespec.bench.machine import checked_out_commit
from moespec.bench.measure import BenchPrompt, measure, read_prompts
from moespec.bench.report import arm_record, ratios, table
from moespec.bench.roofline import LEGEND, fit_table, layer_table, target_lines
from moespec.bench.routings import BUDGETS, ROWS
from moespec.engine import Engine
from moespec.policies.profiles import profiles_folder

PROMPTS = Path(__file__).resolve().parents[2] / "assets" / "bench" / "prompts.jsonl"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--arms", metavar="LIST", help="names joined by spaces; default: all. See moespec/bench/arms.py"
    )
    add_prompt_arguments(parser)


def add_prompt_arguments(parser: argparse.ArgumentParser) -> None:
    """Of benchmarks whose arms write the same prompts."""
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="answer all prompts N times")
    parser.add_argument("--limit", type=int, metavar="N", help="use N of the prompts, spread over all sources")
    parser.add_argument("--follow", type=int, default=16, metavar="N", help="measure agreement on N of them")
    parser.add_argument("--prompts", type=Path, default=PROMPTS)
    parser.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="of an answer that does not end")
    parser.add_argument("--json", action="store_true", help="the record as the last line, instead of a table")


def chosen_prompts(engine: Engine, args: argparse.Namespace) -> list[BenchPrompt]:
    """The prompts asked for. ValueError for what cannot be measured on them."""
    if engine.drafter is None:
        raise ValueError("this benchmark compares drafting with not drafting: give it a drafter.")
    if args.max_new_tokens < 2:
        raise ValueError(f"max-new-tokens={args.max_new_tokens} is not allowed: use 2 or more.")
    for name in ("follow", "rounds"):
        if getattr(args, name) < 1:
            raise ValueError(f"{name}={getattr(args, name)} is not allowed: use 1 or more.")
    prompts = read_prompts(args.prompts, engine, args.limit)
    longest = max(len(prompt.token_ids) for prompt in prompts)
    if longest + args.max_new_tokens > engine.info.max_context:
        raise ValueError(
            f"the longest prompt has {longest} tokens: with max-new-tokens={args.max_new_tokens} it leaves the context "
            f"of {engine.info.max_context}."
        )
    return prompts


def record_head(engine: Engine, args: argparse.Namespace, prompts: Sequence[BenchPrompt]) -> dict[str, Any]:
    """What a record's figures are of: machine, commit, models, prompts."""
    return {
        "device": engine.card(),
        "commit": checked_out_commit(),
        "model": {"name": engine.name, "drafter": engine.info.drafter_name},
        "prompts": {
            "file": args.prompts.name,
            "sha256": hashlib.sha256(args.prompts.read_bytes()).hexdigest(),
            "num_prompts": len(prompts),
            "num_followed": min(args.follow, len(prompts)),
            "num_rounds": args.rounds,
            "max_new_tokens": args.max_new_tokens,
        },
    }


def bench_decode(engine: Engine, target: str | Path, args: argparse.Namespace) -> int:
    """Measure and print. The reference is loaded again from `target`: an untouched transformers model."""
    arms = parse_arms(args.arms, profiles_folder(args.target, args.profiles))
    for arm in arms:
        if arm.budget is not None:
            engine.check_budget(arm.budget)
    prompts = chosen_prompts(engine, args)
    contestants = Contestants(engine, target, args.max_new_tokens, args.revision)
    speeds = contestants.choose_experts([prompt.token_ids for prompt in prompts[:: max(1, len(prompts) // 8)]])
    measured = measure(
        contestants, arms, prompts, args.rounds, args.follow, lambda line: print(line, file=sys.stderr, flush=True)
    )
    records = [arm_record(entry) for entry in measured]
    found = ratios(measured)
    document = record_head(engine, args, prompts) | {
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
            print(f"{ratio['of']} is {ratio['ratio']:.2f} times as fast as {ratio['to']} ({low:.2f} to {high:.2f})")
    return 0


def add_kernel_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--shapes", nargs="+", choices=SHAPE_NAMES, metavar="NAME", help=f"{', '.join(SHAPE_NAMES)}; default: by device"
    )
    parser.add_argument(
        "--dtype", nargs="+", choices=DTYPE_NAMES, metavar="NAME", help=f"{', '.join(DTYPE_NAMES)}; default: by device"
    )
    parser.add_argument("--rows", nargs="+", type=int, default=ROWS, metavar="T", help="rows of a step")
    parser.add_argument(
        "--budgets", nargs="+", type=_budget, default=BUDGETS, metavar="B", help="experts kept; none for all"
    )
    parser.add_argument("--sweep", action="store_true", help="first try tiles; writes kernels/tiles.json. CUDA only")
    parser.add_argument("--seconds-limit", type=float, metavar="S", help="leave out what does not fit, the least first")
    parser.add_argument("--note", metavar="TEXT", help="kept in the record: what else the machine did")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--json", action="store_true", help="the record as the last line, instead of tables")


def _budget(text: str) -> int | None:
    if text != "none" and not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of experts, nor none")
    return None if text == "none" else int(text)


def print_kernels(args: argparse.Namespace) -> int:
    """Measure one MoE layer and print."""
    if args.threads is not None:
        if args.threads < 1:
            raise ValueError(f"threads={args.threads} is not allowed: use 1 or more.")
        torch.set_num_threads(args.threads)
    has_cuda = torch.cuda.is_available()
    if args.device not in ("auto", "cpu", "cuda") or (args.device == "cuda" and not has_cuda):
        raise ValueError(
            f"device={args.device!r} cannot be used here: use auto{', cpu or cuda' if has_cuda else ' or cpu'}."
        )
    device = torch.device("cuda" if has_cuda and args.device != "cpu" else "cpu")
    settings = Settings(args.shapes, args.dtype, args.rows, args.budgets, args.sweep, args.seconds_limit, args.note)
    record = bench_kernels(settings, device)
    if args.json:
        print(json.dumps(record))
        return 0
    print(layer_table(record["shapes"]), LEGEND, fit_table(record["shapes"]), sep="\n\n")
    if record["targets"]["list"]:
        print("", target_lines(record["targets"]["list"]), sep="\n")
    return 0
