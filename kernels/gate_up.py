"""Gate and up projection of the kept experts with the activation, expert-major.

| array                  | shape      | role                                                                    |
|------------------------|------------|-------------------------------------------------------------------------|
| x                      | [T, D]     | rows of the tree                                                        |
| gate_up                | [E, 2F, D] | of which only experts in the lists are read, each once for all its rows |
| experts, starts, pairs |            | see `lists.py`                                                          |
| hidden                 | [T * K, F] | written: the activation of each surviving pair, in the order of `pairs` |

Grid (2F / columns, A): one program owns a tile of one expert's columns for all rows of that expert. A gate and its up
stand side by side in the tile, so that the thread that has one has the other.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from kernels.contract import contract
from kernels.launch import launch_over_experts
from kernels.lists import ExpertLists
from kernels.tiles import Tile
from kernels.weights import ExpertWeights


@triton.jit
def gate_up_kernel(
    x_ptr, hidden_ptr, experts_ptr, starts_ptr, pairs_ptr,
    w_ptr, stride_we, stride_wn, stride_wc, scale_ptr, stride_se, stride_sn, stride_sc, bias_ptr, stride_be,
    F: tl.constexpr, C: tl.constexpr, K: tl.constexpr, MAX_ROWS: tl.constexpr,
    TILE: tl.constexpr, FORMAT: tl.constexpr, INTERLEAVED: tl.constexpr, GATE: tl.constexpr,
):  # fmt: skip
    """See the head of this file. C is D; MAX_ROWS: 16, 32 or 64, what an expert may have."""
    expert = tl.load(experts_ptr + tl.program_id(1)).to(tl.int64)  # offsets into all experts exceed 32 bits
    if expert < 0:
        return
    first = tl.load(starts_ptr + tl.program_id(1))
    count = tl.load(starts_ptr + tl.program_id(1) + 1) - first
    rows = (x_ptr, hidden_ptr, pairs_ptr, first, count)
    matrix = (w_ptr, stride_we, stride_wn, stride_wc, scale_ptr, stride_se, stride_sn, stride_sc, bias_ptr, stride_be)
    # Most experts have few rows: a small block costs a fraction of the products, and of the traffic to make them.
    if MAX_ROWS == 16 or count <= 16:
        _activate(rows, matrix, expert, F, C, K, 16, TILE, FORMAT, INTERLEAVED, GATE)
    elif MAX_ROWS == 32 or count <= 32:
        _activate(rows, matrix, expert, F, C, K, 32, TILE, FORMAT, INTERLEAVED, GATE)
    else:
        _activate(rows, matrix, expert, F, C, K, 64, TILE, FORMAT, INTERLEAVED, GATE)


@triton.jit
def _activate(
    rows, matrix, expert, F: tl.constexpr, C: tl.constexpr, K: tl.constexpr, M: tl.constexpr,
    TILE: tl.constexpr, FORMAT: tl.constexpr, INTERLEAVED: tl.constexpr, GATE: tl.constexpr,
):  # fmt: skip
    """This program's columns for all rows of its expert, in a block of M."""
    COLUMNS: tl.constexpr = TILE[0]
    x_ptr, hidden_ptr, pairs_ptr, first, count = rows
    place_M = tl.arange(0, M)
    is_row_M = place_M < count
    token_M = tl.load(pairs_ptr + first + place_M, mask=is_row_M, other=0) // K
    column_N = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    row_N = column_N if INTERLEAVED else column_N // 2 + column_N % 2 * F
    x = (x_ptr, token_M * C, is_row_M)
    sums_MN = contract(x, matrix, expert, row_N, column_N < 2 * F, C, TILE[1], FORMAT, M, COLUMNS)
    gate_MF, up_MF = tl.split(tl.reshape(sums_MN, (M, COLUMNS // 2, 2)))
    feature_F = tl.program_id(0) * (COLUMNS // 2) + tl.arange(0, COLUMNS // 2)
    place_MF = (first + place_M)[:, None] * F + feature_F[None, :]
    is_there_MF = is_row_M[:, None] & (feature_F < F)[None, :]
    tl.store(hidden_ptr + place_MF, activation(gate_MF, up_MF, GATE), mask=is_there_MF)


@triton.jit
def activation(gate, up, GATE: tl.constexpr):
    """`weights.Gate` of fp32 values; GATE: (alpha, limit, shift)."""
    ALPHA: tl.constexpr = GATE[0]
    LIMIT: tl.constexpr = GATE[1]
    SHIFT: tl.constexpr = GATE[2]
    gate = tl.minimum(gate, LIMIT)
    return gate * tl.sigmoid(ALPHA * gate) * (tl.minimum(tl.maximum(up, -LIMIT), LIMIT) + SHIFT)


def gate_up(x_TD: Tensor, lists: ExpertLists, weights: ExpertWeights, tile: Tile) -> Tensor:
    """hidden [T * K, F] in x's dtype; only the places of surviving pairs are written."""
    hidden_PF = x_TD.new_empty(len(lists.pairs_P), weights.width)
    launch_over_experts(
        gate_up_kernel,
        (x_TD, hidden_PF),
        lists,
        weights.gate_up,
        tile,
        F=weights.width,
        INTERLEAVED=weights.interleaved,
        GATE=weights.gate.numbers,
    )
    return hidden_PF
