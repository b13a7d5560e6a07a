"""Compiled CPU kernels for short steps of small models. Optional: without numba the engine takes torch's operations."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import importlib.metadata
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor

_in_this_thread = threading.local()  # numba keeps its number of threads there; setting it takes as long as a kernel


@functools.cache
def load_kernels() -> SimpleNamespace | None:
    """The modules of this package by name; None where numba is not installed.

    Importing takes a second and the very first call of a kernel compiles it: call this where kernels are really wanted.
    """
    try:
        import numba
    except ImportError:
        return None
    # Compiled code is kept by the hash of all sources: numba itself would miss a change in a file that another imports.
    folder = Path(__file__).parent
    sources = b"".join(path.read_bytes() for path in sorted(folder.glob("*.py")))
    before, numba.config.CACHE_DIR = (
        numba.config.CACHE_DIR,
        str(folder / "__pycache__" / hashlib.sha256(sources).hexdigest()[:12]),
    )
    try:
        from moespec.native import attention, decoder, experts, head, layers, routing, tree
    finally:
        numba.config.CACHE_DIR = before
    modules = (layers, attention, experts, routing, decoder, head, tree)
    return SimpleNamespace(**{module.__name__.rpartition(".")[2]: module for module in modules})


def share_work() -> None:
    """Let the kernels' threads take work as they come to it, by TBB, instead of each its part, by OpenMP: none waits
    for long where another program has a core. To be called before the first kernel; nothing where TBB is missing.

    With nothing else on two cores steps take 1.1 times as long; beside a program that has half of one, half as long.
    """
    with contextlib.suppress(importlib.metadata.PackageNotFoundError, OSError):
        for file in importlib.metadata.files("tbb") or ():
            if file.name == "libtbb.so.12":
                ctypes.CDLL(str(file.locate()), ctypes.RTLD_GLOBAL)  # numba takes it where it is loaded


def kernels_for(*tensors: Tensor) -> SimpleNamespace | None:
    """The kernels, where they can stand in for operations on these tensors: fp32 on the CPU."""
    fitting = all(tensor.device.type == "cpu" and tensor.dtype == torch.float32 for tensor in tensors)
    return load_kernels() if fitting else None


def check_ids(ids: np.ndarray, num_experts: int) -> None:
    """ValueError where an id is of no expert: kernels check nothing and would leave their arrays."""
    if ids.size and not 0 <= ids.min() <= ids.max() < num_experts:
        raise ValueError(f"expert ids {ids.min()} to {ids.max()} are outside 0 to {num_experts - 1}.")


def use_threads() -> None:
    """Run this thread's kernels on as many threads as torch runs its operations."""
    wanted = torch.get_num_threads()
    if getattr(_in_this_thread, "num_threads", None) != wanted:
        import numba

        numba.set_num_threads(min(wanted, numba.config.NUMBA_NUM_THREADS))
        torch.set_num_threads(wanted)  # starting its threads, numba sets OpenMP's number, which is torch's too
        _in_this_thread.num_threads = wanted


def array(weight: Tensor) -> np.ndarray:
    """A copy of a tensor as a kernel takes it: in C order."""
    return np.array(weight.detach().numpy(), order="C")
