"""Tiny random MoEs shared by the tests. Large weights, so that greedy text does not settle into one token."""

from __future__ import annotations

import gc
import os
from typing import Any

os.environ.setdefault("GOMP_SPINCOUNT", "20000")  # before torch: waiting threads leave the core to others

import pytest
import torch
from transformers import (
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from moespec import Engine
from moespec.run import Conversation

# Triton's interpreter makes millions of short-lived objects among those of torch and transformers: looking for cycles
# after every 700 of them took a quarter of its time.
gc.set_threshold(50_000, 20, 20)


def _begin_tests_in_a_large_frame() -> None:
    """Python keeps its frames in blocks of 16 KB: at the edge of one, each call takes a block from the system and gives
    it back, which took two thirds of the interpreted kernels' time. A frame of many names, none of them ever set, has a
    block with room for all that a test calls."""
    names, made = ", ".join(f"name_{number}" for number in range(16_000)), {}
    exec(
        f"def run(test):\n    if 0: {names} = test\n    return runtest(test)",
        {"runtest": pytest.Function.runtest},
        made,
    )
    pytest.Function.runtest = made["run"]


_begin_tests_in_a_large_frame()
VOCAB = 97
_SHARED = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
_FAMILIES: dict[str, Any] = {
    "olmoe": lambda **sizes: OlmoeForCausalLM(
        OlmoeConfig(**_SHARED, **sizes, intermediate_size=16, num_experts=12, num_experts_per_tok=3)
    ),
    "qwen3_moe": lambda **sizes: Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            **_SHARED,
            **sizes,
            head_dim=8,
            moe_intermediate_size=16,
            num_experts=12,
            num_experts_per_tok=3,
            norm_topk_prob=True,
        )
    ),
    "mixtral": lambda **sizes: MixtralForCausalLM(
        MixtralConfig(**_SHARED, **sizes, intermediate_size=16, num_local_experts=6, num_experts_per_tok=2)
    ),
}
FAMILIES = tuple(_FAMILIES)


def tiny_model(family: str, seed: int = 0, num_layers: int = 3) -> Any:
    torch.manual_seed(seed)
    model = _FAMILIES[family](num_hidden_layers=num_layers).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def conversation_of(engine: Engine) -> Conversation:
    """What the engine keeps of its only conversation."""
    seat = engine.seats.take([])
    engine.seats.leave(seat)
    assert len(engine.seats) == 1
    return seat.conversation


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param
