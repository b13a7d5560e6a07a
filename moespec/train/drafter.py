"""`train drafter`: an EAGLE-3 head for a target by the training-time test, resumable, against a budget of minutes.

Owns the loop and the export; what is minimised is `train/ttt.py`'s.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moespec.drafters.checkpoint import load_head, save_head
from moespec.drafters.head import Eagle3Config, Eagle3Head
from moespec.hf import AutoModelForCausalLM, AutoTokenizer
from moespec.train.data import MixedStream, Renderer, file_hashes, held_out_batches, read_documents
from moespec.train.experts import use_training_experts
from moespec.train.feed import Feed
from moespec.train.generations import generate
from moespec.train.manifest import write_manifest
from moespec.train.precision import autocast
from moespec.train.presets import DRAFTER_RECIPES, complete
from moespec.train.schedule import Progress, learning_rate
from moespec.train.ttt import FrozenTarget, unrolled_loss

LENGTH = 256
OTHER_WEIGHT = 0.2  # of tokens that the assistant does not say
INTERMEDIATE_FACTOR = 3
CHECKPOINT_S = 240.0
COUNTED_BATCHES = 300


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--target", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True, help="folder written by `train prepare`")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("runs/drafter"))
    parser.add_argument("--preset", choices=DRAFTER_RECIPES, default="cpu", help="tokens, batch and peak rate")
    parser.add_argument("--minutes", type=float, help="train for a time instead of the preset's tokens")
    parser.add_argument("--tokens", type=int)
    parser.add_argument("--generate-minutes", type=float, default=4.0, help="sampling of the target's own answers")
    parser.add_argument("--unroll", type=int, default=7, help="steps of the training-time test")
    parser.add_argument("--draft-vocab", type=int, default=2048, help="the most frequent tokens, which may be drafted")
    parser.add_argument("--batch-tokens", type=int)
    parser.add_argument("--lr", type=float)
    parser.add_argument("--workers", type=int, help="processes that make batches ahead, of each of two feeds; 0: none")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--init", type=Path, help="start from this head and from the tokens it drafts")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")


def head_config(model: Any, draft_vocab_size: int) -> Eagle3Config:
    """A head of the target's own width, with taps 2, n // 2 and n - 3."""
    config = model.config
    n = config.num_hidden_layers
    return Eagle3Config(
        hidden_size=config.hidden_size,
        intermediate_size=INTERMEDIATE_FACTOR * config.hidden_size,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        vocab_size=config.vocab_size,
        draft_vocab_size=min(draft_vocab_size, config.vocab_size),
        tap_layers=(2, n // 2, n - 3),
        target_hidden_size=config.hidden_size,
    )


def frequent_tokens(stream: MixedStream, size: int) -> Tensor:
    """The ids, sorted, of the tokens that assistants say most often in the data. int64 [size]"""
    counts_V = torch.zeros(0, dtype=torch.long)
    for _ in range(COUNTED_BATCHES):
        ids_BS, said_BS, _ = stream.batch(8, LENGTH)
        found_V = torch.bincount(ids_BS[said_BS], minlength=max(size, len(counts_V)))
        found_V[: len(counts_V)] += counts_V
        counts_V = found_V
    return counts_V.argsort(descending=True, stable=True)[:size].sort().values


class DrafterTrainer:
    """One run; its whole state is in `checkpoint` and `_restore`."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        torch.manual_seed(args.seed)
        args.work.mkdir(parents=True, exist_ok=True)
        tokenizer = AutoTokenizer.from_pretrained(args.target)
        model = AutoModelForCausalLM.from_pretrained(args.target, dtype=torch.float32).to(args.device)
        use_training_experts(model, args.device)
        is_cuda = model.device.type == "cuda"
        documents = read_documents(args.data, "train")
        own_answers = args.work / "own-answers.jsonl"
        if not own_answers.exists():
            minutes = args.generate_minutes
            count = generate(model, tokenizer, documents, own_answers, minutes, args.seed, args.init)
            print(f"the target answered {count} prompts", flush=True)
        renderer = Renderer(tokenizer)
        answered = [json.loads(line) for line in own_answers.read_text(encoding="utf-8").splitlines()]
        # Two feeds: the target's own answers and the corpus, in turns.
        self.feeds = [
            Feed(texts, renderer, args.seed, max(LENGTH, args.batch_tokens), shares, args.workers, is_cuda)
            for texts, shares in ((answered, {"dialogue": 1.0}), (documents, None))
        ]
        held_out = read_documents(args.data, "heldout")
        self.held_out = list(held_out_batches(held_out, renderer, args.seed, LENGTH, 8))
        config = head_config(model, args.draft_vocab)
        self.target = FrozenTarget(model, config.tap_layers)
        self.head = Eagle3Head(config)
        start = _start_head(args.init, config, model.config.num_hidden_layers)
        if self.head.d2t is not None:
            ids_V = None if start is None else start.draft_ids()
            if ids_V is None:
                ids_V = frequent_tokens(MixedStream(documents, renderer, args.seed), config.draft_vocab_size)
            self.head.draft_only(ids_V)
        self._initialise(model.get_output_embeddings().weight.detach().cpu(), start)
        self.head = self.head.to(args.device)
        self.head.embeddings = model.get_input_embeddings().weight.detach()
        self.optimizer = torch.optim.AdamW(self.head.parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=0.01)
        self.progress = Progress(args.minutes, args.tokens)
        self.num_steps = 0
        if args.resume:
            self._restore()

    def _initialise(self, output_VD: Tensor, start: Eagle3Head | None) -> None:
        """The rows of the target's output layer for `lm_head`, or all weights of the head to start from."""
        ids_V = self.head.draft_ids()
        rows = slice(None) if ids_V is None else ids_V
        self.head.lm_head.weight.data.copy_(output_VD[rows])
        if start is None:
            return
        weights = {name: tensor for name, tensor in start.state_dict().items() if name not in ("d2t", "t2d")}
        if start.d2t is None:
            weights["lm_head.weight"] = weights["lm_head.weight"][rows]
        self.head.load_state_dict(weights, strict=False)

    def checkpoint(self) -> None:
        state = {
            "head": self.head.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "feeds": [feed.state() for feed in self.feeds],
            "tokens": self.progress.tokens,
            "seconds": self.progress.seconds,
            "num_steps": self.num_steps,
        }
        partial = self.args.work / "checkpoint.partial"
        torch.save(state, partial)
        partial.replace(self.args.work / "checkpoint.pt")

    def _restore(self) -> None:
        path = self.args.work / "checkpoint.pt"
        if not path.exists():
            raise ValueError(f"{path} does not exist: nothing to resume.")
        state = torch.load(path, weights_only=False)  # our own file: it holds a random state too
        self.head.load_state_dict(state["head"])
        self.optimizer.load_state_dict(state["optimizer"])
        for feed, saved in zip(self.feeds, state["feeds"], strict=True):
            feed.restore(saved)
        self.progress.tokens, self.progress.seconds = state["tokens"], state["seconds"]
        self.num_steps = state["num_steps"]

    def train_step(self) -> tuple[Tensor, Tensor]:
        """One optimizer step; (loss, agreement per unrolled step), which nobody has waited for yet."""
        batch = self.feeds[self.num_steps % 2].take().to(self.args.device).in_sequences(LENGTH)
        ids_BS, weights_BS = batch.ids_BS, torch.where(batch.said_BS, 1.0, OTHER_WEIGHT)
        features_BSF, logits_BSV = self.target(ids_BS)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.args.lr, self.progress.fraction, self.num_steps, 50, decay_from=0.4)
        with autocast(self.args.device):
            loss, agreement = unrolled_loss(self.head, ids_BS, features_BSF, logits_BSV, weights_BS, self.args.unroll)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.head.parameters(), 0.5)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.num_steps += 1
        self.progress.step(ids_BS.numel())
        return loss.detach(), agreement

    @torch.no_grad()
    def evaluate(self) -> dict[str, list[float]]:
        """Top-1 agreement with the target by unrolled step, where assistants speak, per group of held-out documents."""
        figures = {}
        for group, batch in self.held_out:
            ids_BS, said_BS = batch.ids_BS.to(self.args.device), batch.said_BS.to(self.args.device)
            features_BSF, logits_BSV = self.target(ids_BS)
            _, agreement = unrolled_loss(self.head, ids_BS, features_BSF, logits_BSV, said_BS.float(), self.args.unroll)
            figures[group] = [round(value, 4) for value in agreement.tolist()]
        return figures

    def export(self, folder: Path) -> None:
        save_head(self.head, folder)
        record = {
            "seed": self.args.seed,
            "settings": {n: v.name if isinstance(v, Path) else v for n, v in vars(self.args).items() if n != "handler"},
            "data_sha256": file_hashes(self.args.data),
            "tokens": self.progress.tokens,
            "trained_seconds": round(self.progress.seconds),
            "num_steps": self.num_steps,
            "top1_agreement_by_step": self.evaluate(),
        }
        (folder / "training.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        write_manifest(folder)


def _start_head(folder: Path | None, config: Eagle3Config, num_layers: int) -> Eagle3Head | None:
    """The head to go on from. ValueError where it drafts another number of tokens, unless it drafts them all."""
    if folder is None:
        return None
    start = load_head(folder, num_layers)
    size = start.config.draft_vocab_size
    if start.d2t is not None and size != config.draft_vocab_size:
        raise ValueError(f"{folder} drafts {size} tokens: give --draft-vocab {size} to go on from it.")
    return start


def run(args: argparse.Namespace) -> int:
    """Train until the budget is used up, then export."""
    complete(args, DRAFTER_RECIPES)
    trainer = DrafterTrainer(args)
    saved = time.monotonic()
    with (args.work / "log.jsonl").open("a", encoding="utf-8") as log:
        while trainer.progress.fraction < 1:
            loss, agreement = trainer.train_step()
            progress = trainer.progress
            if trainer.num_steps % 10 == 0:
                rate = progress.tokens / max(progress.seconds, 1e-9)
                top1 = agreement.tolist()
                shown = " ".join(f"{value:.2f}" for value in top1)
                print(
                    f"step {trainer.num_steps}  {progress.tokens / 1e6:.2f} M tokens  loss {loss:.3f}  top-1 {shown}  "
                    f"{rate:.0f} tokens/s  {progress.seconds_left / 60:.0f} min left",
                    flush=True,
                )
                entry = {"step": trainer.num_steps, "tokens": progress.tokens, "loss": loss.item(), "top1": top1}
                log.write(json.dumps(entry) + "\n")
            if time.monotonic() - saved > CHECKPOINT_S:
                trainer.checkpoint()
                saved = time.monotonic()
    trainer.checkpoint()
    trainer.export(args.out)
    print(f"exported to {args.out}", flush=True)
    return 0
