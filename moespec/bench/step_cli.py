"""`python -m moespec bench step`: arguments, and the record or its table on stdout. Knows no measure."""

from __future__ import annotations

import argparse
import json

import torch

from moespec.bench.layers import EMBEDDED
from moespec.bench.step import bench_step, step_table
from moespec.bench.step_models import MODEL_NAMES


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--models", nargs="+", choices=MODEL_NAMES, default=[EMBEDDED], metavar="NAME", help=", ".join(MODEL_NAMES)
    )
    parser.add_argument("--dtype", default="auto", help="auto, float32, bfloat16 or float16")
    parser.add_argument("--rounds", type=int, default=6, metavar="N", help="how often each arm has its turn")
    parser.add_argument("--steps", type=int, default=8, metavar="N", help="steps of a turn")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--seconds-limit", type=float, metavar="S", help="begin no model after this time")
    parser.add_argument("--json", action="store_true", help="the record as the last line, instead of tables")


def print_steps(args: argparse.Namespace) -> int:
    """Measure whole steps and print."""
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device='cuda' cannot be used here: torch finds none.")
    device = torch.device("cuda" if torch.cuda.is_available() and args.device != "cpu" else "cpu")
    record = bench_step(args.models, args.dtype, args.rounds, args.steps, device, args.seconds_limit)
    print(json.dumps(record) if args.json else step_table(record))
    return 0
