"""A kernel that only reads the active experts' bytes and combines them by exclusive or: what any could reach at best.

| array   | shape   | role                                                              |
|---------|---------|-------------------------------------------------------------------|
| words   | [E, W]  | int32; all bytes of one expert's weights, scales or bias          |
| experts | [A]     | which are read, -1 behind the last, as `kernels/lists.py` has them |
| found   | [A, C]  | written, int32: exclusive or of each chunk's words; not where -1  |

Grid (C, A): one program reads a chunk of one expert. Knows nothing of number formats.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.weights import ExpertMatrix, ExpertWeights

_BLOCK, _TURNS = 2048, 8  # words: 16 bytes for each of 4 warps' threads, four loads wide; 64 KiB a program


@triton.jit
def load_only_kernel(words_ptr, experts_ptr, found_ptr, W: tl.constexpr, BLOCK: tl.constexpr, TURNS: tl.constexpr):
    """See the head of this file."""
    expert = tl.load(experts_ptr + tl.program_id(1)).to(tl.int64)
    if expert < 0:
        return
    place = tl.program_id(0) * (BLOCK * TURNS) + tl.arange(0, BLOCK)
    found_B = tl.zeros((BLOCK,), tl.int32)
    for turn in tl.static_range(TURNS):
        at = place + turn * BLOCK
        found_B ^= tl.load(words_ptr + expert * W + at, mask=at < W, other=0, eviction_policy="evict_first")
    tl.store(found_ptr + tl.program_id(1) * tl.num_programs(0) + tl.program_id(0), tl.xor_sum(found_B, axis=0))


def load_only(weights: ExpertWeights, experts_A: Tensor) -> list[Tensor]:
    """Read every byte of the listed experts once; what was found, one tensor for each part of the weights."""
    return [_read(words_EW, experts_A) for words_EW in word_parts(weights)]


def word_parts(weights: ExpertWeights) -> list[Tensor]:
    """int32 [E, W] views of values, scales and biases."""
    parts = [part for matrix in (weights.gate_up, weights.down) for part in _parts(matrix)]
    return [part.view(len(part), -1).view(torch.int32) for part in parts]


def _parts(matrix: ExpertMatrix) -> list[Tensor]:
    values = matrix.values if matrix.values.is_contiguous() else matrix.values.transpose(1, 2)
    return [part for part in (values, matrix.scale, matrix.bias) if part is not None]


def _read(words_EW: Tensor, experts_A: Tensor) -> Tensor:
    num_words = words_EW.shape[1]
    grid = (triton.cdiv(num_words, _BLOCK * _TURNS), len(experts_A))
    found_AC = torch.empty(grid[1], grid[0], dtype=torch.int32, device=words_EW.device)
    load_only_kernel[grid](words_EW, experts_A, found_AC, W=num_words, BLOCK=_BLOCK, TURNS=_TURNS)
    return found_AC
