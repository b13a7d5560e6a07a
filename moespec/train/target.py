"""`train target`: the embedded Qwen3-MoE, resumable, against a budget of minutes or tokens.

Owns the training loop, its checkpoints, log and export. Data, balance and schedule are their own modules.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moespec.hf import AutoModelForCausalLM, AutoTokenizer
from moespec.train.balance import RouterTap, balance_loss, concentration
from moespec.train.data import MixedStream, Renderer, file_hashes, held_out_batches, read_documents
from moespec.train.experts import use_training_experts
from moespec.train.manifest import write_manifest
from moespec.train.precision import autocast
from moespec.train.presets import TARGET_CONFIG, TARGET_RECIPES
from moespec.train.schedule import Progress, learning_rate

ASSISTANT_ONLY_FROM = 0.8  # loss on what the assistant says alone in the last fifth
LONG_FROM = 0.9  # the last tenth in sequences of LONG_LENGTH, so that long chats hold
LENGTH, LONG_LENGTH = 256, 1024
NO_SETTINGS = ("handler", "command", "step", "resume")
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
    parser.add_argument("--balance", type=float, default=0.001)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--init", type=Path, help="go on from this folder's weights and count of tokens")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")


class TargetTrainer:
    """One run. Its whole state is in `checkpoint` and `_restore`."""

    def __init__(self, args: argparse.Namespace, config: dict = TARGET_CONFIG) -> None:
        self.args = args
        torch.manual_seed(args.seed)
        self.tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
        self.model = _build_model(args, config, self.tokenizer)
        self.tap = RouterTap(self.model)
        renderer = Renderer(self.tokenizer)
        self.continues = _training_record(args.init)
        tokens = self.continues.get("tokens", 0)
        # A run that goes on must not begin with the documents that the run before it began with.
        self.stream = MixedStream(read_documents(args.data, "train"), renderer, args.seed + tokens)
        self.stream.tokens.update(self.continues.get("tokens_by_source", {}))
        held_out = read_documents(args.data, "heldout")
        self.held_out = list(held_out_batches(held_out, renderer, args.seed, LENGTH, 16))
        decayed = [p for p in self.model.parameters() if p.dim() > 1]
        plain = [p for p in self.model.parameters() if p.dim() <= 1]
        groups = [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95), fused=True)
        self.progress = Progress(args.minutes, args.tokens, tokens)
        self.num_steps, self.rate = 0, 0.0
        args.work.mkdir(parents=True, exist_ok=True)
        if args.resume:
            self._restore()

    @property
    def _checkpoint_path(self) -> Path:
        return self.args.work / "checkpoint.pt"

    def checkpoint(self) -> None:
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "stream": self.stream.state(),
            "tokens": self.progress.tokens,
            "seconds": self.progress.seconds,
            "num_steps": self.num_steps,
        }
        partial = self._checkpoint_path.with_suffix(".partial")
        torch.save(state, partial)
        partial.replace(self._checkpoint_path)

    def _restore(self) -> None:
        if not self._checkpoint_path.exists():
            raise ValueError(f"{self._checkpoint_path} does not exist: nothing to resume.")
        state = torch.load(self._checkpoint_path, weights_only=False)  # our own file: it holds a random state too
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.stream.restore(state["stream"])
        self.progress.tokens, self.progress.seconds = state["tokens"], state["seconds"]
        self.num_steps = state["num_steps"]

    def train_step(self) -> tuple[float, float]:
        """One optimizer step; (loss, balance loss)."""
        fraction = self.progress.fraction
        length = LONG_LENGTH if fraction >= LONG_FROM else LENGTH
        ids_BS, said_BS = self.stream.batch(max(1, self.args.batch_tokens // length), length)
        ids_BS, said_BS = ids_BS.to(self.args.device), said_BS.to(self.args.device)
        self.rate = learning_rate(self.args.lr, fraction, self.num_steps, warmup_steps=100)
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate
        with autocast(self.args.device):
            logits_BSV = self.model(ids_BS[:, :-1], use_cache=False).logits
        weights_BS = said_BS[:, 1:].float() if fraction >= ASSISTANT_ONLY_FROM else None
        loss = next_token_loss(logits_BSV, ids_BS[:, 1:], weights_BS)
        balance = balance_loss(self.tap.take(), self.model.config.num_experts_per_tok)
        (loss + self.args.balance * balance).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.num_steps += 1
        self.progress.step(ids_BS[:, 1:].numel())
        return loss.item(), balance.item()

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Held-out loss per group and how concentrated routing is."""
        figures: dict[str, float] = {}
        logits_by_group: list[list[Tensor]] = []
        for group, ids_BS in self.held_out:
            with autocast(self.args.device):
                logits_BSV = self.model(ids_BS[:, :-1].to(self.args.device), use_cache=False).logits
            figures[f"loss_{group}"] = round(next_token_loss(logits_BSV, ids_BS[:, 1:], None).item(), 4)
            logits_by_group.append(self.tap.take())
        by_layer = [torch.cat(layer) for layer in zip(*logits_by_group, strict=True)]
        return figures | concentration(by_layer, self.model.config.num_experts_per_tok)

    def export(self, folder: Path) -> None:
        """bf16 weights in shards of at most 10 MB, tokenizer, training record, manifest."""
        folder.mkdir(parents=True, exist_ok=True)
        for stale in folder.glob("model*.safetensors*"):
            stale.unlink()
        weights = {name: tensor.to(torch.bfloat16) for name, tensor in self.model.state_dict().items()}
        self.model.save_pretrained(folder, state_dict=weights, max_shard_size="10MB")
        config = copy.deepcopy(self.model.config)
        config.dtype = torch.bfloat16  # save_pretrained names the dtype trained in, and loading follows it
        config.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        record = {
            "seed": self.args.seed,
            "settings": {name: _plain(value) for name, value in vars(self.args).items() if name not in NO_SETTINGS},
            "data_sha256": file_hashes(self.args.data),
            "tokens": self.progress.tokens,
            "trained_seconds": round(self.progress.seconds),
            "num_steps": self.num_steps,
            "tokens_by_source": dict(self.stream.tokens),
            "held_out": self.evaluate(),
        }
        if self.continues:
            record["continues"] = self.continues
        (folder / "training.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        write_manifest(folder)


def next_token_loss(logits_BSV: Tensor, targets_BS: Tensor, weights_BS: Tensor | None) -> Tensor:
    """Cross-entropy in nats per counted token; `weights_BS` is 1 where a token counts."""
    losses_N = F.cross_entropy(logits_BSV.flatten(0, 1).float(), targets_BS.flatten(), reduction="none")
    if weights_BS is None:
        return losses_N.mean()
    return (losses_N * weights_BS.flatten()).sum() / weights_BS.sum().clamp(min=1)


def _build_model(args: argparse.Namespace, config: dict, tokenizer: Any) -> Any:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    model: Any
    if args.init is not None:
        model = AutoModelForCausalLM.from_pretrained(args.init, dtype=torch.float32)
    else:
        specials = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
        model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**config, **specials, bos_token_id=None))
        model.generation_config.eos_token_id = [tokenizer.eos_token_id, tokenizer.pad_token_id]
    use_training_experts(model, args.device)
    return model.to(args.device).train()


