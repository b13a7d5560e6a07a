"""Rows times a tile of one expert's weights: the loop that every byte of an expert passes through. Device functions.

| name   | role                                                                                            |
|--------|-------------------------------------------------------------------------------------------------|
| x      | (pointer, offset of each row [M], which rows there are [M])                                     |
| matrix | (weights [E, N, C] and their strides, scales and theirs, bias [E, N] and its), see `weights.py` |
| row_N  | which rows of the weights the tile's columns are; mask_N: which there are                       |
| FORMAT | (rows and columns that share a scale, or 0, 0; is it int4; has it a bias; what to multiply in)  |

Accumulates in fp32. Weights are wanted once (`evict_first`); the cache is left to x. Knows nothing of routing.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def contract(
    x, matrix, expert, row_N, mask_N,
    C: tl.constexpr, DEPTH: tl.constexpr, FORMAT: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """[M, N] fp32: x [M, C] @ w [N, C].T + bias, of one expert."""
    SCALE_ROWS: tl.constexpr = FORMAT[0]
    SCALE_COLUMNS: tl.constexpr = FORMAT[1]
    IS_INT4: tl.constexpr = FORMAT[2]
    HAS_BIAS: tl.constexpr = FORMAT[3]
    DOT: tl.constexpr = FORMAT[4]
    IS_GROUPED: tl.constexpr = IS_INT4 or (SCALE_COLUMNS > 0 and SCALE_COLUMNS < C)
    # int4 keeps columns j and j + 64 of a group in one byte: one load of weights, two of x, two products.
    NUM_LOADED: tl.constexpr = DEPTH // 2 if IS_INT4 else DEPTH
    x_ptr, x_offset_M, x_mask_M = x
    w_ptr, stride_we, stride_wn, stride_wc, scale_ptr, stride_se, stride_sn, stride_sc, bias_ptr, stride_be = matrix
    depth = tl.arange(0, NUM_LOADED)
    x_ptrs = x_ptr + x_offset_M[:, None] + depth[None, :]
    w_ptrs = w_ptr + expert * stride_we + row_N[None, :] * stride_wn + depth[:, None] * stride_wc
    scale_ptrs = scale_ptr + expert * stride_se
    if SCALE_ROWS > 0:
        scale_ptrs += row_N // SCALE_ROWS * stride_sn
    acc_MN = tl.zeros((M, N), tl.float32)
    for start in range(0, C, DEPTH):
        x_mask, w_mask = x_mask_M[:, None], mask_N[None, :]
        if C % DEPTH != 0:
            x_mask, w_mask = x_mask & (start + depth < C)[None, :], w_mask & (start + depth < C)[:, None]
        x_MC = tl.load(x_ptrs + start, mask=x_mask, other=0.0).to(DOT)
        w_CN = tl.load(w_ptrs, mask=w_mask, other=0.0, eviction_policy="evict_first")
        w_ptrs += NUM_LOADED * stride_wc
        if IS_INT4:
            lower_CN, upper_CN = (w_CN & 15).to(tl.int8) - 8, (w_CN >> 4).to(tl.int8) - 8
            upper_MC = tl.load(x_ptrs + start + NUM_LOADED, mask=x_mask, other=0.0).to(DOT)
            part_MN = tl.dot(x_MC, lower_CN.to(DOT), input_precision="ieee")
            part_MN = tl.dot(upper_MC, upper_CN.to(DOT), part_MN, input_precision="ieee")
        elif IS_GROUPED:
            part_MN = tl.dot(x_MC, w_CN.to(DOT), input_precision="ieee")
        else:
            acc_MN = tl.dot(x_MC, w_CN.to(DOT), acc_MN, input_precision="ieee")
        if IS_GROUPED:
            scale_N = tl.load(scale_ptrs + start // SCALE_COLUMNS * stride_sc, mask=mask_N, other=0.0)
            acc_MN += part_MN * scale_N[None, :]
    if SCALE_ROWS > 0 and not IS_GROUPED:
        acc_MN = acc_MN * tl.load(scale_ptrs, mask=mask_N, other=0.0)[None, :]
    if HAS_BIAS:
        acc_MN += tl.load(bias_ptr + expert * stride_be + row_N, mask=mask_N, other=0.0).to(tl.float32)[None, :]
    return acc_MN
