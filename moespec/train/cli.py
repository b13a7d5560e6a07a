"""`python -m moespec train ...`: the sub-commands and their arguments. Knows nothing of what they do."""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path


def add_train_parser(subparsers: argparse._SubParsersAction) -> None:
    """Register `train` with its sub-commands; heavy modules are imported when one runs."""
    train = subparsers.add_parser("train", help="prepare data; train the tokenizer, the target, the draft head")
    steps = train.add_subparsers(dest="step", required=True)
    prepare = steps.add_parser("prepare", help="public source files to training documents")
    prepare.add_argument("--raw", type=Path, required=True)
    prepare.add_argument("--out", type=Path, required=True)
    prepare.add_argument("--seed", type=int, default=0)
    tokenizer = steps.add_parser("tokenizer", help="train the byte-level BPE")
    tokenizer.add_argument("--data", type=Path, required=True)
    tokenizer.add_argument("--out", type=Path, required=True)
    tokenizer.add_argument("--vocab-size", type=int, default=6144)
    tokenizer.add_argument("--seed", type=int, default=0)
    from moespec.train import drafter, target_run

    target_run.add_arguments(steps.add_parser("target", help="train the embedded Mixture-of-Experts"))
    drafter.add_arguments(steps.add_parser("drafter", help="train an EAGLE-3 head for a target"))
    for name, what in (("prompts", "the benchmark's prompts"), ("texts", "the texts perplexity is measured on")):
        drawn = steps.add_parser(name, help=f"draw {what} from held-out documents and tasks")
        drawn.add_argument("--data", type=Path, required=True)
        drawn.add_argument("--tokenizer", type=Path, required=True)
        drawn.add_argument("--out", type=Path, required=True)
        drawn.add_argument("--seed", type=int, default=0)
        if name == "prompts":
            drawn.add_argument("--each", type=int, metavar="N", help="N of every class; default: 64 as training's mix")
    train.set_defaults(handler=run_train)


def run_train(args: argparse.Namespace) -> int:
    """Run the sub-command that was asked for."""
    if args.step == "prepare":
        from moespec.train.prepare import prepare

        for (source, outcome), count in sorted(prepare(args.raw, args.out, args.seed).items()):
            print(f"{source:40} {outcome:15} {count}")
        return 0
    if args.step == "tokenizer":
        return _train_tokenizer(args)
    if args.step == "prompts":
        from moespec.train.bench_prompts import write_prompts

        if args.each is not None and args.each < 1:
            raise ValueError(f"each={args.each} is not allowed: use 1 or more.")
        num_written = write_prompts(args.data, args.tokenizer, args.out, args.seed, args.each)
        print(f"{num_written} prompts written to {args.out}")
        return 0
    if args.step == "texts":
        from moespec.train.held_out_texts import write_texts

        print(f"{write_texts(args.data, args.tokenizer, args.out, args.seed)} texts written to {args.out}")
        return 0
    from moespec.train import drafter, target_run

    return drafter.run(args) if args.step == "drafter" else target_run.run(args)


def _train_tokenizer(args: argparse.Namespace) -> int:
    import random

    from moespec.quality.tasks import generate_task
    from moespec.train.data import read_documents
    from moespec.train.prepare import document_text
    from moespec.train.tokenizer import save_tokenizer, train_tokenizer

    rng = random.Random(args.seed)
    documents = read_documents(args.data, "train")
    rng.shuffle(documents)
    tasks = (document_text({"messages": generate_task(rng).messages}) for _ in range(20_000))
    texts = itertools.chain(map(document_text, documents[:120_000]), tasks)
    save_tokenizer(train_tokenizer(texts, args.vocab_size), args.out)
    print(f"tokenizer of {args.vocab_size} tokens written to {args.out}")
    return 0
