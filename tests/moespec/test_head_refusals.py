"""Heads that are none, are broken or belong to another target: each is refused with one sentence that says why."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from moespec.drafters.checkpoint import load_head
from tests.moespec.heads import CASES, NUM_LAYERS, attach, config_json, target, write, write_tensors

SPECFORGE, WIDE, BORROWING, SPECULATORS = CASES[1], CASES[4], CASES[5], CASES[6]


@pytest.fixture(scope="module")
def model():
    return target()


@pytest.fixture
def folder(tmp_path):
    """A head in the native layout, as it should be."""
    write(SPECFORGE, tmp_path)
    return tmp_path


def refusal(folder: Path, model=None, **options) -> str:
    """The sentence; with a model, the engine's, which gives the model back."""
    with pytest.raises(ValueError) as error:
        load_head(folder, NUM_LAYERS) if model is None else attach(model, folder, **options)
    if model is not None:
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    sentence = str(error.value)
    assert "\n" not in sentence and str(folder) in sentence and sentence.endswith((".", "again", "again."))
    return sentence


def configured(folder: Path, changes: dict) -> None:
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | changes))


def changed(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def test_a_revision_without_the_parts_of_eagle_3_is_listed(folder):
    """As EAGLE's issue 265 found `Tengyunw/qwen3_30b_moe_eagle3`: a plain layer, embeddings and a norm."""
    layer = {"q_proj": (64, 32), "k_proj": (32, 32), "v_proj": (32, 32), "o_proj": (32, 64)}
    tensors = {f"layers.0.self_attn.{name}.weight": torch.ones(shape) for name, shape in layer.items()}
    mlp = {"gate_proj": (48, 32), "up_proj": (48, 32), "down_proj": (32, 48)}
    tensors |= {f"layers.0.mlp.{name}.weight": torch.ones(shape) for name, shape in mlp.items()}
    norms = ("layers.0.input_layernorm", "layers.0.post_attention_layernorm", "norm")
    tensors |= {f"{name}.weight": torch.ones(32) for name in norms}
    tensors["embed_tokens.weight"] = torch.ones(97, 32)
    write_tensors(folder, tensors, "model.safetensors")
    assert refusal(folder) == (
        f"{folder} is no EAGLE-3 head that fits its config.json: missing d2t, fc.weight, lm_head.weight, "
        "layers.0.hidden_norm.weight; of another shape "
        "layers.0.self_attn.k_proj.weight [32, 32] instead of [32, 64], "
        "layers.0.self_attn.q_proj.weight [64, 32] instead of [64, 64], "
        "layers.0.self_attn.v_proj.weight [32, 32] instead of [32, 64]."
    )


def test_an_eagle_1_head_is_none(folder):
    """It joins the embedding to the last hidden state, and has no norms of its own."""
    tensors = {"fc.weight": torch.ones(32, 64), "embed_tokens.weight": torch.ones(97, 32)}
    write_tensors(folder, tensors, "model.safetensors")
    sentence = refusal(folder)
    assert "missing d2t, lm_head.weight, midlayer.hidden_norm.weight" in sentence
    assert "fc.weight [32, 64] instead of [32, 96]" in sentence


def test_tensors_that_no_head_has_are_named(folder):
    changed(folder, lambda tensors: tensors.update({"midlayer.self_attn.q_norm.weight": torch.ones(16)}))
    assert "unknown midlayer.self_attn.q_norm.weight." in refusal(folder)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"num_hidden_layers": 2}, "num_hidden_layers=2"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"eagle_config": {"use_aux_hidden_state": False}}, "use_aux_hidden_state=False"),
        ({"speculators_model_type": "dflash"}, "kind 'dflash'"),
        ({"speculators_model_type": "eagle3"}, "has no 'transformer_layer_config'"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "'dynamic' is not one of linear, llama3, yarn"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "lacks low_freq_factor, high_freq_factor"),
        ({"num_key_value_heads": 3}, "4 heads over 3 key-value heads"),
        ({"hidden_size": None}, "has no 'hidden_size'"),
        ({"hidden_size": "32"}, "hidden_size is '32'"),
        ({"head_dim": 0}, "head_dim is 0"),
        ({"eagle_config": {"eagle_aux_hidden_state_layer_ids": "1,2,4"}}, "layer_ids is '1,2,4'"),
        ({"eagle_config": [1, 2]}, "cannot be read"),
        ({"head_dim": 8}, "q_proj.weight [64, 64] instead of [32, 64]"),
        ({"draft_vocab_size": None}, "unknown d2t, t2d; of another shape lm_head.weight"),
    ],
    ids=str,
)
def test_a_config_of_another_kind_is_refused(folder, changes, sentence):
    configured(folder, changes)
    assert sentence in refusal(folder)


