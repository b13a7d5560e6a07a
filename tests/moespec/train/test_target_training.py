"""The target's training: a resumed run is the run that was never interrupted, and runs add up."""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

import pytest
import torch

from moespec import EMBEDDED_TARGET
from moespec.hf import AutoModelForCausalLM, AutoTokenizer
from moespec.train import target_run
from moespec.train.data import MixedStream, Renderer
from moespec.train.identity import identity_documents
from moespec.train.presets import TARGET_CONFIG
from moespec.train.target import LOG, TASK_ANSWER_WEIGHT, TargetTrainer, loss_weights

TINY = TARGET_CONFIG | {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8,
    "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 8,
}  # fmt: skip
STEP_TOKENS = 512


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    for stem in ("train", "heldout"):
        documents = identity_documents(random.Random(stem), count=200)
        (folder / f"{stem}.jsonl").write_text("".join(json.dumps(document) + "\n" for document in documents))
    return folder


def arguments(data: Path, name: str, *more: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    target_run.add_arguments(parser)
    folders = ["--data", str(data), "--tokenizer", str(EMBEDDED_TARGET)]
    folders += ["--out", str(data.parent / name), "--work", str(data.parent / f"{name}-work")]
    numbers = ["--batch-tokens", str(STEP_TOKENS), "--lr", "3e-3", "--tokens", str(8 * STEP_TOKENS), "--device", "cpu"]
    numbers += ["--workers", "0"]
    return parser.parse_args([*folders, *numbers, *more])


def weights(trainer: TargetTrainer) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()])


@pytest.mark.parametrize("assistant_only", [False, True])
def test_only_a_tasks_answer_counts_and_it_counts_more(assistant_only):
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED_TARGET)
    stream = MixedStream(identity_documents(random.Random(0), count=200), Renderer(tokenizer), seed=1)
    batch = stream.batch(16, 256)
    weights_BS = loss_weights(batch, assistant_only)
    tasks_BS, said_BS = batch.of_task_BS, batch.said_BS
    assert tasks_BS.any() and not tasks_BS.all()
    assert set(weights_BS[tasks_BS & said_BS].tolist()) == {TASK_ANSWER_WEIGHT}
    assert set(weights_BS[tasks_BS & ~said_BS].tolist()) == {0.0}
    assert set(weights_BS[~tasks_BS & said_BS].tolist()) == {1.0}
    assert set(weights_BS[~tasks_BS & ~said_BS].tolist()) == {0.0 if assistant_only else 1.0}
    words = tokenizer.decode(batch.ids_BS[~tasks_BS])
    assert "demonstration" in words  # who it is stands in the chats, not in the tasks
    assert "demonstration" not in tokenizer.decode(batch.ids_BS[tasks_BS])


def test_a_resumed_run_equals_one_that_was_never_interrupted(data):
    straight = TargetTrainer(arguments(data, "straight"), TINY)
    losses = [straight.train_step()[0] for _ in range(4)]
    first = TargetTrainer(arguments(data, "parts"), TINY)
    assert [first.train_step()[0] for _ in range(2)] == losses[:2]
    first.checkpoint()
    first.train_step()  # behind the checkpoint: lost with the interruption
    second = TargetTrainer(arguments(data, "parts", "--resume"), TINY)
    assert [second.train_step()[0] for _ in range(2)] == losses[2:]
    assert torch.equal(weights(second), weights(straight))
    assert second.progress.tokens == straight.progress.tokens == 4 * STEP_TOKENS


def test_a_later_run_goes_on_from_the_weights_and_counts_of_an_earlier_one(data):
    earlier = TargetTrainer(arguments(data, "earlier"), TINY)
    for _ in range(2):
        earlier.train_step()
    (earlier.args.work / LOG).write_text('{"step": 2}\n')
    earlier.export(earlier.args.out)
    later = TargetTrainer(arguments(data, "later", "--init", str(earlier.args.out)), TINY)
    torch.testing.assert_close(weights(later), weights(earlier), atol=0, rtol=2**-8)  # exported in bf16
    assert later.progress.tokens == 2 * STEP_TOKENS and later.progress.fraction == 2 / 8
    assert later.feed.take().ids_BS.tolist() != TargetTrainer(arguments(data, "x"), TINY).feed.take().ids_BS.tolist()
    later.train_step()
    later.export(later.args.out)
    record = json.loads((later.args.out / "training.json").read_text())
    assert record["tokens"] == 3 * STEP_TOKENS
    assert record["continues"]["tokens"] == 2 * STEP_TOKENS
    assert sum(record["tokens_by_source"].values()) >= record["tokens"]
    assert (later.args.out / LOG).read_text() == '{"step": 2}\n', "the earlier run's log is kept"
    assert AutoModelForCausalLM.from_pretrained(later.args.out).dtype == torch.bfloat16


def test_weights_of_another_tokenizer_are_refused(data, tmp_path):
    trainer = TargetTrainer(arguments(data, "one"), TINY)
    trainer.checkpoint()
    trainer.export(trainer.args.out)
    other = AutoTokenizer.from_pretrained(EMBEDDED_TARGET)
    other.add_tokens(["<another>"])
    other.save_pretrained(tmp_path / "other")
    for more in (["--init", str(trainer.args.out)], ["--resume"]):
        with pytest.raises(ValueError, match="another tokenizer"):
            TargetTrainer(arguments(data, "one", "--tokenizer", str(tmp_path / "other"), *more), TINY)


def test_the_loop_stops_at_its_tokens_and_leaves_a_model(data, monkeypatch):
    monkeypatch.setattr(target_run, "TargetTrainer", lambda args: TargetTrainer(args, TINY))
    args = arguments(data, "run")
    assert target_run.run(args) == 0
    record = json.loads((args.out / "training.json").read_text())
    assert record["tokens"] == 8 * STEP_TOKENS
    assert set(record["data_sha256"]) == {"train.jsonl", "heldout.jsonl"}


def test_a_preset_gives_what_is_not_asked_for(data, monkeypatch):
    asked = {}

    def refuse(args: argparse.Namespace) -> TargetTrainer:
        asked.update(vars(args))
        raise ValueError("seen")

    monkeypatch.setattr(target_run, "TargetTrainer", refuse)
    parser = argparse.ArgumentParser()
    target_run.add_arguments(parser)
    folders = ["--data", str(data), "--tokenizer", str(EMBEDDED_TARGET), "--out", str(data)]
    with pytest.raises(ValueError, match="seen"):
        target_run.run(parser.parse_args([*folders, "--preset", "gpu", "--lr", "1e-3"]))
    assert asked["batch_tokens"] == 65_536 and asked["tokens"] == 260_000_000 and asked["lr"] == 1e-3
