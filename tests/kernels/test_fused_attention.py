"""Attention in fewer launches: which modules it stands in for, against those modules' own code."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from moespec.dense import grouped_attention
from moespec.fused_attention import FusedAttention
from moespec.kv_cache import INITIAL_CAPACITY, TreeCache
from tests.families import tiny_family_model

NUM_ROWS, WIDTH, HEAD_DIM = 5, 32, 8
# Whether a family's attention is stood in for, and what it tries.
FAMILIES = {
    "mixtral": (True, "neither norms nor biases"),
    "qwen2_moe": (True, "biases"),
    "qwen3_moe": (True, "norms of each head"),
    "olmoe": (True, "norms of all heads"),
    "granitemoe": (True, "a scale of its own"),
    "ernie4_5_moe": (False, "turns neighbours instead of halves"),
    "hunyuan_v1_moe": (False, "norms behind the rotation"),
    "gpt_oss": (False, "sinks"),
    "deepseek_v3": (False, "other projections"),
    "minimax_m2": (True, "a rotation of half the features, which no probe can know"),
}


def attention_of(family: str) -> Any:
    torch.manual_seed(0)
    module = tiny_family_model(family).model.layers[-1].self_attn
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return module


@torch.inference_mode()
def fused_of(module: Any) -> FusedAttention | None:
    return FusedAttention.of(module, grouped_attention)


@torch.inference_mode()
def outputs(forward: Any, module: Any, rotary_dim: int = HEAD_DIM) -> list[torch.Tensor]:
    """What the rows give, and what is kept of them, in a step of fixed shape behind a few other rows."""
    generator = torch.Generator().manual_seed(1)
    x, angles = (torch.randn(1, NUM_ROWS, size, generator=generator) for size in (WIDTH, rotary_dim // 2))
    angles = angles.repeat(1, 1, 2)
    cache, rows_T = TreeCache(module.layer_idx + 1), torch.tensor([9, 3, 4, 11, 5])
    stored = cache.layers[module.layer_idx]
    stored.lazy_initialization(*(torch.zeros(1, 2, 1, HEAD_DIM) for _ in range(2)))
    for part in (stored.keys, stored.values):
        part.normal_(generator=generator)
    mask = torch.where(torch.rand(NUM_ROWS, INITIAL_CAPACITY, generator=generator) < 0.5, 0.0, -1e9)
    with cache.writing_at(rows_T):
        given = {"position_embeddings": (angles.cos(), angles.sin()), "attention_mask": mask[None, None]}
        made = forward(x, past_key_values=cache, **given)[0]
    return [made, stored.keys, stored.values]


def assert_same(fused: FusedAttention, module: Any, **how: int) -> None:
    for ours, theirs in zip(outputs(fused, module, **how), outputs(module, module, **how), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_module_is_stood_in_for_where_it_is_reproduced(family):
    module, (is_reproduced, _) = attention_of(family), FAMILIES[family]
    fused = fused_of(module)
    assert (fused is not None) == is_reproduced
    if fused is not None:
        assert_same(fused, module)


def test_a_rotation_of_fewer_features_is_left_to_the_module():
    module = attention_of("minimax_m2")
    fused = fused_of(module)
    assert fused is not None
    assert_same(fused, module, rotary_dim=HEAD_DIM // 2)


def test_changed_weights_are_followed_and_can_be_trained():
    """Joined, the projections stay the module's own parameters: written to in place, or replaced before a refresh."""
    module = attention_of("qwen2_moe")
    fused = fused_of(module)
    assert fused is not None
    with torch.no_grad():
        module.k_proj.weight.mul_(0.5)
    assert_same(fused, module)
    module.q_proj.weight = torch.nn.Parameter(torch.randn_like(module.q_proj.weight))
    fused.refresh()
    assert_same(fused, module)
    module.v_proj(torch.ones(1, WIDTH)).sum().backward()
    assert module.v_proj.weight.grad is not None
