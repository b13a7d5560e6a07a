"""Finds a model's MoE layers by structure and by what they do in one forward, not by a list of names.

Owns the search and every reason why a model cannot be used, in words. Knows nothing of steps. Letters as in `types.py`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moespec.experts import unsupported_reason
from moespec.hf import PreTrainedModel
from moespec.kv_cache import TreeCache
from moespec.router_families import RouterSample, identify_family
from moespec.routing import RouterFamily

NUM_PROBE_TOKENS = 16
TREE_LAYER_TYPES = {"full_attention", "sliding_attention"}  # those that keep keys and values of every position


@dataclass(frozen=True)
class MoeLayer:
    """One routed layer: `layer` is its number among the decoder layers."""

    layer: int
    router: nn.Module
    experts: Any  # a transformers experts module: its attributes are checked when it is found
    family: RouterFamily
    top_k: int


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The decoder's layers, found by their number. ValueError if there is no such list."""
    num_layers = model.config.get_text_config().num_hidden_layers
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == num_layers:
            return module
    raise ValueError(f"{type(model).__name__} has no list of {num_layers} decoder layers.")


def attention_windows(model: PreTrainedModel) -> dict[str, int | None]:
    """How far back each type of attention layer in use sees, in positions, itself included; None: all the way."""
    config = model.config.get_text_config()
    window = getattr(config, "sliding_window", None)
    layer_types = getattr(config, "layer_types", None)
    if layer_types is None:
        return {"full_attention": None} if window is None else {"sliding_attention": window}
    return {kind: window if kind == "sliding_attention" else None for kind in sorted(set(layer_types))}


def find_moe_layers(model: PreTrainedModel) -> list[MoeLayer]:
    """The routed layers of a model. ValueError says which model cannot be budgeted and why."""
    name = type(model).__name__
    layers = decoder_layers(model)
    all_experts = {number: [m for m in layer.modules() if _is_experts(m)] for number, layer in enumerate(layers)}
    modules = [experts for found in all_experts.values() for experts in found]
    if not modules:
        raise ValueError(
            f"{name} is not a Mixture-of-Experts model that routes through transformers' experts registry."
        )
    reason = (
        next((reason for experts in modules if (reason := unsupported_reason(experts))), None)
        or _place_reason(model)
        or _kept_state_reason(model)
        or _shape_reason(all_experts)
    )
    if reason:
        raise ValueError(f"{name} is not supported: {reason}.")
    calls = _probe(model, modules)
    found = []
    for number, experts in ((number, only[0]) for number, only in all_experts.items() if only):
        call = calls.get(experts)
        if call is None:
            raise ValueError(f"{name} is not supported: no router's choice reaches the experts of layer {number}.")
        family = identify_family(RouterSample.of(call.router, _parent(layers[number], experts), call.args, call.output))
        if call.output[0].shape[-1] != experts.num_experts:
            family = f"its router ranks {call.output[0].shape[-1]} choices for {experts.num_experts} experts"
        if isinstance(family, str):
            raise ValueError(f"{name} is not supported: {family} (layer {number}).")
        found.append(MoeLayer(number, call.router, experts, family, call.output[2].shape[-1]))
    sizes = {(moe.experts.num_experts, moe.top_k) for moe in found}
    if len(sizes) > 1:
        raise ValueError(f"{name} is not supported: its layers differ in their numbers of experts or top-k.")
    return found


def _is_experts(module: nn.Module) -> bool:
    """Of a class that transformers' registry decorates, which is what sets the flag."""
    return hasattr(module, "is_transposed") and hasattr(module, "num_experts")


def _shape_reason(all_experts: dict[int, list[nn.Module]]) -> str | None:
    crowded = next((number for number, found in all_experts.items() if len(found) > 1), None)
    return None if crowded is None else f"layer {crowded} has several groups of experts"


def _place_reason(model: PreTrainedModel) -> str | None:
    devices = sorted({str(parameter.device) for parameter in model.parameters()})
    return f"it lies on {', '.join(devices)}, and a step runs on one device" if len(devices) > 1 else None


def _kept_state_reason(model: PreTrainedModel) -> str | None:
    others = sorted(set(attention_windows(model)) - TREE_LAYER_TYPES)
    if others:
        return f"it has layers of {', '.join(others)}, and a draft tree needs the keys and values of every position"
    return None


def _parent(layer: nn.Module, experts: nn.Module) -> nn.Module:
    return next(module for module in layer.modules() if any(child is experts for child in module.children()))


@dataclass(frozen=True)
class _Call:
    """One call of a router: its arguments and what it returned."""

    router: nn.Module
    args: tuple
    output: tuple


@torch.inference_mode()
def _probe(model: PreTrainedModel, all_experts: list[nn.Module]) -> dict[nn.Module, _Call]:
    """The router's call that each experts module was handed the choice of, in one forward on a cache of ours.

    ValueError if the forward fails or does not fill the cache.
    """
    name, config, device = type(model).__name__, model.config.get_text_config(), next(model.parameters()).device
    ids_T = torch.linspace(0, config.vocab_size - 1, NUM_PROBE_TOKENS, device=device).long()
    cache = TreeCache(config.num_hidden_layers)
    try:
        with _watching(model, all_experts) as calls:
            model(input_ids=ids_T[None], past_key_values=cache, use_cache=True, logits_to_keep=1)
    except Exception as error:  # a model's forward raises whatever it likes
        first_line = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ValueError(f"{name} is not supported: it does not run on our cache: {first_line}") from error
    empty = next((number for number, layer in enumerate(cache.layers) if layer.length != NUM_PROBE_TOKENS), None)
    if empty is not None:
        raise ValueError(f"{name} is not supported: layer {empty} does not keep every position's keys and values.")
    return calls


@contextlib.contextmanager
def _watching(model: PreTrainedModel, all_experts: list[nn.Module]) -> Iterator[dict[nn.Module, _Call]]:
    """Inside, calls of routers are matched with the experts that get their choice. Hooks see every module: nothing but
    what it returns tells a router."""
    calls: dict[nn.Module, _Call] = {}
    latest: list[_Call] = []

    def returned(module: nn.Module, args: tuple, output: Any) -> None:
        if isinstance(output, tuple) and len(output) >= 3 and all(isinstance(part, Tensor) for part in output[:3]):
            _, weights, ids = output[:3]
            if weights.shape == ids.shape and ids.dtype in (torch.int64, torch.int32):
                latest[:] = [_Call(module, args, output)]

    def called(experts: nn.Module, args: tuple, kwargs: dict) -> None:
        given = [part for part in (*args, *kwargs.values()) if isinstance(part, Tensor) and part.dtype == torch.int64]
        if latest and any(torch.equal(part, latest[0].output[2]) for part in given):
            calls[experts] = latest[0]

    handles = [module.register_forward_hook(returned) for module in model.modules() if module not in all_experts]
    handles += [experts.register_forward_pre_hook(called, with_kwargs=True) for experts in all_experts]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()
