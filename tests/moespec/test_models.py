"""Which models are taken and which refused: each refusal is one sentence that says what is wrong."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from moespec import Engine
from tests.conftest import VOCAB, tiny_model


@pytest.fixture
def folder(tmp_path):
    """A checkpoint as transformers writes it."""
    tiny_model("qwen3_moe").save_pretrained(tmp_path)
    words = Tokenizer(WordLevel({f"w{n}": n for n in range(VOCAB)}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(tmp_path)
    return tmp_path


def test_a_checkpoint_loads_and_runs(folder):
    engine = Engine.from_pretrained(folder, drafter="ngram")
    assert [*engine.generate([1, 2, 3])][-1].summary.token_ids


def test_a_truncated_weight_file_is_refused(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(ValueError, match="could not be loaded") as refusal:
        Engine.from_pretrained(folder)
    assert "\n" not in str(refusal.value) and str(folder) in str(refusal.value)


def test_a_missing_weight_file_is_refused(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        Engine.from_pretrained(folder)


@pytest.mark.parametrize("name", ["no/such/folder", "/nowhere", "assets"])
def test_what_is_no_checkpoint_is_refused(name):
    with pytest.raises(ValueError, match=r"neither a directory nor a hub id|could not be loaded"):
        Engine.from_pretrained(name)


def test_a_dense_model_is_refused():
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    with pytest.raises(ValueError, match="LlamaForCausalLM is not a Mixture-of-Experts"):
        Engine.from_model(LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, **shape)))


def test_an_unknown_router_is_refused_by_its_name():
    class SigmoidRouter(torch.nn.Module):
        def __init__(self, weight):
            super().__init__()
            self.weight = weight

        def forward(self, x_TD):
            logits_TE = x_TD @ self.weight.T
            weights_TK, ids_TK = logits_TE.sigmoid().topk(3)
            return logits_TE, weights_TK, ids_TK

    model = tiny_model("qwen3_moe")
    for layer in model.model.layers:
        layer.mlp.gate = SigmoidRouter(layer.mlp.gate.weight)
    with pytest.raises(ValueError, match="SigmoidRouter is of an unknown family"):
        Engine.from_model(model)


def test_sliding_windows_are_refused():
    model = tiny_model("mixtral")
    model.config.sliding_window = 16
    with pytest.raises(ValueError, match="full attention"):
        Engine.from_model(model)
