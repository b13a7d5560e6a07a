"""Models to time whole steps of: the embedded pair, or a target and a draft head of a known shape with random weights.

Owns their sizes and what loading refuses. Random weights route almost uniformly and accept nothing: `routing_replay.py`
makes the routing real, and the time of a step does not depend on what is accepted. Knows nothing of clocks.
"""

from __future__ import annotations

from typing import Any

import torch

from moespec.bench.layers import EMBEDDED
from moespec.config import EMBEDDED_TARGET
from moespec.cost import WORKED_SHAPES, ModelShape
from moespec.drafters.eagle3 import Eagle3Drafter, make_pass
from moespec.drafters.head import Eagle3Config, Eagle3Head
from moespec.engine import Engine
from moespec.hf import AutoConfig, AutoModelForCausalLM
from moespec.memory import free_bytes
from moespec.target import Target

MODEL_NAMES = (EMBEDDED, "OLMoE-1B-7B", "Qwen3-30B-A3B")
NUM_DRAFT_WORDS = 32_000  # of the public EAGLE-3 heads
_SPARE_BYTES = 4 << 30  # beside the weights: the cache, the head, what a pass needs
_SETTINGS: dict[str, dict[str, Any]] = {
    "OLMoE-1B-7B": {"model_type": "olmoe", "intermediate_size": 1024, "num_experts": 64, "num_attention_heads": 16},
    "Qwen3-30B-A3B": {
        "model_type": "qwen3_moe",
        "moe_intermediate_size": 768,
        "num_experts": 128,
        "norm_topk_prob": True,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
    },
}


def load_engine(name: str, device: torch.device, dtype: str) -> Engine:
    """The engine to time. ValueError where the model does not fit the device's memory."""
    if name == EMBEDDED:
        return Engine.from_pretrained(EMBEDDED_TARGET, device=device.type, dtype=dtype)
    if name not in MODEL_NAMES:
        raise ValueError(f"model {name!r} is not one of {', '.join(MODEL_NAMES)}.")
    config = _config(name)
    weights_dtype = torch.bfloat16 if dtype == "auto" else getattr(torch, dtype)
    with torch.device("meta"):
        num_weights = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    needed, free = num_weights * weights_dtype.itemsize + _SPARE_BYTES, free_bytes(device)
    if needed > free:
        raise ValueError(
            f"{name} takes {needed / 1e9:.0f} GB and {device} has {free / 1e9:.0f} GB free: "
            f"choose another of {', '.join(MODEL_NAMES)}."
        )
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=weights_dtype).eval()
    return Engine.from_model(model, drafter=_random_head(model, device))


def shape_of(target: Target, name: str) -> ModelShape:
    """What a step's cost depends on, counted from the parameters: all but experts and embeddings is always read."""
    experts = [parameter for moe in target.moe_layers for parameter in moe.experts.parameters()]
    embeddings = target.model.get_input_embeddings().weight
    unread = {id(parameter) for parameter in experts}
    if target.model.get_output_embeddings().weight is not embeddings:
        unread.add(id(embeddings))
    dense_bytes = sum(p.numel() * p.element_size() for p in target.model.parameters() if id(p) not in unread)
    config = target.model.config.get_text_config()
    return ModelShape(
        name=name,
        num_moe_layers=len(target.moe_layers),
        num_experts=target.num_experts,
        top_k=target.top_k,
        hidden_size=target.hidden_size,
        expert_ffn_size=getattr(config, "moe_intermediate_size", config.intermediate_size),
        dense_bytes=dense_bytes,
        expert_bytes=target.bytes_per_expert,
    )


def _config(name: str) -> Any:
    shape, settings = WORKED_SHAPES[name], dict(_SETTINGS[name])
    return AutoConfig.for_model(
        settings.pop("model_type"),
        hidden_size=shape.hidden_size,
        num_hidden_layers=shape.num_moe_layers,
        num_experts_per_tok=shape.top_k,
        vocab_size=50_304 if name == "OLMoE-1B-7B" else 151_936,
        **settings,
    )


def _random_head(model: Any, device: torch.device) -> Eagle3Drafter:
    """One layer as wide as the target, as the public heads are."""
    config, num_layers = model.config, model.config.num_hidden_layers
    head_config = Eagle3Config(
        hidden_size=config.hidden_size,
        intermediate_size=3 * config.hidden_size,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=128,
        vocab_size=config.vocab_size,
        draft_vocab_size=NUM_DRAFT_WORDS,
        tap_layers=(2, num_layers // 2, num_layers - 3),
        target_hidden_size=config.hidden_size,
    )
    with torch.device(device):
        head = Eagle3Head(head_config)
        head.draft_only(torch.arange(NUM_DRAFT_WORDS))
    head = head.requires_grad_(False).to(model.dtype).eval()
    head.embeddings = model.get_input_embeddings().weight.detach()
    return Eagle3Drafter(head, config.max_position_embeddings, make_pass(head, config.max_position_embeddings))
