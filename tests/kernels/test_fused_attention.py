"""Attention in fewer launches: which modules it stands in for, against those modules' own code."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from moespec import Engine
from moespec.dense import grouped_attention
from moespec.fused_attention import FusedAttention
from moespec.kv_cache import INITIAL_CAPACITY, TreeCache
from tests.conftest import tiny_model
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
    "granitemoe_swa": (False, "sinks"),
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
    generator, dtype = torch.Generator().manual_seed(1), module.o_proj.weight.dtype
    x, angles = (torch.randn(1, NUM_ROWS, size, generator=generator) for size in (WIDTH, rotary_dim // 2))
    angles = angles.repeat(1, 1, 2)  # cos and sin stay in fp32, as FlexOlmo's do
    cache, rows_T = TreeCache(module.layer_idx + 1), torch.tensor([9, 3, 4, 11, 5])
    stored = cache.layers[module.layer_idx]
    stored.lazy_initialization(*(torch.zeros(1, 2, 1, HEAD_DIM, dtype=dtype) for _ in range(2)))
    for part in (stored.keys, stored.values):
        part.normal_(generator=generator)
    mask = torch.where(torch.rand(NUM_ROWS, INITIAL_CAPACITY, generator=generator) < 0.5, 0.0, -1e9).to(dtype)
    with cache.writing_at(rows_T):
        given = {"position_embeddings": (angles.cos(), angles.sin()), "attention_mask": mask[None, None]}
        made = forward(x.to(dtype), past_key_values=cache, **given)[0]
    return [made, stored.keys, stored.values]


def assert_same(fused: FusedAttention | None, module: Any, **how: int) -> None:
    assert fused is not None and fused.is_current()
    for ours, theirs in zip(outputs(fused, module, **how), outputs(module, module, **how), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_module_is_stood_in_for_where_it_is_reproduced(family):
    module, (is_reproduced, _) = attention_of(family), FAMILIES[family]
    fused = fused_of(module)
    assert (fused is not None) == is_reproduced
    if fused is not None:
        assert_same(fused, module)


def test_in_bf16_it_is_nearer_to_fp32_than_twice_what_the_module_is():
    """With cos and sin in fp32, which FlexOlmo has."""
    exact = attention_of("flex_olmo")
    rounded = copy.deepcopy(exact).bfloat16()
    exact.load_state_dict(rounded.state_dict())
    fused = fused_of(rounded)
    assert fused is not None
    for ours, theirs, truth in zip(
        outputs(fused, rounded), outputs(rounded, rounded), outputs(exact, exact), strict=True
    ):
        assert (ours - truth).norm() <= 2 * (theirs - truth).norm()


def test_a_rotation_of_fewer_features_is_left_to_the_module():
    module = attention_of("minimax_m2")
    assert_same(fused_of(module), module, rotary_dim=HEAD_DIM // 2)


def test_a_limit_that_no_probe_may_reach_is_not_left_out():
    module = attention_of("olmoe")
    module.config.clip_qkv = 100.0
    assert fused_of(module) is None


def test_weights_can_be_written_to_and_trained():
    """Joined, the projections stay the module's own parameters."""
    module = attention_of("qwen2_moe")
    fused = fused_of(module)
    with torch.no_grad():
        module.k_proj.weight.mul_(0.5)
    assert_same(fused, module)
    module.v_proj(torch.ones(1, WIDTH)).sum().backward()
    assert module.v_proj.weight.grad is not None


def test_a_model_made_in_inference_mode_is_joined():
    with torch.inference_mode():
        module = attention_of("mixtral")
    assert_same(fused_of(module), module)
    assert module.q_proj.weight.is_inference()


class Adapted(torch.nn.Module):
    """A projection with an adapter, which shows the weight that it began with."""

    def __init__(self, base: torch.nn.Linear) -> None:
        super().__init__()
        self.base, self.weight, self.bias = base, base.weight, base.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * self.base(x)


def test_an_engine_follows_what_is_done_to_attention():
    model = tiny_model("mixtral", num_layers=1)
    engine, (module,) = Engine.from_model(model, backend="triton"), (layer.self_attn for layer in model.model.layers)
    joined = vars(module)["forward"]
    assert isinstance(joined, FusedAttention) and not engine.target.refresh()
    module.q_proj.weight = torch.nn.Parameter(torch.randn_like(module.q_proj.weight))
    assert engine.target.refresh() and not engine.target.refresh()
    assert vars(module)["forward"] is not joined
    forward = vars(module).pop("forward")
    assert_same(forward, module)
    module.forward = forward
    handle = module.k_proj.register_forward_hook(lambda module, args, output: output + 1)
    assert engine.target.refresh() and "forward" not in vars(module)
    handle.remove()
    module.forward = fused_of(module)
    module.q_proj = Adapted(module.q_proj)
    assert engine.target.refresh() and "forward" not in vars(module)
    engine.close()
