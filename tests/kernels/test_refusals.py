"""What the kernels do not take is refused before a launch, in a sentence with the argument and its range."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from unittest import mock

import pytest
import torch
from torch import Tensor

from kernels.checks import MAX_EXPERTS, MAX_ROWS
from kernels.experts import moe_experts, unsupported_reason
from kernels.keep_rows import address_table, keep_rows
from kernels.lists import group
from kernels.select import Rule, Settings, select
from kernels.shapes import Layer
from kernels.weights import ExpertMatrix, ExpertWeights, quantize, quantize_int4
from tests.kernels.cases import DEVICE, random

T, E, K, D, F = 5, 6, 2, 32, 16
META = torch.device("meta")


@pytest.fixture(autouse=True)
def no_launch():
    """Whatever is refused must be refused before this."""
    with mock.patch(
        "triton.runtime.jit.KernelInterface.__getitem__", side_effect=AssertionError("a kernel was launched")
    ):
        yield


def x(num_rows: int = T, width: int = D, dtype: torch.dtype = torch.float32) -> Tensor:
    return random(num_rows, width, seed=0).to(dtype)


def ids(num_rows: int = T, top_k: int = K) -> Tensor:
    return torch.zeros(num_rows, top_k, dtype=torch.int64, device=DEVICE)


def weights(num_rows: int = T, top_k: int = K) -> Tensor:
    return torch.ones(num_rows, top_k, device=DEVICE)


def experts(num_experts: int = E, dtype: torch.dtype = torch.float32) -> ExpertWeights:
    gate_up, down = torch.zeros(num_experts, 2 * F, D), torch.zeros(num_experts, D, F)
    return ExpertWeights(*(ExpertMatrix(part.to(DEVICE, dtype)) for part in (gate_up, down)))


def choose(logits: Tensor | None = None, row_weights: Tensor | None = None, top_k: int = K, **others) -> None:
    logits = random(T, E, seed=1) if logits is None else logits
    row_weights = torch.ones(len(logits), device=DEVICE) if row_weights is None else row_weights
    settings = others.get("settings", Settings.on(DEVICE, T, E))
    select(logits, row_weights, settings, top_k, Rule.SOFTMAX, others.get("dtype", torch.float32))


def matrix(**parts) -> ExpertMatrix:
    """An int8 matrix [2, 32, 64] with one scale for a row, but for what is named."""
    fine = quantize(torch.ones(2, 32, 64, device=DEVICE), torch.int8)
    return replace(fine, **parts)


def mixed_devices() -> ExpertWeights:
    whole = experts()
    return replace(whole, down=ExpertMatrix(whole.down.values.to(META)))


bias_on_meta = ExpertMatrix(torch.zeros(E, 2 * F, D, device=DEVICE), bias=torch.zeros(E, 2 * F, device=META))
REFUSED: dict[str, tuple[Callable[[], object], str]] = {
    "65 rows": (
        lambda: moe_experts(x(MAX_ROWS + 1), ids(MAX_ROWS + 1), weights(MAX_ROWS + 1), experts()),
        "65 rows are outside 1 to 64",
    ),
    "no rows": (lambda: moe_experts(x(0), ids(0), weights(0), experts()), "0 rows are outside 1 to 64"),
    "257 experts": (
        lambda: moe_experts(x(), ids(), weights(), experts(MAX_EXPERTS + 1)),
        "257 experts are outside 1 to 256",
    ),
    "k > E": (lambda: moe_experts(x(), ids(T, 7), weights(T, 7), experts()), "top-k 7 is outside 1 to 6"),
    "no k": (lambda: moe_experts(x(), ids(T, 0), weights(T, 0), experts()), "top-k 0 is outside 1 to 6"),
    "ids of another shape": (
        lambda: moe_experts(x(), ids(T, 3), weights(), experts()),
        "ids (5, 3) and weights (5, 2) are not both [T, K]",
    ),
    "flat ids": (lambda: group(ids()[0], weights()[0], E), "are not both [T, K]"),
    "ids of 32 bits": (lambda: group(ids().int(), weights(), E), "ids of torch.int32 are not int64"),
    "whole weights": (lambda: group(ids(), ids(), E), "weights of torch.int64 are not one of torch.bfloat16"),
    "x of another width": (lambda: moe_experts(x(T, D + 1), ids(), weights(), experts()), "x (5, 33) is not [5, 32]"),
    "x of other rows": (lambda: moe_experts(x(T + 1), ids(), weights(), experts()), "x (6, 32) is not [5, 32]"),
    "x of fp64": (lambda: moe_experts(x(dtype=torch.float64), ids(), weights(), experts()), "x of torch.float64"),
    "x of another type": (
        lambda: moe_experts(x(dtype=torch.float16), ids(), weights(), experts()),
        "gate_up of torch.float32 is not of x's type, torch.float16",
    ),
    "down of another type": (
        lambda: moe_experts(x(), ids(), weights(), replace(experts(), down=experts(dtype=torch.float16).down)),
        "down of torch.float16 is not of x's type, torch.float32",
    ),
    "ids elsewhere": (lambda: moe_experts(x(), ids().to(META), weights(), experts()), "ids on meta: these kernels"),
    "x elsewhere": (lambda: moe_experts(x().to(META), ids(), weights(), experts()), "x on meta: these kernels"),
    "down elsewhere": (lambda: moe_experts(x(), ids(), weights(), mixed_devices()), "down values on meta"),
    "a bias elsewhere": (
        lambda: moe_experts(x(), ids(), weights(), replace(experts(), gate_up=bias_on_meta)),
        "gate_up bias on meta",
    ),
    "65 rows to choose for": (lambda: choose(random(65, E, seed=1)), "65 rows are outside 1 to 64"),
    "257 experts to choose from": (lambda: choose(random(T, 257, seed=1)), "257 experts are outside 1 to 256"),
    "more to choose than there are": (lambda: choose(top_k=7), "top-k 7 is outside 1 to 6"),
    "one row of logits": (lambda: choose(random(E, seed=1)), "logits (6,) of strides (1,) are not [T, E]"),
    "logits by column": (lambda: choose(random(E, T, seed=1).T), "logits (5, 6) of strides (1, 5) are not [T, E]"),
    "logits of fp64": (lambda: choose(random(T, E, seed=1).double()), "logits of torch.float64 are not one of"),
    "weights of fp8": (lambda: choose(dtype=torch.float8_e4m3fn), "weights of torch.float8_e4m3fn are not one of"),
    "row weights of others": (lambda: choose(row_weights=torch.ones(4, device=DEVICE)), "row weights (4,)"),
    "row weights of bf16": (
        lambda: choose(row_weights=torch.ones(T, device=DEVICE, dtype=torch.bfloat16)),
        "row weights (5,) of torch.bfloat16 are not [5] of float32",
    ),
    "settings elsewhere": (lambda: choose(settings=Settings.on(META, T, E)), "settings on meta"),
    "no budget of 0": (lambda: Settings.on(DEVICE, T, 0), "budget=0 is not allowed: use 1 or more"),
    "a coverage of more than all": (lambda: Settings.on(DEVICE, T, E, coverage=1.5), "coverage=1.5 is not allowed"),
    "weights of two dimensions": (lambda: ExpertMatrix(torch.zeros(4, 4)), "are not [E, N, C]"),
    "weights in pieces": (lambda: ExpertMatrix(torch.zeros(2, 8, 8)[:, ::2, ::2]), "with one stride of 1"),
    "weights of whole numbers": (
        lambda: matrix(values=torch.zeros(2, 32, 64, dtype=torch.int32)),
        "weights of torch.int32 are not one of",
    ),
    "int8 without a scale": (lambda: matrix(scale=None), "weights of torch.int8 need a scale"),
    "int8 without a block": (lambda: matrix(block=(0, 0)), "weights of torch.int8 need a scale, and the block"),
    "floats with a scale": (lambda: matrix(values=torch.zeros(2, 32, 64)), "weights of torch.float32 take no scale"),
    "scales of other blocks": (lambda: matrix(block=(2, 64)), "scales (2, 32, 1) of torch.float32 are not (2, 16, 1)"),
    "scales of fp16": (lambda: matrix(scale=torch.ones(2, 32, 1).half()), "are not (2, 32, 1) of float32"),
    "blocks of 24 columns": (lambda: matrix(block=(1, 24)), "block=(1, 24) has columns that are no multiple of 16"),
    "int4 of other groups": (
        lambda: replace(quantize_int4(torch.ones(1, 16, 128)), block=(1, 64)),
        "block=(1, 64) of int4 weights is not one of 128 columns",
    ),
    "int4 of 96 columns": (lambda: quantize_int4(torch.ones(1, 16, 96)), "96 columns are not in groups of 128"),
    "a bias of another size": (lambda: matrix(bias=torch.zeros(2, 31)), "bias (2, 31) is not (2, 32)"),
    "a bias in pieces": (lambda: matrix(bias=torch.zeros(2, 64)[:, ::2]), "[E, N] in one piece"),
    "quantized to bf16": (lambda: quantize(torch.ones(1, 2, 16), torch.bfloat16), "dtype=torch.bfloat16 is not one of"),
    "halves of different layers": (
        lambda: ExpertWeights(experts().gate_up, ExpertMatrix(torch.zeros(E, D, F + 1))),
        "gate_up (6, 32, 32) and down (6, 32, 17) do not belong together",
    ),
    "caches of different sizes": (
        lambda: address_table([torch.zeros(1, 2, 8, 4, device=DEVICE), torch.zeros(1, 2, 9, 4, device=DEVICE)]),
        "caches of different shapes",
    ),
    "rows that go down": (
        lambda: keep_rows(torch.zeros(1), torch.zeros(1, 2, 8, 4, device=DEVICE), 2, [1, 0]),
        "rows [1, 0] behind 2 are not increasing",
    ),
    "rows behind the last": (
        lambda: keep_rows(torch.zeros(1), torch.zeros(1, 2, 8, 4, device=DEVICE), 2, [0, 6]),
        "within a capacity of 8",
    ),
}


@pytest.mark.parametrize(("call", "sentence"), REFUSED.values(), ids=REFUSED.keys())
def test_it_is_refused_in_a_sentence(call, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        call()


def test_a_row_weight_that_is_not_named_is_not_taken():
    with pytest.raises(TypeError, match="truncate"):
        Settings.on(DEVICE, T, E, truncate=True)


@pytest.mark.parametrize(
    ("number_format", "num_experts", "capability", "reason"),
    [
        ("bf16", E, (8, 0), None),
        ("bf16", E, (7, 5), "compute capability 7.5 is below 8.0"),
        ("fp8", E, (8, 6), "compute capability 8.6 has no fp8: it comes with 8.9"),
        ("fp8", E, (8, 9), None),
        ("bf16", MAX_EXPERTS + 1, (9, 0), "257 experts are more than the 256"),
    ],
)
def test_what_a_card_cannot_do_is_said(number_format, num_experts, capability, reason, monkeypatch):
    monkeypatch.setattr("kernels.experts.IS_INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    layer = Layer(D, F, num_experts, K).random_weights(number_format, DEVICE)
    found = unsupported_reason(layer, torch.device("cuda"))
    assert found is None if reason is None else found is not None and reason in found
    assert unsupported_reason(layer, torch.device("cpu")) is not None


def test_layers_that_fit_are_not_refused():
    """The smallest change to each of the above is taken: up to the launch."""
    with pytest.raises(AssertionError, match="a kernel was launched"):
        moe_experts(x(MAX_ROWS), ids(MAX_ROWS), weights(MAX_ROWS), experts(MAX_EXPERTS))
    with pytest.raises(AssertionError, match="a kernel was launched"):
        choose(random(MAX_ROWS, MAX_EXPERTS, seed=1), top_k=MAX_EXPERTS)
    assert Layer(D, F, E, K).has_format("bf16")
