"""The command line: every command's arguments and printing. Knows no algorithm."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moespec import Engine

NO_MEMORY = "can't allocate memory"  # as torch says of a CPU's, in no error of its own
CALIBRATIONS = ("similarity", "sensitivity", "acceptance")


def main(arguments: list[str] | None = None) -> int:
    """Run one command; 2 and one sentence on stderr for what cannot be done."""
    parser = argparse.ArgumentParser(prog="python -m moespec", description=__doc__.splitlines()[0] if __doc__ else None)
    commands = parser.add_subparsers(dest="command", required=True)
    # Their parsers import what they run: only for those who ask.
    given = (sys.argv[1:] if arguments is None else arguments)[:2]
    _add_generate(commands)
    inspect = commands.add_parser(
        "inspect",
        help="what the engine sees in a target and its drafter",
        epilog="inspect experts: how specialised the experts are, and what draft trees ask of them; "
        "inspect similarity, sensitivity, acceptance: files for the expert policies that are calibrated",
    )
    if given == ["inspect", "experts"]:
        _add_inspect_experts(inspect)
    elif given[:1] == ["inspect"] and given[-1] in CALIBRATIONS:
        from moespec.calibrate.cli import add_calibration

        _add_model_arguments(inspect_parser := inspect.add_subparsers(required=True).add_parser(given[-1]))
        add_calibration(inspect_parser, given[-1], _load)
    else:
        _add_model_arguments(inspect)
        inspect.set_defaults(handler=_inspect)
    if given[:1] == ["bench"]:
        _add_bench(commands)
    else:
        commands.add_parser("bench", help="measure on this machine: decoding, or one MoE layer")
    quality = commands.add_parser(
        "quality", help="quality against budget: questions with exact answers, held-out texts"
    )
    if given[:1] == ["quality"]:
        _add_quality(quality)
    advice = commands.add_parser("advise", help="will speculation pay, with which tree and budget? before loading")
    if given[:1] == ["advise"]:
        _add_advise(advice)
    if given[:1] == ["train"]:
        from moespec.train.cli import add_train_parser

        add_train_parser(commands)
    else:
        commands.add_parser("train", help="train the tokenizer, the target, the draft head")
    args = parser.parse_args(arguments)
    try:
        return args.handler(args)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        from torch import OutOfMemoryError

        if not (isinstance(error, OutOfMemoryError) or NO_MEMORY in str(error)):
            raise
        print(
            f"error: {str(error).splitlines()[0]} Use fewer rows, a shorter context, or dtype bfloat16.",
            file=sys.stderr,
        )
        return 2


def _add_model_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--target", help="directory or hub id (default: the embedded model)")
    parser.add_argument(
        "--drafter",
        default="auto",
        help="auto, ngram, none, a draft head's directory or hub id, or model:PATH for a small model's",
    )
    parser.add_argument(
        "--taps", metavar="N,N,N", help="layers whose input the head reads, where its config does not say: 2,8,15"
    )
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto", help="auto, float32, bfloat16 or float16")
    parser.add_argument("--revision", help="branch, tag or commit of a hub id")
    parser.add_argument("--backend", default="auto", help="what runs the experts: auto, reference, cpu or triton")
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument(
        "--profiles", type=Path, metavar="DIR", help="calibration files of expert policies (default: beside the target)"
    )


def _add_generate(commands: Any) -> None:
    from moespec.generate_cli import add_arguments, generate

    parser = commands.add_parser("generate", help="stream an answer to the terminal")
    parser.add_argument("prompt")
    _add_model_arguments(parser)
    add_arguments(parser)
    parser.set_defaults(handler=lambda args: generate(args, _load))


def _add_bench(commands: Any) -> None:
    from moespec.bench.batch import add_arguments as add_batch_arguments
    from moespec.bench.cli import add_arguments, add_kernel_arguments, print_kernels
    from moespec.bench.methods_cli import add_arguments as add_method_arguments
    from moespec.bench.step_cli import add_arguments as add_step_arguments
    from moespec.bench.step_cli import print_steps

    benches = commands.add_parser("bench", help="measure on this machine").add_subparsers(required=True)
    decode = benches.add_parser("decode", help="transformers, plain, EAGLE-3 and MoE-Spec on the same prompts")
    _add_model_arguments(decode)
    add_arguments(decode)
    decode.set_defaults(handler=_bench_decode)
    methods = benches.add_parser("methods", help="every expert policy and governor at matched experts per layer")
    _add_model_arguments(methods)
    add_method_arguments(methods)
    methods.set_defaults(handler=_bench_methods)
    batch = benches.add_parser("batch", help="several requests side by side, against one at a time")
    _add_model_arguments(batch)
    add_batch_arguments(batch)
    batch.set_defaults(handler=_bench_batch)
    kernels = benches.add_parser("kernels", help="one MoE layer by rows and budget, against the memory's bandwidth")
    add_kernel_arguments(kernels)
    kernels.set_defaults(handler=print_kernels)
    steps = benches.add_parser("step", help="whole verify steps by tree and budget, against the memory's bandwidth")
    add_step_arguments(steps)
    steps.set_defaults(handler=print_steps)


def _add_quality(parser: argparse.ArgumentParser) -> None:
    from moespec.quality.cli import add_arguments

    _add_model_arguments(parser)
    add_arguments(parser)
    parser.set_defaults(handler=_quality)


def _add_inspect_experts(inspect: argparse.ArgumentParser) -> None:
    from moespec.quality.inspect_cli import add_arguments

    experts = inspect.add_subparsers(required=True).add_parser("experts", help="how specialised the experts are")
    _add_model_arguments(experts)
    add_arguments(experts)
    experts.set_defaults(handler=_inspect_experts)


def _add_advise(parser: argparse.ArgumentParser) -> None:
    from moespec.advise.cli import EPILOG, add_arguments

    parser.epilog = EPILOG
    _add_model_arguments(parser)
    add_arguments(parser)
    parser.set_defaults(handler=_advise)


def _advise(args: argparse.Namespace) -> int:
    from moespec.advise.cli import print_advice

    _use_threads(args)  # this machine is measured with them
    return print_advice(args, _load)


def _load(args: argparse.Namespace) -> Engine:
    from transformers.utils import logging

    from moespec import EMBEDDED_TARGET, Engine

    logging.disable_progress_bar()  # stderr is for errors alone
    _use_threads(args)
    return Engine.from_pretrained(
        args.target or EMBEDDED_TARGET,
        args.drafter,
        device=args.device,
        dtype=args.dtype,
        backend=args.backend,
        revision=args.revision,
        tap_layers=None if args.taps is None else _layers(args.taps),
    )


def _use_threads(args: argparse.Namespace) -> None:
    import torch

    if args.threads is not None:
        if args.threads < 1:
            raise ValueError(f"threads={args.threads} is not allowed: use 1 or more.")
        torch.set_num_threads(args.threads)


def _layers(text: str) -> tuple[int, ...]:
    parts = text.split(",")
    if not all(part.isdecimal() for part in parts):
        raise ValueError(f"taps={text!r} is not a list of layers, such as 2,8,15.")
    return tuple(int(part) for part in parts)


def _bench_decode(args: argparse.Namespace) -> int:
    from moespec import EMBEDDED_TARGET
    from moespec.bench.cli import bench_decode

    return bench_decode(_load(args), args.target or EMBEDDED_TARGET, args)


def _bench_methods(args: argparse.Namespace) -> int:
    from moespec import EMBEDDED_TARGET
    from moespec.bench.methods_cli import bench_methods

    return bench_methods(_load(args), args.target or EMBEDDED_TARGET, args)


def _bench_batch(args: argparse.Namespace) -> int:
    from moespec.bench.batch import bench_batch

    return bench_batch(_load(args), args)


def _quality(args: argparse.Namespace) -> int:
    from moespec.quality.cli import quality

    return quality(_load(args), args)


def _inspect_experts(args: argparse.Namespace) -> int:
    from moespec.quality.inspect_cli import inspect_experts

    return inspect_experts(_load(args), args)


def _inspect(args: argparse.Namespace) -> int:
    engine = _load(args)
    print(json.dumps(vars(engine.info) | {"device": engine.card()}, indent=1))
    return 0
