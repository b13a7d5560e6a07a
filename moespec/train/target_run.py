"""`train target`: the arguments, the loop against a budget of minutes or tokens, the log. Knows nothing of a step."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch

from moespec.train.presets import TARGET_RECIPES, complete
from moespec.train.target import LOG, TargetTrainer

CHECKPOINT_S, SNAPSHOT_S, EVALUATE_S = 300.0, 720.0, 600.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", type=Path, required=True, help="folder written by `train prepare`")
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True, help="where the finished model goes")
    parser.add_argument("--work", type=Path, default=Path("runs/target"), help="checkpoints and log")
    parser.add_argument("--preset", choices=TARGET_RECIPES, default="cpu", help="tokens, batch and peak rate")
    parser.add_argument("--minutes", type=float, help="train for a time instead of the preset's tokens")
    parser.add_argument("--tokens", type=int, help="train to this many tokens in all, earlier runs included")
    parser.add_argument("--batch-tokens", type=int)
    parser.add_argument("--lr", type=float)
    parser.add_argument("--workers", type=int, help="processes that make batches ahead; 0: none")
    parser.add_argument("--balance", type=float, default=0.001)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--init", type=Path, help="go on from this folder's weights and count of tokens")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")


def run(args: argparse.Namespace) -> int:
    """Train until the budget is used up, then export."""
    complete(args, TARGET_RECIPES)
    trainer = TargetTrainer(args)
    progress = trainer.progress
    last = {"checkpoint": time.monotonic(), "snapshot": time.monotonic() - SNAPSHOT_S / 2, "evaluate": time.monotonic()}
    started, tokens_at_start, smoothed = time.monotonic(), progress.tokens, None
    with (args.work / LOG).open("a", encoding="utf-8") as log:
        while progress.fraction < 1:
            loss, balance = trainer.train_step()
            smoothed = loss if smoothed is None else 0.95 * smoothed + 0.05 * loss
            now = time.monotonic()
            if trainer.num_steps % 20 == 0:
                recent = smoothed.item()
                rate = (progress.tokens - tokens_at_start) / (now - started)
                print(
                    f"step {trainer.num_steps}  {progress.tokens / 1e6:.2f} M tokens  loss {recent:.3f}  "
                    f"balance {balance:.2f}  {rate:.0f} tokens/s  {progress.seconds_left / 60:.0f} min left",
                    flush=True,
                )
                entry = {
                    "step": trainer.num_steps,
                    "tokens": progress.tokens,
                    "loss": recent,
                    "balance": balance.item(),
                }
                entry |= {"lr": trainer.rate, "tokens_per_s": round(rate), "seconds": round(progress.seconds)}
                log.write(json.dumps(entry) + "\n")
            if now - last["evaluate"] > EVALUATE_S:
                figures = trainer.evaluate()
                print(f"held out: {figures}", flush=True)
                log.write(json.dumps({"step": trainer.num_steps, "held_out": figures}) + "\n")
                log.flush()
                last["evaluate"] = now
            if now - last["checkpoint"] > CHECKPOINT_S:
                trainer.checkpoint()
                last["checkpoint"] = now
            if now - last["snapshot"] > SNAPSHOT_S:
                trainer.export(args.work / "snapshot")
                last["snapshot"] = now
    trainer.checkpoint()
    trainer.export(args.out)
    print(f"exported to {args.out}", flush=True)
    return 0
