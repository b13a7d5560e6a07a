"""A tiny random model of every family of transformers whose experts run through its registry: found, not listed.

A family is made small through the names that configs use for sizes; what a family needs beside them stands in OWN.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, model_type_to_module_name
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from moespec.hf import ALL_EXPERTS_FUNCTIONS  # noqa: F401  (before any modelling code is imported)
from tests.conftest import VOCAB

NUM_LAYERS, NUM_EXPERTS = 4, 12
WINDOW = 8
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 24,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "moe_shared_expert_intermediate_size": 16,
    "shared_intermediate_size": 16,
    "expert_ffn_hidden_size": 16,
    "num_experts": NUM_EXPERTS,
    "num_local_experts": NUM_EXPERTS,
    "n_routed_experts": NUM_EXPERTS,
    "moe_num_experts": NUM_EXPERTS,
    "num_experts_per_tok": 3,
    "moe_topk": 3,
    "moe_k": 3,
    "n_group": 4,
    "topk_group": 2,
    "num_expert_group": 4,
    "first_k_dense_replace": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 12,
    "sliding_window": WINDOW,
    "max_position_embeddings": 512,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
LATENT = {"num_key_value_heads": 4}  # attention over a compressed state: as many heads of keys as of queries
OWN: dict[str, dict[str, Any]] = {
    "axk1": LATENT,
    "deepseek_v2": {**LATENT, "topk_method": "group_limited_greedy"},
    "deepseek_v3": LATENT,
    "dots3_note_text": {"per_layer_config": {}, "layer_types": ["indexed_attention"] * NUM_LAYERS, **LATENT},
    "dots1": {"n_group": 4, "topk_group": 2, "n_shared_experts": 1},
    "gemma4_text": {
        "enable_moe_block": True,
        "top_k_experts": 3,
        "vocab_size_per_layer_input": VOCAB,
        "hidden_size_per_layer_input": 8,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "per_layer_config": {"01": {"head_dim": 16}, "03": {"head_dim": 16}},
    },
    "glm4_moe_lite": LATENT,
    "granitemoehybrid": {"layer_types": ["full_attention"] * NUM_LAYERS, "mamba_n_heads": 8, "mamba_d_head": 8},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "qwen4_exp_text": {
        **dict.fromkeys(("indexer_n_heads", "indexer_kv_heads"), 1),
        **dict.fromkeys(("indexer_head_dim", "indexer_budget", "indexer_compress_ratio"), 8),
        "ngram_vocab_size_base": 200,
        "layer_types": ["indexed_attention"] * NUM_LAYERS,
    },
    "zaya": {"num_experts_per_tok": 1},
}


def family_names() -> list[str]:
    """The model types whose causal model routes through the registry, in alphabetical order."""
    found = []
    for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        folder = Path(transformers.__file__).parent / "models" / model_type_to_module_name(name)
        if any("@use_experts_implementation" in path.read_text("utf-8") for path in folder.glob("modeling_*.py")):
            found.append(name)
    # Of a model that also sees or hears, the text model stands for both; assistants draft for others.
    texts = [name for name in found if f"{name}_text" not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES]
    return sorted(name for name in texts if not name.endswith("_assistant"))


def tiny_config(name: str) -> Any:
    config_class = CONFIG_MAPPING[name]
    known = inspect.signature(config_class).parameters.keys() | config_class.attribute_map.keys()
    sizes = {key: value for key, value in SIZES.items() if key in known}
    return config_class(**{**sizes, **OWN.get(name, {})})


def tiny_family_model(name: str, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(name)).eval()
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.dim() > 1 and tensor.is_floating_point():
                torch.nn.init.normal_(tensor, std=0.3)
            elif tensor.numel() == NUM_EXPERTS:  # what may be a bias or a scale of the router is not all alike
                tensor.add_(torch.randn(tensor.shape) * 0.2)
    return model
