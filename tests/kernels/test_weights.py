"""Number formats: what rounding may cost, by theory; layouts and activations as they are written down."""

from __future__ import annotations

import pytest
import torch

from kernels.shapes import FORMATS, LAYERS, Layer
from kernels.weights import INT4_GROUP, Gate, dequantized, quantize, quantize_int4
from moespec.cost import WORKED_SHAPES
from tests.kernels.cases import DEVICE, random

# Blocks of (rows, columns): a row each; fp8's usual; no divisors of the sizes.
BLOCKS = [None, (128, 128), (20, 48)]
SIZE = (3, 50, 160)


def largest_of_block(values_ENC: torch.Tensor, block: tuple[int, int] | None) -> torch.Tensor:
    """The largest magnitude in each entry's block, entry by entry."""
    rows, columns = block or (1, values_ENC.shape[2])
    largest = torch.empty_like(values_ENC)
    for row in range(0, values_ENC.shape[1], rows):
        for column in range(0, values_ENC.shape[2], columns):
            part = slice(None), slice(row, row + rows), slice(column, column + columns)
            largest[part] = values_ENC[part].abs().amax(dim=(1, 2), keepdim=True)
    return largest


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_int8_is_off_by_half_a_step(block):
    values_ENC = random(*SIZE, seed=0)
    matrix = quantize(values_ENC, torch.int8, block)
    off = (dequantized(matrix, torch.float64) - values_ENC.double()).abs()
    assert (off <= largest_of_block(values_ENC, block).double() / 127 / 2 * 1.0001).all()
    assert int(matrix.values.abs().max()) == 127  # the whole range is used


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_fp8_is_off_by_half_of_its_last_bit(block):
    """e4m3: three bits behind the first, down to 2**-6; below, steps of 2**-9."""
    values_ENC = random(*SIZE, seed=1)
    matrix = quantize(values_ENC, torch.float8_e4m3fn, block)
    off = (dequantized(matrix, torch.float64) - values_ENC.double()).abs()
    step = largest_of_block(values_ENC, block).double() / 448 * 2**-9
    assert (off <= torch.maximum(values_ENC.abs().double() / 16, step / 2) * 1.0001).all()
    assert float(matrix.values.float().abs().max()) == 448


def test_int4_is_off_by_half_a_step_and_lies_as_written():
    values_ENC = random(2, 6, 2 * INT4_GROUP, seed=2)
    matrix = quantize_int4(values_ENC)
    restored = dequantized(matrix, torch.float64)
    off = (restored - values_ENC.double()).abs()
    assert (off <= largest_of_block(values_ENC, (1, INT4_GROUP)).double() / 7 / 2 * 1.0001).all()
    assert matrix.values.shape == (2, 6, INT4_GROUP) and matrix.num_inputs == 2 * INT4_GROUP
    # Byte j of a group: column j in its lower half, column j + 64 in its upper, each plus 8.
    codes = (restored / matrix.scale.double().repeat_interleave(INT4_GROUP, dim=2)).round().to(torch.int64) + 8
    half = INT4_GROUP // 2
    for group in range(2):
        columns = codes[:, :, group * INT4_GROUP : (group + 1) * INT4_GROUP]
        packed = columns[..., :half] + 16 * columns[..., half:]
        assert torch.equal(matrix.values[:, :, group * half : (group + 1) * half].to(torch.int64), packed)


@pytest.mark.parametrize("quantized", [*list(FORMATS.values())[1:]], ids=list(FORMATS)[1:])
def test_what_is_exact_stays_exact(quantized):
    """Zeros, and blocks of one magnitude: no NaN from an empty block, no drift."""
    values_ENC = torch.zeros(1, 3, INT4_GROUP, device=DEVICE)
    values_ENC[0, 1] = 0.5
    values_ENC[0, 1, ::2] = -0.5
    torch.testing.assert_close(dequantized(quantized(values_ENC), torch.float32), values_ENC, atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize("number_format", FORMATS)
def test_quantized_rows_lie_in_one_piece_whatever_the_layout_was(number_format):
    """So that loads are wide; floats stay views of the checkpoint."""
    transposed = Layer(256, 128, 2, 1, is_transposed=True).random_weights(number_format, DEVICE)
    is_view = number_format == "bf16"
    assert all(part.values.is_contiguous() != is_view for part in (transposed.gate_up, transposed.down))


def test_bytes_of_an_expert_are_all_that_is_read():
    layer = Layer(256, 128, 2, 1, has_bias=True)
    num_values, num_biases = 3 * 256 * 128, 2 * 128 + 256
    expected = {
        "bf16": 2 * num_values,
        "int8": num_values + 4 * (2 * 128 + 256),
        "fp8": num_values + 4 * (2 * 128 + 256),
        "fp8 128x128": num_values + 4 * (2 * 2 + 2),
        "int4": num_values // 2 + 4 * num_values // INT4_GROUP,
    }
    for number_format, num_bytes in expected.items():
        weights = layer.random_weights(number_format, DEVICE)
        assert weights.bytes_per_expert == num_bytes + 2 * num_biases


def test_gates_are_the_formulas():
    gate, up = random(64, seed=3).double() * 9, random(64, seed=4).double() * 9
    torch.testing.assert_close(Gate()(gate, up), torch.nn.functional.silu(gate) * up)
    clamped, bounded = gate.clamp(max=7), up.clamp(-7, 7)
    torch.testing.assert_close(
        Gate(1.702, 7.0, 1.0)(gate, up), clamped * torch.sigmoid(1.702 * clamped) * (bounded + 1)
    )


def test_layers_are_those_of_the_cost_model():
    assert LAYERS.keys() == WORKED_SHAPES.keys()
    for name, shape in WORKED_SHAPES.items():
        sizes = shape.hidden_size, shape.expert_ffn_size, shape.num_experts, shape.top_k
        layer = LAYERS[name]
        assert (layer.hidden_size, layer.width, layer.num_experts, layer.top_k) == sizes