def _training_record(folder: Path | None) -> dict:
    """What the run that wrote these weights says of itself; empty without weights or without a record."""
    path = None if folder is None else folder / "training.json"
    return json.loads(path.read_text(encoding="utf-8")) if path is not None and path.exists() else {}


def _plain(value: Any) -> Any:
    return value.name if isinstance(value, Path) else value


def run(args: argparse.Namespace) -> int:
    """Train until the budget is used up, then export."""
    for name, value in TARGET_RECIPES[args.preset].items():
        if getattr(args, name) is None and not (name == "tokens" and args.minutes is not None):
            setattr(args, name, value)
    trainer = TargetTrainer(args)
    progress = trainer.progress
    last = {"checkpoint": time.monotonic(), "snapshot": time.monotonic() - SNAPSHOT_S / 2, "evaluate": time.monotonic()}
    started, tokens_at_start, recent = time.monotonic(), progress.tokens, 0.0
    with (args.work / "log.jsonl").open("a", encoding="utf-8") as log:
        while progress.fraction < 1:
            loss, balance = trainer.train_step()
            recent = loss if not recent else 0.95 * recent + 0.05 * loss
            now = time.monotonic()
            if trainer.num_steps % 20 == 0:
                rate = (progress.tokens - tokens_at_start) / (now - started)
                print(
                    f"step {trainer.num_steps}  {progress.tokens / 1e6:.2f} M tokens  loss {recent:.3f}  "
                    f"balance {balance:.2f}  {rate:.0f} tokens/s  {progress.seconds_left / 60:.0f} min left",
                    flush=True,
                )
                entry = {"step": trainer.num_steps, "tokens": progress.tokens, "loss": recent, "balance": balance}
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
