"""Training the embedded Qwen3-MoE: one step, its checkpoint, its export. Data, balance and schedule are elsewhere.

Owns everything a run's state consists of. Knows nothing of the command line or of when a checkpoint is due.
"""

from __future__ import annotations

import argparse
import copy
import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moespec.hf import AutoModelForCausalLM, AutoTokenizer
from moespec.integrity import tokenizer_sha256
from moespec.train.balance import RouterTap, balance_loss, concentration
from moespec.train.data import Batch, Renderer, file_hashes, held_out_batches, read_documents
from moespec.train.experts import use_training_experts
from moespec.train.feed import Feed
from moespec.train.manifest import write_manifest
from moespec.train.precision import autocast
from moespec.train.presets import TARGET_CONFIG
from moespec.train.schedule import Progress, learning_rate

ASSISTANT_ONLY_FROM = 0.8  # loss on what the assistant says alone in the last fifth
LONG_FROM = 0.9  # the last tenth in sequences of LONG_LENGTH, so that long chats hold
# A task's question teaches nothing (its operands are drawn at random) and its answer is short: without a weight the
# answers would be a tenth of the loss, not the tasks' four tenths of the tokens.
TASK_ANSWER_WEIGHT = 3.0
LENGTH, LONG_LENGTH = 256, 1024
LOG = "training_log.jsonl"
NO_SETTINGS = ("handler", "command", "step", "resume")


class TargetTrainer:
    """One run. Its whole state is in `checkpoint` and `_restore`."""

    def __init__(self, args: argparse.Namespace, config: dict = TARGET_CONFIG) -> None:
        self.args = args
        torch.manual_seed(args.seed)
        self.tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
        self._check_tokenizer()
        self.model = _build_model(args, config, self.tokenizer)
        self.tap = RouterTap(self.model)
        renderer = Renderer(self.tokenizer)
        self.continues = _training_record(args.init)
        tokens = self.continues.get("tokens", 0)
        # A run that goes on must not begin with the documents that the run before it began with.
        documents, is_cuda = read_documents(args.data, "train"), torch.device(args.device).type == "cuda"
        seed, num_tokens = args.seed + tokens, max(LENGTH, args.batch_tokens)
        self.feed = Feed(documents, renderer, seed, num_tokens, num_workers=args.workers, pinned=is_cuda)
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
        elif args.init is not None and (args.init / LOG).exists():
            shutil.copy(args.init / LOG, args.work / LOG)

    @property
    def _checkpoint_path(self) -> Path:
        return self.args.work / "checkpoint.pt"

    def _check_tokenizer(self) -> None:
        """Weights mean something with the tokenizer that they were trained with alone."""
        if self.args.init is not None and (self.args.init / "tokenizer.json").exists():
            theirs = tokenizer_sha256(AutoTokenizer.from_pretrained(self.args.init))
            if theirs != tokenizer_sha256(self.tokenizer):
                raise ValueError(f"{self.args.init} was trained with another tokenizer than {self.args.tokenizer}.")

    def checkpoint(self) -> None:
        state = {
            "tokenizer_sha256": tokenizer_sha256(self.tokenizer),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "feed": self.feed.state(),
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
        if state["tokenizer_sha256"] != tokenizer_sha256(self.tokenizer):
            raise ValueError(f"{self._checkpoint_path} was trained with another tokenizer than {self.args.tokenizer}.")
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.feed.restore(state["feed"])
        self.progress.tokens, self.progress.seconds = state["tokens"], state["seconds"]
        self.num_steps = state["num_steps"]

    def train_step(self) -> tuple[Tensor, Tensor]:
        """One optimizer step; (loss, balance loss), which nobody has waited for yet."""
        fraction = self.progress.fraction
        length = LONG_LENGTH if fraction >= LONG_FROM else LENGTH
        batch = self.feed.take().to(self.args.device).in_sequences(length)
        ids_BS, weights_BS = batch.ids_BS, loss_weights(batch, fraction >= ASSISTANT_ONLY_FROM)
        self.rate = learning_rate(self.args.lr, fraction, self.num_steps, warmup_steps=100)
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate
        with autocast(self.args.device):
            logits_BSV = self.model(ids_BS[:, :-1], use_cache=False).logits
        loss = next_token_loss(logits_BSV, ids_BS[:, 1:], weights_BS[:, 1:])
        balance = balance_loss(self.tap.take(), self.model.config.num_experts_per_tok)
        (loss + self.args.balance * balance).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.num_steps += 1
        self.progress.step(ids_BS[:, 1:].numel())
        return loss.detach(), balance.detach()

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Held-out loss per group, of tasks on their answers, and how concentrated routing is."""
        figures: dict[str, float] = {}
        logits_by_group: list[list[Tensor]] = []
        for group, batch in self.held_out:
            batch = batch.to(self.args.device)
            ids_BS, weights_BS = batch.ids_BS, loss_weights(batch, assistant_only=False)
            with autocast(self.args.device):
                logits_BSV = self.model(ids_BS[:, :-1], use_cache=False).logits
            figures[f"loss_{group}"] = round(next_token_loss(logits_BSV, ids_BS[:, 1:], weights_BS[:, 1:]).item(), 4)
            logits_by_group.append(self.tap.take())
        by_layer = [torch.cat(layer) for layer in zip(*logits_by_group, strict=True)]
        return figures | concentration(by_layer, self.model.config.num_experts_per_tok)

    def export(self, folder: Path) -> None:
        """bf16 weights in shards of at most 10 MB, tokenizer, training record, manifest."""
        folder.mkdir(parents=True, exist_ok=True)
        for stale in folder.glob("model*.safetensors*"):
            stale.unlink()
        tied = self.model.all_tied_weights_keys  # the output layer, which is the embeddings'
        weights = {n: tensor.to(torch.bfloat16) for n, tensor in self.model.state_dict().items() if n not in tied}
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
            "tokens_by_source": dict(self.feed.tokens + Counter(self.continues.get("tokens_by_source", {}))),
            "held_out": self.evaluate(),
        }
        if self.continues:
            record["continues"] = self.continues
        (folder / "training.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        if (self.args.work / LOG).exists():
            shutil.copy(self.args.work / LOG, folder / LOG)
        write_manifest(folder)


def loss_weights(batch: Batch, assistant_only: bool) -> Tensor:
    """[B, S] fp32: how much each token counts in the loss as a target."""
    others_BS = batch.said_BS.float() if assistant_only else torch.ones_like(batch.said_BS, dtype=torch.float32)
    return torch.where(batch.of_task_BS, TASK_ANSWER_WEIGHT * batch.said_BS, others_BS)


def next_token_loss(logits_BSV: Tensor, targets_BS: Tensor, weights_BS: Tensor) -> Tensor:
    """Cross-entropy in nats, the mean over tokens weighted by `weights_BS`."""
    losses_N = F.cross_entropy(logits_BSV.flatten(0, 1).float(), targets_BS.flatten(), reduction="none")
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
