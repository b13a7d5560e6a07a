"""One copy from the device to the host for all that a step has to say. Knows nothing of what the tensors mean."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

_ALIGNMENT = 8  # bytes: any element type may begin there


def to_host(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors on the CPU, shapes and types as they were; those that lie there already are returned themselves.

    A copy for each would wait for the device as often: they travel as bytes of one tensor.
    """
    if all(tensor.device.type == "cpu" for tensor in tensors):
        return list(tensors)
    return unpacked(packed(tensors).cpu(), tensors)


def packed(tensors: Sequence[Tensor]) -> Tensor:
    """The bytes of all tensors, uint8, on their device."""
    return torch.cat([_bytes(tensor) for tensor in tensors])


def unpacked(together: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """The inverse of `packed`: views of `together` with the shapes and types of `like`."""
    found, start = [], 0
    for tensor in like:
        num_bytes = tensor.numel() * tensor.element_size()
        found.append(together[start : start + num_bytes].view(tensor.dtype).view(tensor.shape))
        start += math.ceil(num_bytes / _ALIGNMENT) * _ALIGNMENT
    return found


def _bytes(tensor: Tensor) -> Tensor:
    flat = tensor.contiguous().flatten().view(torch.uint8)
    return torch.nn.functional.pad(flat, (0, -len(flat) % _ALIGNMENT))
