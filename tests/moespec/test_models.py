"""Which models are taken and which refused: each refusal is one sentence that says what is wrong."""

from __future__ import annotations

import io
import json
import sys

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM, PreTrainedTokenizerFast

from moespec import Engine, GenerationConfig
from moespec.advise import advise
from moespec.memory import num_parameters
from tests.conftest import VOCAB, tiny_model

TINY = {
    **{"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 64},
    **{"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2},
}


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
    with pytest.raises(ValueError, match="LlamaForCausalLM is not a Mixture-of-Experts"):
        Engine.from_model(LlamaForCausalLM(LlamaConfig(**TINY)))


def test_a_pickle_is_never_unpacked(folder):
    """A `.bin` file loads as weights alone."""
    (folder / "model.safetensors").unlink()
    torch.save({"model.embed_tokens.weight": Trap()}, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="could not be loaded"):
        Engine.from_pretrained(folder)
    assert not Trap.sprung


class Trap:
    sprung = False

    def __reduce__(self):
        return setattr, (Trap, "sprung", True)


@pytest.mark.parametrize("kind", ["mine", "vit"])
def test_a_repositorys_code_is_never_run_nor_asked_for(kind, folder, monkeypatch):
    """transformers would ask on the terminal: an answer typed for something else must not be taken for a yes."""
    sprung, mine = folder / "sprung", "configuration_mine.Mine"
    code = f"open({str(sprung)!r}, 'w')\nfrom transformers import PretrainedConfig as MineConfig\n"
    (folder / "configuration_mine.py").write_text(code)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": kind, "auto_map": {"AutoConfig": f"{mine}Config", "AutoModelForCausalLM": f"{mine}Model"}}
    (folder / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 9))
    for load in (Engine.from_pretrained, advise):
        with pytest.raises(ValueError, match=r"could not be loaded|cannot be built"):
            load(folder)
    assert not sprung.exists()


def test_a_bin_file_of_weights_loads(folder):
    weights = load_file(folder / "model.safetensors")
    expected = [*Engine.from_pretrained(folder, drafter=None).generate([1, 2, 3])][-1].summary.token_ids
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    assert [*Engine.from_pretrained(folder, drafter=None).generate([1, 2, 3])][-1].summary.token_ids == expected


def test_what_does_not_fit_is_refused_before_it_is_loaded(folder, monkeypatch):
    (folder / "model.safetensors").unlink()  # not even looked at
    needed = 4 * tiny_model("qwen3_moe").num_parameters()
    monkeypatch.setattr("moespec.memory.free_bytes", lambda device: needed)  # and nothing to spare
    with pytest.raises(ValueError, match=r"does not fit: .* in float32, and cpu has .* with dtype=bfloat16 it takes"):
        Engine.from_pretrained(folder)
    monkeypatch.setattr("moespec.memory.free_bytes", lambda device: needed // 4)
    with pytest.raises(ValueError, match=r"it needs a device with .* free, in half precision"):
        Engine.from_pretrained(folder)


def test_weights_that_are_shared_count_once():
    model = MixtralForCausalLM(MixtralConfig(**TINY, num_local_experts=4, tie_word_embeddings=True))
    assert num_parameters(model.config) == sum({p.data_ptr(): p.numel() for p in model.parameters()}.values())


def test_a_revision_of_a_directory_is_refused(folder):
    with pytest.raises(ValueError, match="revision='main' names a version of a hub id"):
        Engine.from_pretrained(folder, revision="main")


def test_a_model_on_two_devices_is_refused():
    model = tiny_model("olmoe")
    model.lm_head.to("meta")
    with pytest.raises(ValueError, match="it lies on cpu, meta, and a step runs on one device"):
        Engine.from_model(model)


def leave_out(argument: str, attention: torch.nn.Module) -> None:
    attend = attention.forward
    attention.forward = lambda *args, **kwargs: attend(*args, **{**kwargs, argument: None})


def test_a_model_whose_trees_are_not_its_own_text_is_refused():
    """One that looks at no mask: every row sees every other."""
    model = tiny_model("qwen3_moe")
    for layer in model.model.layers:
        leave_out("attention_mask", layer.self_attn)
    with pytest.raises(ValueError, match="a draft tree's rows do not get the logits of their own paths"):
        Engine.from_model(model, backend="reference")


def test_a_layer_that_keeps_no_keys_is_refused():
    model = tiny_model("qwen3_moe")
    leave_out("past_key_values", model.model.layers[1].self_attn)
    with pytest.raises(ValueError, match="layer 1 does not keep every position's keys and values"):
        Engine.from_model(model)


def test_an_unknown_router_is_refused_by_its_name():
    class SquareRouter(torch.nn.Module):
        def __init__(self, weight):
            super().__init__()
            self.weight = weight

        def forward(self, x_TD):
            logits_TE = x_TD @ self.weight.T
            weights_TK, ids_TK = logits_TE.square().topk(3)
            return logits_TE, weights_TK, ids_TK

    model = tiny_model("qwen3_moe")
    for layer in model.model.layers:
        layer.mlp.gate = SquareRouter(layer.mlp.gate.weight)
    with pytest.raises(ValueError, match=r"its router is of an unknown family .* .layer 0"):
        Engine.from_model(model)


THINKER = "{{ 'w5' if enable_thinking is defined and not enable_thinking else messages[-1].content }}"


def test_thinking_is_switched_off_where_the_template_has_the_switch(folder):
    engine = Engine.from_pretrained(folder, drafter=None)
    messages, without = [{"role": "user", "content": "w1"}], GenerationConfig(thinking=False)
    engine.target.tokenizer.chat_template = THINKER
    assert (engine.encode(messages), engine.encode(messages, without)) == ([1], [5])
    engine.target.tokenizer.chat_template = "{{ messages[-1].content }}"
    with pytest.raises(ValueError, match="no such switch"):
        engine.encode(messages, without)


def test_messages_that_a_template_refuses_are_a_sentence(folder):
    engine = Engine.from_pretrained(folder, drafter=None)
    engine.target.tokenizer.chat_template = "{{ raise_exception('System role not supported') }}"
    with pytest.raises(ValueError, match="chat template refuses these messages: System role not supported"):
        engine.encode([{"role": "system", "content": "w1"}, {"role": "user", "content": "w2"}])
