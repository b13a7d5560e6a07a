"""What the kernels take, in sentences: ValueErrors raised before any launch. Owns the limits."""

from __future__ import annotations

import os

import torch
from torch import Tensor

MAX_ROWS = 64  # of a verify step: a tree's rows
MAX_EXPERTS = 256
MIN_DEPTH = 16  # input features of one turn of a loop: what a matrix unit takes at least
FLOATS = (torch.bfloat16, torch.float16, torch.float32)
IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # read by triton too, when it is imported


def check_rows(ids_TK: Tensor, weights_TK: Tensor, num_experts: int) -> None:
    """A plan that kernels can walk. That its ids are those of experts is not checked: they are on the device."""
    if ids_TK.dim() != 2 or ids_TK.shape != weights_TK.shape:
        raise ValueError(f"ids {tuple(ids_TK.shape)} and weights {tuple(weights_TK.shape)} are not both [T, K].")
    if ids_TK.dtype != torch.int64:
        raise ValueError(f"ids of {ids_TK.dtype} are not int64.")
    check_float("weights", weights_TK.dtype)
    check_sizes(len(ids_TK), num_experts, ids_TK.shape[1])
    check_device(ids=ids_TK, weights=weights_TK)


def check_sizes(num_rows: int, num_experts: int, top_k: int) -> None:
    """Sizes that a kernel's single program holds."""
    if not 1 <= num_rows <= MAX_ROWS:
        raise ValueError(f"{num_rows} rows are outside 1 to {MAX_ROWS}: longer passes run on torch's grouped products.")
    if not 1 <= num_experts <= MAX_EXPERTS:
        raise ValueError(
            f"{num_experts} experts are outside 1 to {MAX_EXPERTS}: such layers run on torch's operations."
        )
    if not 1 <= top_k <= num_experts:
        raise ValueError(f"top-k {top_k} is outside 1 to {num_experts}, the number of experts.")


def check_float(name: str, dtype: torch.dtype) -> None:
    """One of the types that the kernels load and store."""
    if dtype not in FLOATS:
        raise ValueError(f"{name} of {dtype} are not one of {', '.join(map(str, FLOATS))}.")


def check_device(**tensors: Tensor) -> None:
    """All on one GPU; under the interpreter, all on the CPU."""
    wanted = "cpu" if IS_INTERPRETED else "cuda"
    first = next(iter(tensors))
    for name, tensor in tensors.items():
        if tensor.device.type != wanted:
            raise ValueError(f"{name} on {tensor.device}: these kernels run on {wanted} tensors.")
        if tensor.device != tensors[first].device:
            raise ValueError(f"{name} on {tensor.device} and {first} on {tensors[first].device} are not on one device.")
