"""The draft head's training: its loss within a draft vocabulary, the tokens that enter it, a whole short run."""

from __future__ import annotations

import argparse
import json
import random

import pytest
import torch

from moespec import EMBEDDED_TARGET, Engine
from moespec.drafters.checkpoint import load_head
from moespec.hf import AutoTokenizer
from moespec.train import drafter
from moespec.train.data import MixedStream, Renderer
from moespec.train.drafter import frequent_tokens
from moespec.train.identity import identity_documents
from moespec.train.ttt import unrolled_loss
from tests.moespec.test_eagle3 import tiny_head

VOCAB = 31
DRAFTED = torch.tensor([1, 4, 6, 9, 30])


def test_the_loss_is_the_cross_entropy_within_the_draft_vocabulary():
    head = tiny_head(draft_vocab_size=len(DRAFTED))
    head.draft_only(DRAFTED)
    ids_BS, features_BSF, logits_BSV = torch.randint(0, VOCAB, (2, 9)), torch.randn(2, 9, 48), torch.randn(2, 9, VOCAB)
    weights_BS = torch.randint(0, 2, (2, 9)).float()
    expected, hits = 0.0, []
    for step, draft_BSV in enumerate(head.unrolled(ids_BS[:, 1:], features_BSF[:, :-1], 3)):
        losses, right, asked = 0.0, 0, 0
        counted = 0.0
        for row in range(2):
            for t in range(7 - step):  # row t predicts token t + 2 + step; the target's opinion stands one before
                weight = float(weights_BS[row, t + 2 + step])
                target_V = logits_BSV[row, t + 1 + step].double()
                best = int(target_V.argmax())
                log_q = draft_BSV[row, t].double().log_softmax(-1)
                asked += weight == 1
                if best in DRAFTED.tolist():
                    losses -= weight * float((target_V[DRAFTED].softmax(-1) * log_q).sum())
                    counted += weight
                    right += weight == 1 and int(DRAFTED[log_q.argmax()]) == best
        expected += 0.8**step * losses / max(counted, 1)
        hits.append(right / max(asked, 1))
    loss, agreement = unrolled_loss(head, ids_BS, features_BSF, logits_BSV, weights_BS, 3)
    assert float(loss) == pytest.approx(expected, abs=1e-4)
    assert agreement.tolist() == pytest.approx(hits)


def test_the_draft_vocabulary_is_what_assistants_say_most():
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED_TARGET)
    documents = list(identity_documents(random.Random(0), count=50))
    shares = {"dialogue": 1.0}
    ids_V = frequent_tokens(MixedStream(documents, Renderer(tokenizer), 0, shares), 40)
    assert ids_V.tolist() == sorted(set(ids_V.tolist())) and len(ids_V) == 40
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") in ids_V.tolist()


def test_a_short_run_writes_a_head_that_drafts(tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    documents = list(identity_documents(random.Random(0), count=80))
    for name in ("train", "heldout"):
        (data / f"{name}.jsonl").write_text("".join(json.dumps(document) + "\n" for document in documents))
    parser = argparse.ArgumentParser()
    drafter.add_arguments(parser)
    arguments = ["--target", str(EMBEDDED_TARGET), "--data", str(data), "--out", str(tmp_path / "head")]
    arguments += ["--lr", "1e-3", "--batch-tokens", "2048", "--workers", "0"]
    arguments += ["--work", str(tmp_path / "work"), "--tokens", "2048", "--generate-minutes", "0.02", "--unroll", "1"]
    assert drafter.run(parser.parse_args([*arguments, "--draft-vocab", "512", "--device", "cpu"])) == 0
    first = load_head(tmp_path / "head", 8)
    assert first.config.draft_vocab_size == 512
    assert (tmp_path / "work" / "own-answers.jsonl").read_text()
    engine = Engine.from_pretrained(EMBEDDED_TARGET, tmp_path / "head")
    *_, last = engine.generate("Hello!")
    assert last.summary.lossless and last.summary.token_ids
    # Another run from it, on other data, drafts the same tokens.
    going_on = [*arguments, "--init", str(tmp_path / "head"), "--seed", "5", "--device", "cpu"]
    (data / "train.jsonl").write_text("".join(json.dumps(document) + "\n" for document in documents[:20]))
    trainer = drafter.DrafterTrainer(parser.parse_args([*going_on, "--draft-vocab", "512"]))
    assert torch.equal(trainer.head.draft_ids(), first.draft_ids())
    torch.testing.assert_close(trainer.head.fc.weight, first.fc.weight.float())
    with pytest.raises(ValueError, match="--draft-vocab 512"):
        drafter.DrafterTrainer(parser.parse_args([*going_on, "--draft-vocab", "256"]))
