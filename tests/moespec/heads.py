"""Tiny draft heads written as people write them: the files of each layout, and what their own runtime makes of them."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import OlmoeConfig, OlmoeForCausalLM

from moespec import Engine
from tests.plain_head import PlainHead

VOCAB, NUM_LAYERS, TARGET_WIDTH = 97, 6, 32
DRAFT_IDS = torch.arange(1, VOCAB, 4)  # the words that a smaller draft vocabulary holds
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}


@dataclass(frozen=True)
class Case:
    """One head. `config` is added to what every config.json of the layout has; `means` is the formula's variant that it
    stands for; `taps` the layers, of six, whose entering residual it reads; `given`, if the loader is told them."""

    written: str
    read: str
    taps: tuple[int, ...]
    config: dict[str, Any] = field(default_factory=dict)
    means: dict[str, Any] = field(default_factory=dict)
    is_speculators: bool = False
    hidden: int = TARGET_WIDTH
    head_dim: int = 8
    drafts_all: bool = False
    files: str = "model.safetensors"  # with "in parts": an index and two
    own_embeddings: bool = False
    own_lm_head: bool = True
    given: tuple[int, ...] | None = None

    @property
    def layer(self) -> dict[str, Any]:
        """The numbers of its one layer."""
        return {
            "hidden_size": self.hidden,
            "intermediate_size": 48,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": self.head_dim,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
        }


CASES = [
    Case(
        written="native, as SafeAILab trains it",
        read="no taps in the config, `d2t`, `pytorch_model.bin`",
        taps=(2, 3, 3),
        files="pytorch_model.bin",
    ),
    Case(
        written="native, SpecForge and SGLang",
        read="taps in `eagle_config` that begin with 1, `head_dim` apart from hidden / heads",
        taps=(2, 3, 5),
        config={"eagle_config": {"eagle_aux_hidden_state_layer_ids": [1, 2, 4], "use_aux_hidden_state": True}},
        head_dim=16,
    ),
    Case(
        written="native, EAGLE-3.1",
        read="`fc_norm`, `norm_output`, safetensors in parts",
        taps=(2, 3, 3),
        config={"fc_norm": True, "norm_output": True},
        means={"fc_norm": True, "norm_output": True},
        files="model.safetensors in parts",
    ),
    Case(
        written="native, gpt-oss style",
        read="`norm_before_fc`, `norm_before_residual`, `embed_tokens`, other taps in `eagle_config`, .bin in parts",
        taps=(2, 3, 4),
        own_embeddings=True,
        config={
            "eagle_config": {"eagle_aux_hidden_state_layer_ids": [2, 3, 4]},
            "norm_before_fc": True,
            "norm_before_residual": True,
        },
        means={"norm_before_fc": True, "norm_before_residual": True},
        files="pytorch_model.bin in parts",
    ),
    Case(
        written="native, of another width",
        read="`target_hidden_size`, `embed_tokens`, Llama 3's `rope_scaling`",
        taps=(2, 3, 3),
        hidden=24,
        own_embeddings=True,
        config={"target_hidden_size": TARGET_WIDTH, "rope_scaling": {"rope_type": "llama3", "factor": 8.0, **LLAMA3}},
        means={"rope": {"kind": "llama3", "factor": 8.0, "low": 1.0, "high": 4.0, "original": 16}},
    ),
    Case(
        written="native, without an output layer",
        read="`draft_vocab_size` null: the target's `lm_head` and embeddings; YaRN in `rope_parameters`",
        taps=(2, 3, 3),
        config={
            "max_position_embeddings": 64,
            "rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0},
        },
        means={"rope": {"kind": "yarn", "factor": 4.0, "original": 64}},
        drafts_all=True,
        own_lm_head=False,
    ),
    Case(
        written="speculators (vLLM)",
        read="`layers.0.*`, `norm_before_residual` left out: true; taps at the top; linear `rope_scaling`",
        taps=(1, 3, 5),
        is_speculators=True,
        config={
            "eagle_aux_hidden_state_layer_ids": [1, 3, 5],
            "transformer_layer_config": {"rope_scaling": {"type": "linear", "factor": 2.0}},
        },
        means={"norm_before_residual": True, "rope": {"kind": "linear", "factor": 2.0}},
    ),
    Case(
        written="speculators (vLLM), every option",
        read="`norm_before_residual` false, `norm_before_fc`, `fc_norm`, `norm_output`, `target_hidden_size`",
        taps=(2, 3, 3),
        is_speculators=True,
        hidden=24,
        own_embeddings=True,
        config={
            "norm_before_residual": False,
            "norm_before_fc": True,
            "fc_norm": True,
            "norm_output": True,
            "target_hidden_size": TARGET_WIDTH,
            "eagle_aux_hidden_state_layer_ids": None,
        },
        means={"norm_before_fc": True, "fc_norm": True, "norm_output": True},
    ),
    Case(
        written="any, with the taps given",
        read="`tap_layers=`, `--taps`: OLMoE's head reads 2, n // 2, n - 1, and does not say so",
        taps=(2, 3, 5),
        given=(2, 3, 5),
    ),
]


def target() -> Any:
    """A random OLMoE of six layers. Its output layer is in 127ths of each row's largest value: a compiled pass that
    borrows it keeps it exactly."""
    torch.manual_seed(0)
    shape = {"hidden_size": TARGET_WIDTH, "num_hidden_layers": NUM_LAYERS, "num_attention_heads": 4}
    ends = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"))
    config = OlmoeConfig(
        vocab_size=VOCAB, **shape, **ends, intermediate_size=16, num_experts=8, num_experts_per_tok=2,
        max_position_embeddings=256,
    )  # fmt: skip
    model: Any = OlmoeForCausalLM(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    model.lm_head.weight.copy_(in_127ths(model.lm_head.weight))
    return model


def in_127ths(weight: Tensor) -> Tensor:
    """What the compiled pass, whose weights are int8, keeps without loss."""
    largest = weight.abs().amax(dim=1, keepdim=True)
    return (weight / largest * 127).round() / 127 * largest


def weights_of(case: Case) -> dict[str, Tensor]:
    """By native name. Norms differ from 1, so that each is told apart."""
    torch.manual_seed(1)
    hidden, layer, num_taps = case.hidden, case.layer, len(case.taps)
    num_words = VOCAB if case.drafts_all else len(DRAFT_IDS)
    width = num_taps * TARGET_WIDTH
    heads, kv = (layer[name] * layer["head_dim"] for name in ("num_attention_heads", "num_key_value_heads"))
    shapes: dict[str, tuple[int, ...]] = {
        "fc.weight": (hidden, width),
        "norm.weight": (hidden,),
        "midlayer.hidden_norm.weight": (hidden,),
        "midlayer.input_layernorm.weight": (hidden,),
        "midlayer.post_attention_layernorm.weight": (hidden,),
        "midlayer.self_attn.q_proj.weight": (heads, 2 * hidden),
        "midlayer.self_attn.k_proj.weight": (kv, 2 * hidden),
        "midlayer.self_attn.v_proj.weight": (kv, 2 * hidden),
        "midlayer.self_attn.o_proj.weight": (hidden, heads),
        "midlayer.mlp.gate_proj.weight": (48, hidden),
        "midlayer.mlp.up_proj.weight": (48, hidden),
        "midlayer.mlp.down_proj.weight": (hidden, 48),
    }
    if case.own_lm_head:
        shapes["lm_head.weight"] = (num_words, hidden)
    if case.own_embeddings:
        shapes["embed_tokens.weight"] = (VOCAB, hidden)
    if case.means.get("norm_before_fc"):
        shapes["input_norm.weight"] = (width,)
    if case.means.get("fc_norm"):
        shapes |= {f"fc_norm.{n}.weight": (TARGET_WIDTH,) for n in range(num_taps)}
    return {
        name: in_127ths(torch.randn(shape) * 0.3) if len(shape) > 1 else torch.rand(shape) + 0.5
        for name, shape in shapes.items()
    }


def write(case: Case, folder: Path) -> dict[str, Tensor]:
    """The head's files; returns its weights by native name."""
    weights = weights_of(case)
    stored = dict(weights)
    if not case.drafts_all:
        stored["d2t"] = DRAFT_IDS - torch.arange(len(DRAFT_IDS))
        stored["t2d"] = torch.isin(torch.arange(VOCAB), DRAFT_IDS)
    if case.is_speculators:
        stored = {name.replace("midlayer.", "layers.0."): tensor for name, tensor in stored.items()}
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config_json(case)))
    write_tensors(folder, stored, case.files)
    return weights


