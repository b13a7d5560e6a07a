"""A small draft model against its own logits, brute force over paths, and generate's text; who is refused, and why."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
)

from moespec import DraftContext, Engine, GenerationConfig, TreeConfig
from moespec.drafters.small_model import SmallModelDrafter
from tests.conftest import VOCAB, tiny_model
from tests.moespec.test_heads import paths_of
from tests.plain_head import plain_tree

TREE = TreeConfig(total_tokens=12, depth=4, top_k=3, min_path_p=0)
SHAPE = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]


def dense_model(vocab_size: int = VOCAB, **options: Any) -> Any:
    torch.manual_seed(4)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=vocab_size, **SHAPE, max_position_embeddings=128, **options)).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def small_model(kind: str) -> Any:
    return tiny_model("olmoe", seed=5) if kind == "MoE" else dense_model(VOCAB + 3 if kind == "padded" else VOCAB)


def save(model: Any, folder: Path, words: dict[str, int] | None = None, lower: bool = False) -> Path:
    """A checkpoint with a tokenizer of words, as transformers writes it."""
    words = words or {f"w{n}": n for n in range(VOCAB)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if lower:
        tokenizer.normalizer = normalizers.Lowercase()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def folders(tmp_path):
    """A target and a small model beside it."""
    return save(tiny_model("qwen3_moe"), tmp_path / "target"), save(dense_model(), tmp_path / "small")


def own_logp(model: Any, ids: list[int]) -> Any:
    """log p of the next token by a plain forward over everything, over the target's words, fp64."""
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0, -1, :VOCAB].double().log_softmax(-1).numpy()


def check_tree(drafter: SmallModelDrafter, model: Any, ids: list[int]) -> None:
    tree = drafter.propose(DraftContext(ids, TREE))
    expected = plain_tree(lambda path: own_logp(model, [*ids, *path]), TREE.total_tokens, TREE.depth, TREE.top_k)
    paths = paths_of(tree)
    assert set(paths[1:]) == expected.keys()
    for row, path in enumerate(paths[1:], start=1):
        assert tree.draft_logp_T[row].item() == pytest.approx(expected[path], abs=1e-3)
    for row, path in enumerate(paths):
        seen = [token for token in tree.alt_ids_TA[row].tolist() if token >= 0]
        assert seen == own_logp(model, [*ids, *path]).argsort()[::-1][: len(seen)].tolist()


@pytest.mark.parametrize("kind", ["dense", "MoE", "padded"])
def test_proposals_are_what_the_models_own_logits_say(kind):
    """Also after accepted tokens, twice at one place, and after a cut: what a tree wrote leaves nothing behind."""
    model = small_model(kind)
    drafter = SmallModelDrafter(small_model(kind), VOCAB)
    ids = list(PROMPT)
    check_tree(drafter, model, ids)
    check_tree(drafter, model, ids)
    ids += [7, 7, 1]
    drafter.observe(None)
    check_tree(drafter, model, ids)
    drafter.truncate(5)
    check_tree(drafter, model, [*ids[:5], 8, 8])


def test_no_tree_is_drafted_past_the_models_context():
    drafter = SmallModelDrafter(dense_model(), VOCAB)
    ids = [n % VOCAB for n in range(128)]
    assert drafter.propose(DraftContext(ids[:124], TREE)).num_rows == 12
    assert drafter.propose(DraftContext(ids[:125], TREE)).num_rows == 1
    shallow = DraftContext(ids[:126], TREE, max_depth=2)
    assert drafter.propose(shallow).max_depth == 2


def test_greedy_is_what_generate_writes(family, tmp_path):
    target, reference = save(tiny_model(family), tmp_path / "target"), tiny_model(family)
    expected = reference.generate(torch.tensor([PROMPT]), do_sample=False, max_new_tokens=32)[0, 8:].tolist()
    # The target's own weights, so that its drafts are accepted, and another's, so that they are not.
    right = Engine.from_pretrained(target, drafter=f"model:{target}")
    wrong = Engine.from_pretrained(target, drafter=f"model:{save(dense_model(), tmp_path / 'small')}")
    chain = TreeConfig(total_tokens=5, depth=4, top_k=1, min_path_p=0)
    for engine, tree, least in ((right, chain, 4.0), (right, TREE, 2.0), (wrong, TREE, 1.0)):
        summary = [*engine.generate(PROMPT, GenerationConfig(max_new_tokens=32), tree=tree)][-1].summary
        assert summary.token_ids == expected
        assert summary.tokens_per_step >= least
    assert right.info.drafter_name == "small model target"
    assert right.info.drafter_reason == "asked for"


def test_a_small_model_for_a_target_without_a_tokenizer_is_refused(folders):
    with pytest.raises(ValueError, match="the target has no tokenizer to compare its own with"):
        Engine.from_model(tiny_model("qwen3_moe"), drafter=f"model:{folders[1]}")


def sliding_model() -> Any:
    return MistralForCausalLM(MistralConfig(vocab_size=VOCAB, **SHAPE, num_key_value_heads=4, sliding_window=8))


def recurrent_model() -> Any:
    return MambaForCausalLM(MambaConfig(vocab_size=VOCAB, hidden_size=16, num_hidden_layers=2, state_size=4))


OTHER_WORDS = {f"w{n}": n for n in range(VOCAB - 1)} | {"other": VOCAB - 1}


@pytest.mark.parametrize(
    ("model", "tokenizer", "sentence"),
    [
        (dense_model, {"words": OTHER_WORDS}, "2 tokens have other ids, such as 'w96'"),
        (dense_model, {"lower": True}, "share the target's tokenizer: it reads 'W1 w2' as"),
        (lambda: dense_model(90), {}, "it knows 90 of the target's 97 ids"),
        (sliding_model, {}, "layers other than full attention"),
        (recurrent_model, {}, "layers other than full attention"),
    ],
    ids=["vocabulary", "normalizer", "ids", "window", "recurrent"],
)
def test_a_model_that_cannot_draft_for_the_target_is_refused(folders, model, tokenizer, sentence, monkeypatch):
    target, small = folders
    monkeypatch.setattr("moespec.drafters.small_model.PROBES", ("w1 w2", "W1 w2"))
    save(model(), small, **tokenizer)
    with pytest.raises(ValueError, match=sentence) as refusal:
        Engine.from_pretrained(target, drafter=f"model:{small}")
    assert str(small) in str(refusal.value) and "\n" not in str(refusal.value)


def test_what_is_no_model_is_refused(folders):
    with pytest.raises(ValueError, match="/nowhere is neither a directory nor a hub id"):
        Engine.from_pretrained(folders[0], drafter="model:/nowhere")
