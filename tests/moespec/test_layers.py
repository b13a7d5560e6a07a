"""What a step computes with instead of transformers' modules: experts and dense layers, against plain fp64 formulas."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F

from moespec import Engine, GenerationConfig
from moespec.backends import choose_backend
from moespec.dense import MIN_PACKED_SIZE, PackedLinear, folded_attention, grouped_attention
from moespec.experts import CpuExperts, reference_experts
from moespec.fused import fused_norm, logits_alone
from moespec.moe_layers import find_moe_layers
from moespec.packed_copy import packed, unpacked
from moespec.target import Target
from tests.conftest import VOCAB, tiny_model

NUM_EXPERTS, TOP_K = 12, 3


def experts_module(family: str):
    return Target(tiny_model(family)).moe_layers[0].experts


def brute_force(experts, x_TD, ids_TK, weights_TK):
    """One row and slot at a time, from the parameters themselves, in fp64."""
    out_TD = torch.zeros_like(x_TD, dtype=torch.float64)
    for t in range(ids_TK.shape[0]):
        for k in range(ids_TK.shape[1]):
            if weights_TK[t, k] != 0:
                gate, up = (experts.gate_up_proj[ids_TK[t, k]].double() @ x_TD[t].double()).chunk(2)
                down = experts.down_proj[ids_TK[t, k]].double() @ (F.silu(gate) * up)
                out_TD[t] += weights_TK[t, k].double() * down
    return out_TD


@pytest.mark.parametrize("num_rows", [1, 8, 65])
@pytest.mark.parametrize("backend", [CpuExperts(), reference_experts], ids=["cpu", "reference"])
@torch.inference_mode()
def test_experts_equal_brute_force_and_read_no_dropped_one(family, backend, num_rows):
    experts = experts_module(family)
    generator = torch.Generator().manual_seed(num_rows)
    x_TD = torch.randn(num_rows, 32, generator=generator)
    scores_TE = torch.rand(num_rows, experts.num_experts, generator=generator)
    ids_TK = scores_TE.topk(2, dim=-1).indices
    weights_TK = torch.rand(num_rows, 2, generator=generator)
    weights_TK[ids_TK == 0] = 0.0  # expert 0 is dropped everywhere, the last row loses every expert
    weights_TK[-1] = 0.0
    expected_TD = brute_force(experts, x_TD, ids_TK, weights_TK)
    experts.gate_up_proj[0].fill_(torch.nan)
    out_TD = backend(experts, x_TD, ids_TK, weights_TK)
    torch.testing.assert_close(out_TD.double(), expected_TD, atol=1e-4, rtol=1e-4)
    assert torch.equal(out_TD[-1], torch.zeros(32))


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("size", [(16, 8), (512, MIN_PACKED_SIZE // 512)], ids=["small", "packed"])
def test_a_packed_layer_is_the_layer(size, with_bias):
    weight = torch.randn(*size)
    bias = torch.randn(size[0]) if with_bias else None
    x_ND = torch.randn(5, size[1])
    expected = x_ND.double() @ weight.double().T + (0 if bias is None else bias.double())
    torch.testing.assert_close(PackedLinear(weight, bias)(x_ND).double(), expected, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("attention", [grouped_attention, folded_attention])
def test_masked_attention_is_attention(attention):
    query, key, value = torch.randn(1, 6, 4, 8), torch.randn(1, 2, 9, 8), torch.randn(1, 2, 9, 8)
    mask = torch.zeros(1, 1, 4, 9).masked_fill(torch.rand(1, 1, 4, 9) < 0.4, torch.finfo(torch.float32).min)
    mask[..., 0] = 0
    out, _ = attention(None, query, key, value, mask, scaling=0.3)
    for head in range(6):
        scores = query[0, head].double() @ key[0, head // 3].double().T * 0.3 + mask[0, 0].double()
        expected = scores.softmax(-1) @ value[0, head // 3].double()
        torch.testing.assert_close(out[0, :, head].double(), expected, atol=1e-5, rtol=1e-5)


def test_a_model_whose_weights_were_written_to_is_followed():
    """By an engine whose steps run packed layers: OLMoE's queries are normalised across heads."""
    model = tiny_model("olmoe")
    width = model.config.hidden_size
    model.lm_head = torch.nn.Linear(width, MIN_PACKED_SIZE // width, bias=False)
    engine = Engine.from_model(model)
    ids, generation = [3, 1, 4, 1, 5], GenerationConfig(max_new_tokens=8, ignore_eos=True)
    for seed in range(2):
        torch.manual_seed(seed)
        with torch.no_grad():
            model.lm_head.weight.copy_(torch.randn_like(model.lm_head.weight))
            model.lm_head.weight[VOCAB:] = 0  # words that it cannot read again
        expected = model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=8)[0, len(ids) :].tolist()
        assert [*engine.generate(ids, generation)][-1].summary.token_ids == expected


