"""How much memory is free, and how much a model will need: asked before anything is loaded.

Owns the two answers. What is needed is counted on shapes without storage. Knows nothing of files or hubs.
"""

from __future__ import annotations

import os
from typing import Any

import torch

from moespec.shapes import meta_model

HEADROOM = 1.05  # the cache of a conversation, a step's activations, buffers


def free_bytes(device: torch.device) -> int:
    """Memory that can still be had, what torch holds and does not use included; all of it where nobody says."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    try:
        with open("/proc/meminfo", encoding="utf-8") as file:
            return next(int(line.split()[1]) << 10 for line in file if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def num_parameters(config: Any) -> int:
    """Of the causal model that a transformers config describes; weights that are shared count once."""
    return sum(parameter.numel() for parameter in meta_model(config).parameters())


def check_memory(name: str, num_weights: int, dtype: torch.dtype, device: torch.device) -> None:
    """ValueError if so many weights do not fit, with what would."""
    needed, free = num_weights * dtype.itemsize * HEADROOM, free_bytes(device)
    if needed <= free:
        return
    half = num_weights * torch.bfloat16.itemsize * HEADROOM
    would = f"it needs a device with {_gigabytes(half)} free, in half precision"
    if half <= free:
        would = f"with dtype=bfloat16 it takes {_gigabytes(half)}"
    raise ValueError(
        f"{name} does not fit: its {num_weights / 1e9:.1f} billion weights take {_gigabytes(needed)} in "
        f"{str(dtype).removeprefix('torch.')}, and {device} has {_gigabytes(free)} free; {would}."
    )


def _gigabytes(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:.1f} GB"