def config_json(case: Case) -> dict[str, Any]:
    """As the layout's own trainer writes it."""
    draft_vocab_size = None if case.drafts_all else len(DRAFT_IDS)
    layer = case.layer | {"num_hidden_layers": 1, "vocab_size": VOCAB, "hidden_act": "silu", "model_type": "llama"}
    if not case.is_speculators:
        shared = {"tie_word_embeddings": False, "torch_dtype": "float32", "draft_vocab_size": draft_vocab_size}
        return layer | {"architectures": ["LlamaForCausalLMEagle3"]} | shared | case.config
    config = dict(case.config)
    return {
        "architectures": ["Eagle3Speculator"],
        "speculators_model_type": "eagle3",
        "speculators_version": "0.3.0",
        "draft_vocab_size": draft_vocab_size,
        "embed_requires_grad": False,
        "speculators_config": {
            "algorithm": "eagle3",
            "default_proposal_method": "greedy",
            "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": 3}],
            "verifier": {"architectures": ["OlmoeForCausalLM"], "name_or_path": "owner/target"},
        },
        "transformer_layer_config": layer | config.pop("transformer_layer_config", {}),
    } | config


def write_tensors(folder: Path, tensors: dict[str, Tensor], files: str) -> None:
    name, _, in_parts = files.partition(" ")
    stem, suffix = name.split(".")
    names = sorted(tensors)
    parts = {name: names}
    if in_parts:
        parts = {f"{stem}-{n + 1:05d}-of-00002.{suffix}": names[n::2] for n in range(2)}
        index = {"weight_map": {tensor: part for part, held in parts.items() for tensor in held}}
        (folder / f"{name}.index.json").write_text(json.dumps(index))
    for part, held in parts.items():
        kept = {tensor: tensors[tensor].contiguous() for tensor in held}
        save_file(kept, folder / part) if suffix == "safetensors" else torch.save(kept, folder / part)


def plain(case: Case, weights: dict[str, Tensor], model: Any) -> PlainHead:
    """The head by its formulas, with the target's embeddings and output layer where it has none."""
    arrays = {name: tensor.double().numpy() for name, tensor in weights.items()}
    arrays.setdefault("lm_head.weight", model.lm_head.weight.double().numpy())
    borrowed = model.get_input_embeddings().weight.double().numpy()
    return PlainHead(arrays, case.layer, arrays.get("embed_tokens.weight", borrowed), **case.means)


def attach(model: Any, folder: Path, **options: Any) -> Engine:
    return Engine.from_model(model, drafter=folder, **options)
