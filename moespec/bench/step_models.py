"""Models to time whole steps of: the embedded pair, or a target and a draft head of a known shape with random weights.

Owns their sizes and what loading refuses. Random weights route all rows much alike and accept nothing:
`routing_replay.py` makes the routing real, and the time of a step does not depend on what is accepted. Knows nothing of
clocks.
"""

from __future__ import annotations

from typing import Any

import torch

from moespec.bench.layers import EMBEDDED
from moespec.config import EMBEDDED_TARGET
from moespec.drafters.eagle3 import Eagle3Drafter, make_pass
from moespec.drafters.head import Eagle3Config, Eagle3Head
from moespec.engine import Engine
from moespec.hf import AutoModelForCausalLM
from moespec.memory import free_bytes, num_parameters
from moespec.published import published_config

MODEL_NAMES = (EMBEDDED, "OLMoE-1B-7B", "Qwen3-30B-A3B")
NUM_DRAFT_WORDS = 32_000  # of the public EAGLE-3 heads
_SPARE_BYTES = 4 << 30  # beside the weights: the cache, the head, what a pass needs


def load_engine(name: str, device: torch.device, dtype: str) -> Engine:
    """The engine to time. ValueError where the model does not fit the device's memory."""
    if name == EMBEDDED:
        return Engine.from_pretrained(EMBEDDED_TARGET, device=device.type, dtype=dtype)
    if name not in MODEL_NAMES:
        raise ValueError(f"model {name!r} is not one of {', '.join(MODEL_NAMES)}.")
    config = published_config(name)
    weights_dtype = torch.bfloat16 if dtype == "auto" else getattr(torch, dtype)
    needed, free = num_parameters(config) * weights_dtype.itemsize + _SPARE_BYTES, free_bytes(device)
    if needed > free:
        raise ValueError(
            f"{name} takes {needed / 1e9:.0f} GB and {device} has {free / 1e9:.0f} GB free: "
            f"choose another of {', '.join(MODEL_NAMES)}."
        )
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=weights_dtype).eval()
    return Engine.from_model(model, drafter=_random_head(model, device))


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
