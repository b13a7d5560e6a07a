"""Down projection of the kept experts, their routing weights, and the sum over each row's experts.

| array                  | shape      | role                                                                    |
|------------------------|------------|-------------------------------------------------------------------------|
| hidden                 | [T * K, F] | activations, in the order of `pairs`                                    |
| down                   | [E, D, F]  | of which only experts in the lists are read, each once for all its rows |
| experts, starts, pairs |            | see `lists.py`                                                          |
| weights                | [T, K]     | routing weights, 0 for a pair that was dropped                          |
| parts                  | [T * K, D] | written, fp32: weight times the expert's output, at the pair's own place |
| out                    | [T, D]     | written: the sum of each row's surviving parts                          |

`down_kernel` has grid (D / columns, A), as gate_up's. `combine_kernel` has grid (T, D / block): it adds a row's parts
slot by slot in fp32, always in that order, so that the same input gives the same bits. There are no atomics.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.contract import contract
from kernels.launch import launch_over_experts
from kernels.lists import ExpertLists
from kernels.tiles import Tile
from kernels.weights import ExpertWeights

MAX_COMBINED = 512  # features of one program: enough programs even for one row


@triton.jit
def down_kernel(
    hidden_ptr, weights_ptr, parts_ptr, experts_ptr, starts_ptr, pairs_ptr,
    w_ptr, stride_we, stride_wn, stride_wc, scale_ptr, stride_se, stride_sn, stride_sc, bias_ptr, stride_be,
    D: tl.constexpr, C: tl.constexpr, K: tl.constexpr, MAX_ROWS: tl.constexpr, TILE: tl.constexpr, FORMAT: tl.constexpr,
):  # fmt: skip
    """See the head of this file. C is F."""
    expert = tl.load(experts_ptr + tl.program_id(1)).to(tl.int64)
    if expert < 0:
        return
    first = tl.load(starts_ptr + tl.program_id(1))
    count = tl.load(starts_ptr + tl.program_id(1) + 1) - first
    rows = (hidden_ptr, weights_ptr, parts_ptr, pairs_ptr, first, count)
    matrix = (w_ptr, stride_we, stride_wn, stride_wc, scale_ptr, stride_se, stride_sn, stride_sc, bias_ptr, stride_be)
    if MAX_ROWS == 16 or count <= 16:
        _weigh(rows, matrix, expert, D, C, 16, TILE, FORMAT)
    elif MAX_ROWS == 32 or count <= 32:
        _weigh(rows, matrix, expert, D, C, 32, TILE, FORMAT)
    else:
        _weigh(rows, matrix, expert, D, C, 64, TILE, FORMAT)


@triton.jit
def _weigh(
    rows, matrix, expert, D: tl.constexpr, C: tl.constexpr, M: tl.constexpr, TILE: tl.constexpr, FORMAT: tl.constexpr
):
    """This program's columns for all rows of its expert, in a block of M."""
    COLUMNS: tl.constexpr = TILE[0]
    hidden_ptr, weights_ptr, parts_ptr, pairs_ptr, first, count = rows
    place_M = tl.arange(0, M)
    is_row_M = place_M < count
    column_N = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    hidden = (hidden_ptr, (first + place_M) * C, is_row_M)
    sums_MN = contract(hidden, matrix, expert, column_N, column_N < D, C, TILE[1], FORMAT, M, COLUMNS)
    pair_M = tl.load(pairs_ptr + first + place_M, mask=is_row_M, other=0)
    weight_M = tl.load(weights_ptr + pair_M, mask=is_row_M, other=0.0).to(tl.float32)
    is_there_MN = is_row_M[:, None] & (column_N < D)[None, :]
    tl.store(parts_ptr + pair_M[:, None] * D + column_N[None, :], sums_MN * weight_M[:, None], mask=is_there_MN)


@triton.jit
def combine_kernel(parts_ptr, weights_ptr, out_ptr, D: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr):
    """See the head of this file."""
    row = tl.program_id(0)
    feature_D = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    sum_D = tl.zeros((BLOCK,), tl.float32)
    for slot in tl.static_range(K):
        # The part of a dropped pair was never written: whatever lies there is not loaded.
        weight_D = tl.zeros((BLOCK,), tl.float32) + tl.load(weights_ptr + row * K + slot).to(tl.float32)
        is_there_D = (weight_D != 0) & (feature_D < D)
        sum_D += tl.load(parts_ptr + (row * K + slot) * D + feature_D, mask=is_there_D, other=0.0)
    tl.store(out_ptr + row * D + feature_D, sum_D, mask=feature_D < D)


def down(hidden_PF: Tensor, lists: ExpertLists, weights: ExpertWeights, tile: Tile) -> Tensor:
    """out [T, D] in hidden's dtype; zero in rows that lost every expert."""
    num_rows, top_k = lists.weights_TK.shape
    num_features = weights.hidden_size
    parts_PD = torch.empty(num_rows * top_k, num_features, dtype=torch.float32, device=hidden_PF.device)
    launch_over_experts(
        down_kernel,
        (hidden_PF, lists.weights_TK, parts_PD),
        lists,
        weights.down,
        tile,
        D=num_features,
    )
    out_TD = hidden_PF.new_empty(num_rows, num_features)
    block = min(MAX_COMBINED, triton.next_power_of_2(num_features))
    grid = (num_rows, triton.cdiv(num_features, block))
    combine_kernel[grid](parts_PD, lists.weights_TK, out_TD, D=num_features, K=top_k, BLOCK=block)
    return out_TD