def test_close_gives_every_layer_its_forward_back():
    model = tiny_model("olmoe")
    model.lm_head = torch.nn.Linear(32, MIN_PACKED_SIZE // 32, bias=False)
    target = Target(model)
    assert "forward" in vars(model.lm_head)
    target.close()
    assert not any("forward" in vars(module) for module in model.modules())


def test_what_is_packed_for_one_copy_comes_apart_again():
    tensors = [
        torch.tensor([True, False, True]),  # three bytes: what follows must begin at its own alignment
        torch.arange(5),
        torch.randn(2, 3),
        torch.randn(4).bfloat16(),
        torch.tensor(7),
        torch.empty(0, 4),
    ]
    for actual, expected in zip(unpacked(packed(tensors), tensors), tensors, strict=True):
        assert actual.dtype == expected.dtype
        assert torch.equal(actual, expected)


@pytest.mark.parametrize(
    ("wanted", "device", "sentence"),
    [
        ("fast", "cpu", "backend='fast' is not one of auto, reference, cpu, triton."),
        ("triton", "cpu", "backend='triton' cannot run: cpu has no Triton kernels."),
        ("cpu", "meta", "backend='cpu' cannot run: the model is on meta."),
    ],
)
def test_a_backend_that_cannot_run_is_refused(wanted, device, sentence):
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
        choose_backend(wanted, torch.device(device), [experts_module("olmoe")])


@pytest.mark.parametrize(("wanted", "name"), [("auto", "cpu"), ("cpu", "cpu"), ("reference", "reference")])
def test_a_backend_says_why_it_runs(family, wanted, name):
    engine = Engine.from_model(tiny_model(family), backend=wanted)
    assert engine.info.backend == name
    assert engine.info.backend_reason
    expected = tiny_model(family).generate(torch.tensor([[3, 1, 4]]), do_sample=False, max_new_tokens=6)[0, 3:].tolist()
    generation = GenerationConfig(max_new_tokens=6, ignore_eos=True)
    assert [*engine.generate([3, 1, 4], generation)][-1].summary.token_ids == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.inference_mode()
def test_fused_norms_and_routers_are_the_modules(family, dtype):
    """Inside a step; outside it runs the module's own code."""
    model = tiny_model(family).to(dtype)
    norms = [module for module in model.modules() if type(module).__name__.endswith("RMSNorm")]
    for norm in norms:
        torch.nn.init.uniform_(norm.weight, 0.5, 1.5)
        x = torch.randn(2, 5, len(norm.weight)).to(dtype)
        expected = norm(x)
        inside, outside = fused_norm(norm, lambda: True), fused_norm(norm, lambda: False)
        error = (inside(x) - expected).abs().max()
        assert error <= 8 * torch.finfo(dtype).eps * expected.abs().max()
        assert torch.equal(outside(x), expected)
    router = find_moe_layers(model)[0].router
    x_TD = torch.randn(5, model.config.hidden_size).to(dtype)
    logits_TE, weights_TK, ids_TK = router(x_TD)
    inside, outside = (logits_alone(router, lambda wants=wants: wants) for wants in (True, False))
    made = inside(x_TD)
    torch.testing.assert_close(made[0], logits_TE)
    assert (made[1].shape, made[1].dtype, made[2].shape) == (weights_TK.shape, weights_TK.dtype, ids_TK.shape)
    assert all(
        torch.equal(ours, theirs) for ours, theirs in zip(outside(x_TD), (logits_TE, weights_TK, ids_TK), strict=True)
    )


def test_what_only_looks_like_a_norm_or_a_linear_router_is_left_alone():
    class CentredRMSNorm(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.eps = torch.nn.Parameter(torch.ones(16)), 1e-6

        def forward(self, x):
            return F.layer_norm(x, (16,), self.weight, None, self.eps)

    class ScaledRouter(torch.nn.Linear):
        def forward(self, x):
            logits = super().forward(x) / 2
            return logits, *logits.topk(2)

    assert fused_norm(CentredRMSNorm(), lambda: True) is None
    assert fused_norm(torch.nn.LayerNorm(16), lambda: True) is None
    assert logits_alone(ScaledRouter(16, 4), lambda: True) is None
