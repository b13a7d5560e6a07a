"""The experts of a single row, as in plain decoding: matrix times vector, two launches, no lists.

| array   | shape      | role                                                            |
|---------|------------|-----------------------------------------------------------------|
| x       | [1, D]     | the row                                                         |
| ids     | [1, K]     | its experts, weights [1, K] their routing weights; 0 is dropped |
| gate_up | [E, 2F, D] | rows of the K experts are read, once                            |
| down    | [E, D, F]  | the same                                                        |
| hidden  | [K, F]     | written: activations by slot                                    |
| out     | [1, D]     | written                                                         |

`gate_up_row_kernel` has grid (2F / columns, K): a program owns a tile of one expert's columns. `down_row_kernel` has
grid (D / columns): a program owns output features and goes through the experts slot by slot, so that nothing is left to
add up. With one row a matrix unit would multiply zeros; sums of products keep every load as wide as it gets.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from kernels.gate_up import activation
from kernels.launch import matrix_arguments, number_format
from kernels.tiles import Tile
from kernels.weights import ExpertMatrix, ExpertWeights


@triton.jit
def contract_row(
    x_ptr, matrix, expert, row_N, mask_N, C: tl.constexpr, DEPTH: tl.constexpr, FORMAT: tl.constexpr, N: tl.constexpr
):
    """[N] fp32: w [N, C] @ x [C] + bias, of one expert; as `contract`'s, for one row."""
    SCALE_ROWS: tl.constexpr = FORMAT[0]
    SCALE_COLUMNS: tl.constexpr = FORMAT[1]
    IS_INT4: tl.constexpr = FORMAT[2]
    HAS_BIAS: tl.constexpr = FORMAT[3]
    NUM_LOADED: tl.constexpr = DEPTH // 2 if IS_INT4 else DEPTH
    w_ptr, stride_we, stride_wn, stride_wc, scale_ptr, stride_se, stride_sn, stride_sc, bias_ptr, stride_be = matrix
    depth = tl.arange(0, NUM_LOADED)
    w_ptrs = w_ptr + expert * stride_we + row_N[:, None] * stride_wn + depth[None, :] * stride_wc
    scale_ptrs = scale_ptr + expert * stride_se
    if SCALE_ROWS > 0:
        scale_ptrs += row_N // SCALE_ROWS * stride_sn
    acc_N = tl.zeros((N,), tl.float32)
    for start in range(0, C, DEPTH):
        is_there = start + depth < C
        w_mask = mask_N[:, None] & is_there[None, :]
        x_C = tl.load(x_ptr + start + depth, mask=is_there, other=0.0).to(tl.float32)
        w_NC = tl.load(w_ptrs, mask=w_mask, other=0.0, eviction_policy="evict_first")
        w_ptrs += NUM_LOADED * stride_wc
        if IS_INT4:
            lower_NC, upper_NC = (w_NC & 15).to(tl.int8) - 8, (w_NC >> 4).to(tl.int8) - 8
            upper_C = tl.load(x_ptr + start + NUM_LOADED + depth).to(tl.float32)
            part_N = tl.sum(lower_NC.to(tl.float32) * x_C[None, :] + upper_NC.to(tl.float32) * upper_C[None, :], axis=1)
        else:
            part_N = tl.sum(w_NC.to(tl.float32) * x_C[None, :], axis=1)
        if SCALE_ROWS > 0:
            part_N = part_N * tl.load(scale_ptrs + start // SCALE_COLUMNS * stride_sc, mask=mask_N, other=0.0)
        acc_N += part_N
    if HAS_BIAS:
        acc_N += tl.load(bias_ptr + expert * stride_be + row_N, mask=mask_N, other=0.0).to(tl.float32)
    return acc_N


@triton.jit
def gate_up_row_kernel(
    x_ptr, ids_ptr, weights_ptr, hidden_ptr,
    w_ptr, stride_we, stride_wn, stride_wc, scale_ptr, stride_se, stride_sn, stride_sc, bias_ptr, stride_be,
    F: tl.constexpr, C: tl.constexpr, TILE: tl.constexpr, FORMAT: tl.constexpr,
    INTERLEAVED: tl.constexpr, GATE: tl.constexpr,
):  # fmt: skip
    """See the head of this file. C is D."""
    COLUMNS: tl.constexpr = TILE[0]
    slot = tl.program_id(1)
    if tl.load(weights_ptr + slot) == 0:
        return
    expert = tl.load(ids_ptr + slot)
    matrix = (w_ptr, stride_we, stride_wn, stride_wc, scale_ptr, stride_se, stride_sn, stride_sc, bias_ptr, stride_be)
    column_N = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    row_N = column_N if INTERLEAVED else column_N // 2 + column_N % 2 * F
    sums_N = contract_row(x_ptr, matrix, expert, row_N, column_N < 2 * F, C, TILE[1], FORMAT, COLUMNS)
    gate_F, up_F = tl.split(tl.reshape(sums_N, (COLUMNS // 2, 2)))
    feature_F = tl.program_id(0) * (COLUMNS // 2) + tl.arange(0, COLUMNS // 2)
    tl.store(hidden_ptr + slot * F + feature_F, activation(gate_F, up_F, GATE), mask=feature_F < F)


@triton.jit
def down_row_kernel(
    hidden_ptr, ids_ptr, weights_ptr, out_ptr,
    w_ptr, stride_we, stride_wn, stride_wc, scale_ptr, stride_se, stride_sn, stride_sc, bias_ptr, stride_be,
    D: tl.constexpr, C: tl.constexpr, K: tl.constexpr, TILE: tl.constexpr, FORMAT: tl.constexpr,
):  # fmt: skip
    """See the head of this file. C is F."""
    COLUMNS: tl.constexpr = TILE[0]
    matrix = (w_ptr, stride_we, stride_wn, stride_wc, scale_ptr, stride_se, stride_sn, stride_sc, bias_ptr, stride_be)
    row_N = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    out_N = tl.zeros((COLUMNS,), tl.float32)
    for slot in range(K):
        weight = tl.load(weights_ptr + slot).to(tl.float32)
        if weight != 0:
            expert = tl.load(ids_ptr + slot)
            x_ptr = hidden_ptr + slot * C
            out_N += weight * contract_row(x_ptr, matrix, expert, row_N, row_N < D, C, TILE[1], FORMAT, COLUMNS)
    tl.store(out_ptr + row_N, out_N, mask=row_N < D)


def one_row(
    x_1D: Tensor, ids_1K: Tensor, weights_1K: Tensor, weights: ExpertWeights, tiles: tuple[Tile, Tile]
) -> Tensor:
    """out [1, D] of x [1, D], ids int64 and routing weights [1, K]; tiles: of gate_up and of down."""
    top_k = ids_1K.shape[1]
    hidden_KF = x_1D.new_empty(top_k, weights.width)
    out_1D = x_1D.new_empty(1, weights.hidden_size)
    gate_tile, down_tile = tiles
    gate_up_row_kernel[triton.cdiv(2 * weights.width, gate_tile.columns), top_k](
        *(x_1D, ids_1K, weights_1K, hidden_KF, *matrix_arguments(weights.gate_up)),
        F=weights.width,
        INTERLEAVED=weights.interleaved,
        GATE=weights.gate.numbers,
        **_settings(weights.gate_up, gate_tile, x_1D),
    )
    down_row_kernel[(triton.cdiv(weights.hidden_size, down_tile.columns),)](
        *(hidden_KF, ids_1K, weights_1K, out_1D, *matrix_arguments(weights.down)),
        D=weights.hidden_size,
        K=top_k,
        **_settings(weights.down, down_tile, x_1D),
    )
    return out_1D


def _settings(matrix: ExpertMatrix, tile: Tile, x_1D: Tensor) -> dict[str, Any]:
    return {
        "C": matrix.num_inputs,
        "TILE": (tile.columns, tile.depth),
        "FORMAT": number_format(matrix, x_1D.dtype),
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
    }
