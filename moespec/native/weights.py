"""Weights as the compiled kernels read them: panels of 16 rows side by side, in fp32 or in int8.

Copies, and when they are to be made anew; numpy asks the system for large pages where a copy is large. Knows nothing of
what a weight is for.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

PANEL = 16  # rows of a weight that lie side by side: two vectors of a tile
INT8_MAX = 127

Weight = tuple[np.ndarray, np.ndarray]  # panels [P, D, 16], the factor fp32 [O] of each output


def version(weight: Tensor) -> tuple:
    """What differs once a weight was replaced, moved, cast or written to: a copy is to be made anew.

    Of a write through `.data`, or to a tensor made in inference mode, torch keeps no count.
    """
    return weight.data_ptr(), weight.dtype, 0 if weight.is_inference() else weight._version


def panels(weight: Tensor) -> np.ndarray:
    """[..., O, D] as [..., P, D, 16]: row o is column o % 16 of panel o // 16; zeros fill the last one."""
    *lead, num_out, depth = weight.shape
    num_panels = -(-num_out // PANEL)
    padded = weight.new_zeros(*lead, num_panels * PANEL, depth)
    padded[..., :num_out, :] = weight.detach()
    # Into memory of numpy's.
    return np.array(padded.view(*lead, num_panels, PANEL, depth).transpose(-1, -2).numpy(), order="C")


def exact(*weights: Tensor) -> Weight:
    """fp32 weights [O, D], one after the other."""
    weight = torch.cat(weights)
    return panels(weight), np.ones(len(weight), np.float32)


def quantized(*weights: Tensor) -> Weight:
    """Weights [O, D], one after the other, in int8: each row rounded to 127ths of its largest value."""
    weight = torch.cat(weights).detach().float()
    scales_O1 = weight.abs().amax(dim=1, keepdim=True).clamp(min=1e-12) / INT8_MAX
    return panels((weight / scales_O1).round().to(torch.int8)), scales_O1[:, 0].numpy()
