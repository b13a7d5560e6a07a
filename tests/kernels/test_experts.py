"""The expert kernels against fp64: how far they may be off, what they never read, what never changes."""

from __future__ import annotations

from unittest import mock

import pytest
import torch

from kernels import reference
from kernels.experts import moe_experts
from kernels.lists import group
from kernels.shapes import Layer
from kernels.weights import ExpertWeights, quantize
from tests.kernels.cases import CASES, Case, assert_as_good_as_torch, check, check_nan_is_not_read, inputs

FLOATS = [torch.float32, torch.float16, torch.bfloat16]
QUANTIZED = [
    Case("one row", 1, Layer(160, 144, 3, 2), num_draws=2),
    Case("the last blocks of rows and columns not full", 5, Layer(160, 144, 3, 2)),
    Case("64 rows, biases, in turns", 64, Layer(160, 144, 2, 1, is_transposed=True, has_bias=True)),
]
INT4 = [
    Case("one row", 1, Layer(128, 128, 3, 2), num_draws=2),
    Case("two groups in a row", 5, Layer(256, 128, 3, 2)),
    Case("64 rows, biases, in turns", 64, Layer(128, 256, 2, 1, is_transposed=True, has_bias=True)),
]
WITHOUT = [case for case in CASES if case.reason.startswith(("one row, an", "an expert with", "padded", "transposed"))]


def by_reason(case: Case) -> str:
    return case.reason


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("case", CASES, ids=by_reason)
def test_floats_are_as_good_as_torchs(case, dtype):
    check(case, "bf16", dtype)


@pytest.mark.parametrize("number_format", ["int8", "fp8", "fp8 128x128"])
@pytest.mark.parametrize("case", QUANTIZED, ids=by_reason)
def test_bytes_are_as_good_as_torch_on_the_same_weights(case, number_format):
    check(case, number_format, torch.bfloat16)


@pytest.mark.parametrize("case", INT4, ids=by_reason)
def test_int4_is_as_good_as_torch_on_the_same_weights(case):
    check(case, "int4", torch.bfloat16)


@pytest.mark.parametrize("number_format", ["int8", "int4"])
def test_quantized_weights_serve_fp32_rows(number_format):
    check(INT4[1], number_format, torch.float32)


@pytest.mark.parametrize("num_rows", [1, 5])
def test_blocks_may_have_any_multiple_of_16_columns(num_rows):
    """Of 48, a turn takes 16: no power of two above divides them."""
    case = Case("", num_rows, Layer(160, 96, 3, 2))
    *rest, weights = inputs(case, "bf16", torch.float32)
    blocks = [quantize(part.values, torch.int8, (20, 48)) for part in (weights.gate_up, weights.down)]
    arguments = (*rest, ExpertWeights(*blocks))
    assert_as_good_as_torch([moe_experts(*arguments)], [arguments])


@pytest.mark.parametrize("number_format", ["bf16", "int8"])
@pytest.mark.parametrize("case", WITHOUT, ids=by_reason)
def test_nan_outside_the_plan_changes_no_bit(case, number_format):
    check_nan_is_not_read(case, number_format)


def test_one_row_computes_nothing_of_a_dropped_expert():
    """Its activations stay what they were: NaN, as all memory that is not written here."""
    x_1D, ids_1K, weights_1K, weights = inputs(Case("", 1, Layer(32, 16, 4, 3)), "bf16", torch.bfloat16)
    weights_1K[0, 1] = 0
    with mock.patch("kernels.experts.down") as down:
        moe_experts(x_1D, ids_1K, weights_1K, weights)
    hidden_KF = down.call_args.args[0]
    # Surviving pairs come first; where the third would stand, nothing was written.
    assert hidden_KF.isnan().all(dim=1).tolist() == [False, False, True]


@pytest.mark.parametrize("case", WITHOUT, ids=by_reason)
def test_the_same_input_gives_the_same_bits(case):
    arguments = inputs(case, "bf16", torch.bfloat16)
    assert torch.equal(moe_experts(*arguments), moe_experts(*arguments))


def test_rows_do_not_see_their_neighbours():
    """An expert's rows share products, not numbers: the others' rows and weights may be anything."""
    x_TD, ids_TK, weights_TK, weights = inputs(Case("", 20, Layer(32, 16, 3, 2)), "bf16", torch.bfloat16)
    expected_TD = moe_experts(x_TD, ids_TK, weights_TK, weights)
    x_TD[1:] *= -3
    weights_TK[1:] += 1
    assert torch.equal(moe_experts(x_TD, ids_TK, weights_TK, weights)[0], expected_TD[0])


def test_lists_may_come_from_elsewhere():
    x_TD, ids_TK, weights_TK, weights = inputs(Case("", 5, Layer(32, 16, 4, 2)), "bf16", torch.bfloat16)
    lists = group(ids_TK, weights_TK, weights.num_experts)
    given_TD = moe_experts(x_TD, ids_TK, weights_TK, weights, lists)
    assert torch.equal(given_TD, moe_experts(x_TD, ids_TK, weights_TK, weights))


@pytest.mark.parametrize("num_rows", [1, 5])
def test_any_strides_of_x_ids_and_weights(num_rows):
    x_TD, ids_TK, weights_TK, weights = inputs(Case("", num_rows, Layer(32, 16, 4, 2)), "bf16", torch.bfloat16)
    spread = [torch.stack([part, part], dim=2)[..., 0] for part in (x_TD, ids_TK, weights_TK)]
    assert not any(part.is_contiguous() for part in spread)
    assert torch.equal(moe_experts(*spread, weights), moe_experts(x_TD, ids_TK, weights_TK, weights))


def test_the_reference_is_the_formula():
    """One row and slot at a time, from the sizes in words."""
    case = Case("", 4, Layer(6, 5, 3, 2, has_bias=True))
    x_TD, ids_TK, weights_TK, weights = inputs(case, "bf16", torch.bfloat16)
    expected_TD = torch.zeros_like(x_TD, dtype=torch.float64)
    for row in range(4):
        for expert, weight in zip(ids_TK[row].tolist(), weights_TK[row].double().tolist(), strict=True):
            both = weights.gate_up.values[expert].double() @ x_TD[row].double() + weights.gate_up.bias[expert].double()
            hidden = torch.nn.functional.silu(both[:5]) * both[5:]
            expected_TD[row] += weight * (
                weights.down.values[expert].double() @ hidden + weights.down.bias[expert].double()
            )
    torch.testing.assert_close(reference.experts(x_TD.double(), ids_TK, weights_TK.double(), weights), expected_TD)
