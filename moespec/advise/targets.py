"""Which model advice is asked for, found from its config alone: nothing is loaded.

Owns what a target may be called, what is refused, and how its weights are stored. Knows nothing of devices' speeds.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moespec.config import EMBEDDED_TARGET
from moespec.cost import ModelShape
from moespec.hf import AutoConfig
from moespec.models import DTYPES, refusing
from moespec.published import PUBLISHED, published_config
from moespec.shapes import Storage, kv_bytes, meta_model, shape_of, weights_bytes


@dataclass(frozen=True)
class AdvisedTarget:
    """A model's step, all its weights, and the keys and values of a context."""

    shape: ModelShape
    weights_bytes: int
    kv_bytes: int
    vocab_size: int
    bytes_per_weight: float  # of what is not quantized


def describe_target(target: str | Path, revision: str | None, dtype: str, on_cpu: bool, context: int) -> AdvisedTarget:
    """Read the config and count. dtype "auto": as the engine loads it, fp32 on a CPU and as published elsewhere.

    ValueError, in one sentence, for what is no target, has no experts or is asked for in a wrong way.
    """
    if context < 0:
        raise ValueError(f"context={context} is not allowed: use 0 or more positions.")
    if dtype != "auto" and dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r} is not one of auto, {', '.join(DTYPES)}.")
    name, config = target_config(target, revision)
    storage = Storage.of(config, DTYPES.get(dtype, torch.float32 if on_cpu else None))
    model = meta_model(config)
    shape = shape_of(model, name, storage)
    cached = kv_bytes(config, context, round(storage.other))
    vocab_size = config.get_text_config().vocab_size
    return AdvisedTarget(shape, weights_bytes(model, storage), cached, vocab_size, storage.other)


def target_config(target: str | Path, revision: str | None = None) -> tuple[str, Any]:
    """(name, transformers config) of a directory, a config file, a hub id or a name of `PUBLISHED`, in any case."""
    known = {name.lower(): name for name in PUBLISHED}
    if str(target).lower() in known:
        name = known[str(target).lower()]
        return name, published_config(name)
    path = Path(target)
    if not path.exists() and (path.is_absolute() or str(target).count("/") != 1):
        raise ValueError(
            f"target {target} is no directory, config file, hub id (owner/name), nor {', '.join(PUBLISHED)}."
        )
    with refusing(target):
        config = AutoConfig.from_pretrained(target, revision=revision, trust_remote_code=False)
    if not path.exists():
        return str(target), config
    folder = path.resolve() if path.is_dir() else path.resolve().parent
    return "embedded model" if folder == EMBEDDED_TARGET else folder.name, config