def test_what_does_not_fit_the_target_is_listed_at_once(tmp_path, model):
    write(WIDE, tmp_path)
    configured(tmp_path, {"target_hidden_size": 16, "eagle_aux_hidden_state_layer_ids": [2, 6, -1, 5, 4, 0]})
    assert "feature width 16 for the target's 32, tap layers 6, -1 for the target's 0 to 5" in refusal(tmp_path, model)


def test_a_head_of_another_vocabulary_is_refused(folder, model):
    configured(folder, {"vocab_size": 90})
    changed(folder, lambda tensors: tensors.update({"t2d": tensors["t2d"][:90]}))
    assert "vocabulary 90 for the target's 97" in refusal(folder, model)
    configured(folder, {"vocab_size": 97})
    changed(folder, lambda tensors: tensors.update({"t2d": torch.zeros(97).bool(), "d2t": tensors["d2t"] + 50}))
    assert "draft tokens 51 to 143 for 97 words" in refusal(folder, model)


@pytest.mark.parametrize("case", [WIDE, BORROWING])
def test_a_head_of_another_width_cannot_borrow(case, tmp_path, model):
    write(case, tmp_path)
    narrow = {"hidden_size": 24, "target_hidden_size": 32}
    if case is WIDE:
        changed(tmp_path, lambda tensors: tensors.pop("embed_tokens.weight"))
        assert "the target's embeddings, 24 for the target's 32" in refusal(tmp_path, model)
    else:
        configured(tmp_path, narrow)
        wide = write(WIDE, tmp_path / "wide")
        wide.pop("lm_head.weight")
        write_tensors(tmp_path, wide, "model.safetensors")
        assert "the target's output layer, 24 for the target's 32" in refusal(tmp_path, model)


def test_taps_that_the_head_cannot_read_are_refused(folder, model):
    assert "fc.weight [32, 96] instead of [32, 64]" in refusal(folder, model, tap_layers=(2, 3))
    assert "tap layers 6 for the target's 0 to 5" in refusal(folder, model, tap_layers=(2, 3, 6))


class Trap:
    """A pickle that writes a file when it is read without care."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("protocol", ["torch", "bare"])
def test_a_pickle_with_more_than_tensors_is_not_run(folder, protocol):
    (folder / "model.safetensors").unlink()
    trap, file = Trap(folder / "sprung"), folder / "pytorch_model.bin"
    torch.save({"fc.weight": trap}, file) if protocol == "torch" else file.write_bytes(pickle.dumps(trap, protocol=2))
    assert "no plain weights" in refusal(folder)
    assert not (folder / "sprung").exists()


def test_a_pickle_of_something_else_is_refused(folder):
    (folder / "model.safetensors").unlink()
    torch.save([torch.ones(2)], folder / "pytorch_model.bin")
    assert "holds no table of tensors" in refusal(folder)


@pytest.mark.parametrize("files", ["model.safetensors in parts", "pytorch_model.bin in parts"])
def test_a_missing_part_and_a_broken_index_are_named(tmp_path, files):
    write(SPECULATORS, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    assert "neither model.safetensors nor pytorch_model.bin, nor an index of either" in refusal(tmp_path)
    write_tensors(tmp_path, tensors, files)
    load_head(tmp_path, NUM_LAYERS)
    part = next(tmp_path.glob("*-00002-of-00002.*"))
    part.rename(tmp_path / "elsewhere")
    assert f"lacks {part.name}" in refusal(tmp_path)
    next(tmp_path.glob("*.index.json")).write_text("{}")
    assert "is no readable index" in refusal(tmp_path)


def test_a_folder_without_a_config_is_no_head(tmp_path):
    assert "has no config.json" in refusal(tmp_path)


def test_a_draft_vocabulary_may_come_without_its_other_half_or_be_all_words(folder, model):
    """SGLang and vLLM read `d2t` alone; some trainers write both although every word is drafted."""
    expected = load_head(folder, NUM_LAYERS)
    changed(folder, lambda tensors: tensors.pop("t2d"))
    assert torch.equal(load_head(folder, NUM_LAYERS).t2d, expected.t2d)
    write(BORROWING, folder)
    identity = {"d2t": torch.zeros(97, dtype=torch.long), "t2d": torch.ones(97).bool()}
    changed(folder, lambda tensors: tensors.update(identity))
    assert attach(model, folder).drafter.head.draft_ids() is None


def test_an_output_layer_that_is_tied_is_not_taken_for_the_targets(folder):
    write(BORROWING, folder)
    (folder / "config.json").write_text(json.dumps(config_json(BORROWING) | {"tie_word_embeddings": True}))
    assert "missing lm_head.weight" in refusal(folder)
