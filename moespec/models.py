"""Load a transformers model. Owns what can be loaded and what is refused, in one sentence each.

Whether it is an MoE that draft trees can be verified with is `moe_layers.py`'s question.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError

from moespec.hf import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from moespec.integrity import verify_manifest
from moespec.memory import check_memory, num_parameters

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_model(
    path: str | Path, device: str = "auto", dtype: str | torch.dtype = "auto", revision: str | None = None
) -> tuple[Any, Any]:
    """(model, tokenizer) of a local directory or a hub id. ValueError in one sentence for what cannot be loaded.

    device "auto" is CUDA where there is one; the whole model goes to one device. dtype "auto" is fp32 on the CPU and
    the checkpoint's own elsewhere. `revision`: a branch, tag or commit of a hub id. What would not fit the device's
    memory is refused before it is loaded. No code of a repository is run, nor is anybody asked whether it may be, and
    no pickle of one is unpacked.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    _check_device(device)
    if isinstance(dtype, str) and dtype not in ("auto", *DTYPES):
        raise ValueError(f"dtype={dtype!r} is not one of auto, {', '.join(DTYPES)}.")
    folder = Path(path)
    if folder.is_dir():
        if revision is not None:
            raise ValueError(f"revision={revision!r} names a version of a hub id, and {path} is a directory.")
        verify_manifest(folder)
    elif folder.is_absolute() or str(path).count("/") != 1:
        raise ValueError(f"{path} is neither a directory nor a hub id of the form owner/name.")
    with refusing(path):
        config = AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=False)
    on_device = torch.device(device)
    exact = _resolved(dtype, config, on_device)
    with refusing(path):
        num_weights = num_parameters(config)
    check_memory(str(path), num_weights, exact, on_device)
    with refusing(path):
        tokenizer = AutoTokenizer.from_pretrained(path, revision=revision, trust_remote_code=False)
        model: Any = AutoModelForCausalLM.from_pretrained(
            path, dtype=exact, revision=revision, weights_only=True, trust_remote_code=False
        )
        return model.to(on_device).eval(), tokenizer


def _resolved(dtype: str | torch.dtype, config: Any, device: torch.device) -> torch.dtype:
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype == "auto":
        own = getattr(config.get_text_config(), "dtype", None) or torch.bfloat16
        return torch.float32 if device.type == "cpu" else own
    return DTYPES[dtype]


@contextlib.contextmanager
def refusing(path: str | Path) -> Iterator[None]:
    """Inside, what transformers raises of a target becomes one sentence."""
    try:
        yield
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError, UnpicklingError) as error:
        first_line = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ValueError(f"{path} could not be loaded: {first_line}") from error


def _check_device(device: str) -> None:
    try:
        torch.empty(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"device={device!r} cannot be used here: {str(error).splitlines()[0]}") from error
