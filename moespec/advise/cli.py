"""`python -m moespec advise`: arguments, and the advice or its JSON on stdout. Knows no measure."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

from moespec.advise.advice import advise, checked_least_budget
from moespec.advise.devices import DEVICE_NAMES, HERE, device_of_bandwidth
from moespec.advise.measure import measure_advice
from moespec.advise.table import advice_text, measured_text
from moespec.bench.measure import read_prompts
from moespec.config import EMBEDDED_TARGET
from moespec.engine import Engine
from moespec.profile import built_in_prompts
from moespec.published import PUBLISHED
from moespec.shapes import shape_of

PROMPTS = Path(__file__).resolve().parents[2] / "assets" / "bench" / "prompts.jsonl"
EPILOG = (
    f"Without --measure nothing is loaded: --target may then be a config file or one of {', '.join(PUBLISHED)}, "
    f"--device one of {', '.join(DEVICE_NAMES)}."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--bandwidth", type=float, metavar="GB/S", help="instead of a device: what its memory reads")
    parser.add_argument(
        "--acceptance", metavar="P,P,...", help="share of first guesses that are right at depth 1, 2, ...: 0.8,0.7,0.6"
    )
    parser.add_argument(
        "--accepted", metavar="N[@ROWS]", help="instead: tokens per step, at a tree of ROWS rows (64): 3.1@32"
    )
    parser.add_argument("--context", type=int, default=0, metavar="N", help="positions in the cache")
    parser.add_argument("--least-budget", type=int, metavar="B", help="smallest budget to choose (half of the experts)")
    parser.add_argument("--measure", action="store_true", help="load the pair and measure it here")
    parser.add_argument("--seconds", type=float, default=20.0, metavar="S", help="--measure: how long steps are timed")
    parser.add_argument("--limit", type=int, metavar="N", help="--measure: so many of the benchmark's prompts, not all")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the text")


def print_advice(args: argparse.Namespace, load: Callable[[argparse.Namespace], Engine]) -> int:
    """Advise, measure where that is asked for, and print."""
    if args.bandwidth is not None and args.measure:
        raise ValueError(f"bandwidth={args.bandwidth} and --measure exclude each other: this machine is measured.")
    if args.measure and args.device not in HERE:
        raise ValueError(f"device={args.device!r} is not here to be measured: use {', '.join(HERE)}.")
    device = args.device if args.bandwidth is None else device_of_bandwidth(args.bandwidth)
    advice = advise(
        args.target or EMBEDDED_TARGET,
        device,
        acceptance=args.acceptance,
        accepted=args.accepted,
        drafter=args.drafter,
        dtype=args.dtype,
        revision=args.revision,
        context=args.context,
        least_budget=args.least_budget,
    )
    if not args.json:
        print(advice_text(advice), flush=True)
    measured = None
    if args.measure:
        engine = load(args)
        shape = shape_of(engine.target.model, engine.name)
        least = checked_least_budget(args.least_budget, shape)
        measured = measure_advice(engine, shape, _prompts(engine, args.limit), least, args.seconds)
        if not args.json:
            print("\n" + measured_text(measured, advice))
    if args.json:
        values = {"modelled": advice.to_json()} | ({} if measured is None else {"measured": measured.to_json()})
        print(json.dumps(values))
    return 0


def _prompts(engine: Engine, limit: int | None) -> list[list[int]]:
    """The benchmark's prompts where the model takes chats, else the profile's own."""
    if getattr(engine.target.tokenizer, "chat_template", None) is None:
        return built_in_prompts(engine)
    return [prompt.token_ids for prompt in read_prompts(PROMPTS, engine, limit)]
