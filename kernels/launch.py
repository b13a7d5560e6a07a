"""Launches of the expert kernels: a matrix of all experts as arguments, the grid, what is multiplied in which type.

Knows nothing of what the kernels compute.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.checks import IS_INTERPRETED
from kernels.lists import ExpertLists
from kernels.tiles import Tile
from kernels.weights import ExpertMatrix

_DOT_TYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


def launch_over_experts(
    kernel: Any, arrays: tuple[Tensor, ...], lists: ExpertLists, matrix: ExpertMatrix, tile: Tile, **constants: Any
) -> None:
    """One program for each tile of columns of each expert in the lists; those behind the last end at once."""
    num_rows, top_k = lists.weights_TK.shape
    grid = (triton.cdiv(matrix.values.shape[1], tile.columns), len(lists.experts_A))
    kernel[grid](
        *arrays,
        lists.experts_A,
        lists.starts_A,
        lists.pairs_P,
        *matrix_arguments(matrix),
        C=matrix.num_inputs,
        K=top_k,
        MAX_ROWS=max(16, triton.next_power_of_2(num_rows)),
        TILE=(tile.columns, tile.depth),
        FORMAT=number_format(matrix, arrays[0].dtype),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        **constants,
    )


def matrix_arguments(matrix: ExpertMatrix) -> tuple:
    """Pointers and strides as `contract` takes them; what a matrix has not is stood in for and not read."""
    values, scale, bias = matrix.values, matrix.scale, matrix.bias
    scale_part = (values, 0, 0, 0) if scale is None else (scale, *scale.stride())
    bias_part = (values, 0) if bias is None else (bias, bias.stride(0))
    return values, *values.stride(), *scale_part, *bias_part


def number_format(matrix: ExpertMatrix, dtype: torch.dtype) -> tuple:
    """`contract`'s FORMAT. The interpreter multiplies raw bits of bf16: there, products are made in fp32."""
    dot = tl.float32 if IS_INTERPRETED else _DOT_TYPES[dtype]
    return *matrix.block, matrix.is_int4, matrix.bias is not None, dot
