"""`python -m moespec generate`: its arguments, and an answer streamed to the terminal. Knows no algorithm."""

from __future__ import annotations

import argparse
import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moespec import BudgetConfig, Engine, EngineInfo, RunSummary


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--budget", default="none", metavar="N|none", help="experts per layer while a tree is verified")
    parser.add_argument("--coverage", type=float, metavar="P", help="instead: the fewest experts with this router mass")
    parser.add_argument("--policy", default="substitution", help="substitution, truncation or NAME[:key=value,...]")
    parser.add_argument("--score", default="softmax", help="softmax (the paper's) or natural")
    parser.add_argument("--row-weight", default="uniform", help="uniform (the paper's), depth or path")
    parser.add_argument("--protect-root", action="store_true", help="never take an expert from the root")
    parser.add_argument(
        "--tree",
        metavar="TOTAL,DEPTH,TOPK[,MINP]",
        help="draft tree: rows with the root, levels, branching, least likely path",
    )
    parser.add_argument(
        "--governor",
        default="fixed",
        metavar="NAME",
        help="decides tree and budget step by step: fixed, evict, cascade-like, utility, utility:floor=P",
    )
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--top-k", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--ignore-eos", action="store_true")
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="may be given more than once")
    parser.add_argument("--raw", action="store_true", help="no chat template")
    parser.add_argument("--no-thinking", action="store_true", help="turn off the template's switch for thinking aloud")
    parser.add_argument("--json", action="store_true", help="one JSON object per step and, last, the summary")
    parser.add_argument("--trace", type=Path, metavar="FILE", help="also write the trace as JSON lines")


def generate(args: argparse.Namespace, load: Callable[[argparse.Namespace], Engine]) -> int:
    """Refuse what can be refused before the pair is loaded, then stream."""
    from moespec import Control, GenerationConfig, TreeConfig, write_trace
    from moespec.governors import parse_governor
    from moespec.kept_costs import profile_costs

    generation = GenerationConfig(
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_p=args.top_p,
        top_k=args.top_k,
        seed=args.seed,
        ignore_eos=args.ignore_eos,
        stop=tuple(args.stop),
        raw=args.raw,
        thinking=not args.no_thinking,
    )
    if args.trace is not None and not args.trace.absolute().parent.is_dir():
        raise ValueError(f"{args.trace} cannot be written: its folder does not exist.")
    budget = _budget(args)
    tree = TreeConfig() if args.tree is None else TreeConfig.parse(args.tree)
    engine = load(args)
    engine.check_budget(budget)
    governor = parse_governor(args.governor, lambda: profile_costs(engine))
    control = Control()
    steps = engine.generate(args.prompt, generation, budget, tree, control, governor)
    previous = signal.signal(signal.SIGINT, lambda *_: control.stop())  # the step under way ends, the summary follows
    seen = []
    try:
        for step in steps:
            if args.json:
                values = step.to_json()
                values.pop("summary")
                print(json.dumps(values), flush=True)
            else:
                print(step.text, end="", flush=True)
            if args.trace is not None:
                seen.append(step)
            if step.summary is not None:
                summary = step.summary
    finally:
        signal.signal(signal.SIGINT, previous)
    if args.trace is not None:
        write_trace(args.trace, engine.header(args.prompt, generation, budget, tree, governor), seen)
    print(json.dumps(vars(summary)) if args.json else _summary_lines(summary, engine.info))
    return 0


def _budget(args: argparse.Namespace) -> BudgetConfig:
    from moespec import BudgetConfig
    from moespec.config import POLICIES
    from moespec.policies.parsing import parse_policy
    from moespec.policies.profiles import profiles_folder

    if args.policy not in POLICIES:
        apart = (args.budget, args.coverage, args.score, args.row_weight, args.protect_root)
        if apart != ("none", None, "softmax", "uniform", False):
            raise ValueError(
                f"--policy {args.policy} says it all: --budget, --coverage, --score, --row-weight and --protect-root "
                "go with substitution or truncation; write moe-spec:b=12,score=natural,row-weight=path,root."
            )
        return parse_policy(args.policy, profiles_folder(args.target, args.profiles))
    if args.budget != "none" and not args.budget.removeprefix("-").isdecimal():
        raise ValueError(f"budget={args.budget!r} is not a number of experts, nor none.")
    return BudgetConfig(
        budget=None if args.budget == "none" else int(args.budget),
        coverage=args.coverage,
        policy=args.policy,
        score=args.score,
        row_weight=args.row_weight,
        protect_root=args.protect_root,
    )


def _summary_lines(summary: RunSummary, info: EngineInfo) -> str:
    experts = "no tree steps"
    if summary.experts_natural is not None:
        experts = f"experts per layer {summary.experts_natural:.1f} natural, {summary.experts_active:.1f} read"
    return (
        f"\n\n{len(summary.token_ids)} tokens, {summary.tokens_per_s:.1f} tokens/s, "
        f"{summary.tokens_per_step:.2f} tokens per step; {experts}; router mass kept {summary.mass_kept:.3f}; "
        f"{'lossless' if summary.lossless else 'lossy'}; ended by {summary.finish_reason}; "
        f"drafter {info.drafter_name} ({info.drafter_reason})"
    )
