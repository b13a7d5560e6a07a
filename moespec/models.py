"""Load a transformers MoE and find its MoE layers by structure, not by a list of names.

Owns what can be loaded and what is refused, in one sentence each. Knows nothing of steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from moespec.experts import unsupported_reason
from moespec.hf import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from moespec.integrity import verify_manifest
from moespec.routing import RouterFamily, identify_family


@dataclass(frozen=True)
class MoeLayer:
    """One routed layer: `layer` is its number among the decoder layers."""

    layer: int
    router: nn.Module
    experts: Any  # a transformers experts module: its attributes are checked when it is found
    family: RouterFamily


def load_model(path: str | Path, device: str = "auto", dtype: str | torch.dtype = "auto") -> tuple[Any, Any]:
    """(model, tokenizer) of a local directory or a hub id. ValueError in one sentence for what cannot be loaded.

    device "auto" is CUDA where there is one; dtype "auto" is fp32 on the CPU and the checkpoint's own elsewhere.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    _check_device(device)
    if dtype == "auto":
        dtype = torch.float32 if torch.device(device).type == "cpu" else "auto"
    elif isinstance(dtype, str):
        names = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
        if dtype not in names:
            raise ValueError(f"dtype={dtype!r} is not one of auto, {', '.join(names)}.")
        dtype = names[dtype]
    folder = Path(path)
    if folder.is_dir():
        verify_manifest(folder)
    elif folder.is_absolute() or str(path).count("/") != 1:
        raise ValueError(f"{path} is neither a directory nor a hub id of the form owner/name.")
    try:
        AutoConfig.from_pretrained(path)
        tokenizer = AutoTokenizer.from_pretrained(path)
        model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
        return model.to(device).eval(), tokenizer
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        first_line = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ValueError(f"{path} could not be loaded: {first_line}") from error


def _check_device(device: str) -> None:
    try:
        torch.empty(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"device={device!r} cannot be used here: {str(error).splitlines()[0]}") from error


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The decoder's layers, found by their number. ValueError if there is no such list."""
    num_layers = model.config.get_text_config().num_hidden_layers
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == num_layers:
            return module
    raise ValueError(f"{type(model).__name__} has no list of {num_layers} decoder layers.")


def find_moe_layers(model: PreTrainedModel) -> list[MoeLayer]:
    """The routed layers of a model. ValueError says which model cannot be budgeted and why."""
    name = f"{type(model).__name__}"
    config = model.config.get_text_config()
    layer_types = set(getattr(config, "layer_types", None) or [])
    if getattr(config, "sliding_window", None) or layer_types - {"full_attention"}:
        raise ValueError(f"{name} is not supported: it has layers other than full attention, which a draft tree needs.")
    found = []
    families: dict[type, RouterFamily | str] = {}
    for number, layer in enumerate(decoder_layers(model)):
        for parent in layer.modules():
            experts = next(
                (c for c in parent.children() if hasattr(c, "gate_up_proj") and hasattr(c, "num_experts")), None
            )
            if experts is None:
                continue
            router = _router_of(parent, experts)
            if router is None:
                raise ValueError(f"{name} is not supported: no router stands beside its experts in layer {number}.")
            reason = unsupported_reason(experts)
            if type(router) not in families:
                families[type(router)] = identify_family(router, config.hidden_size)
            family = families[type(router)]
            if reason or isinstance(family, str):
                raise ValueError(f"{name} is not supported: {reason or family}.")
            found.append(MoeLayer(number, router, experts, family))
    if not found:
        raise ValueError(
            f"{name} is not a Mixture-of-Experts model that routes through transformers' experts registry."
        )
    return found


def _router_of(parent: nn.Module, experts: nn.Module) -> nn.Module | None:
    for child in parent.children():
        weight = getattr(child, "weight", None)
        if child is not experts and isinstance(weight, Tensor) and weight.shape[0] == experts.num_experts:
            return child
    return None
