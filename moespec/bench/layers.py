"""MoE layers to time: a model's sizes, transformers' own modules with random weights, as many of them as memory holds.

Owns which shapes there are and how many layers stand in rotation. Knows nothing of rows, budgets or clocks.
Letters: L layers, E experts, K top-k, D hidden size, F width of an expert.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from moespec.backends import Backend, choose_backend, expert_weights
from moespec.config import EMBEDDED_TARGET
from moespec.cost import WORKED_SHAPES
from moespec.hf import AutoConfig, AutoModelForCausalLM
from moespec.memory import free_bytes
from moespec.router_families import RouterSample, identify_family
from moespec.routing import RouterFamily

if TYPE_CHECKING:
    from kernels.weights import ExpertMatrix

EMBEDDED = "embedded"
SHAPE_NAMES = (EMBEDDED, *WORKED_SHAPES)
FLOATS = {"float32": torch.float32, "bfloat16": torch.bfloat16}
QUANTIZED = {"int8": "int8", "fp8": "fp8 128x128", "int4": "int4"}  # names in `kernels/shapes.py`
DTYPE_NAMES = (*FLOATS, *QUANTIZED)
NUM_PROBE_ROWS = 16  # of a router, to see what it does
MIN_CACHES = 4  # a list of calls reads this many times what the last-level cache holds

# What transformers calls an expert's width and the number of experts.
_SIZE_NAMES = {
    "OLMoE-1B-7B": ("olmoe", "intermediate_size", "num_experts"),
    "Qwen3-30B-A3B": ("qwen3_moe", "moe_intermediate_size", "num_experts"),
    "Mixtral-8x7B": ("mixtral", "intermediate_size", "num_local_experts"),
    "gpt-oss-20b": ("gpt_oss", "intermediate_size", "num_local_experts"),
}
_SPARE_BYTES = 8 << 30  # of a GPU's memory, beside 8 layers: what baselines copy, and what making int4 of a layer takes
_SPARE_LAYERS = 8


@dataclass(frozen=True)
class LayerShape:
    """One MoE layer of a model, and how many the model has. `config` is transformers', of one decoder layer."""

    name: str
    num_layers: int
    num_experts: int
    top_k: int
    hidden_size: int
    config: Any

    @classmethod
    def of(cls, name: str, config: Any, num_layers: int) -> LayerShape:
        """The shape that a transformers config describes."""
        config = copy.deepcopy(config)
        config.num_hidden_layers = 1
        config._experts_implementation = "eager"  # a call of the module is then the class's own forward
        router, experts = _prototypes(config, torch.bfloat16)
        return cls(name, num_layers, experts.num_experts, router.top_k, config.hidden_size, config)


@dataclass(frozen=True)
class BenchLayer:
    """One layer's own weights.

    experts       transformers' module; None for number formats that it has none for
    weights       the same as our kernels read them; None where they do not run
    expert_bytes  what reading one expert takes
    """

    experts: Any
    weights: Any  # kernels.weights.ExpertWeights
    expert_bytes: int


@dataclass(frozen=True)
class Layers:
    """The layers in rotation, and a router of theirs whose weights are still to be set."""

    shape: LayerShape
    dtype_name: str
    layers: list[BenchLayer]
    router: nn.Module
    family: RouterFamily
    backend: Backend  # the engine's choice for these layers: on the CPU it keeps a copy of each

    @property
    def dtype(self) -> torch.dtype:
        """Of the rows."""
        return FLOATS.get(self.dtype_name, torch.bfloat16)

    @property
    def expert_bytes(self) -> int:
        return self.layers[0].expert_bytes


def find_shape(name: str) -> LayerShape:
    """The shape of one of `SHAPE_NAMES`."""
    if name == EMBEDDED:
        config = AutoConfig.from_pretrained(EMBEDDED_TARGET)
        return LayerShape.of(name, config, config.num_hidden_layers)
    if name not in WORKED_SHAPES:
        raise ValueError(f"shape {name!r} is not one of {', '.join(SHAPE_NAMES)}.")
    worked, (model_type, width_name, experts_name) = WORKED_SHAPES[name], _SIZE_NAMES[name]
    sizes = {
        "hidden_size": worked.hidden_size,
        width_name: worked.expert_ffn_size,
        experts_name: worked.num_experts,
        "num_experts_per_tok": worked.top_k,
    }
    if model_type == "qwen3_moe":
        sizes["norm_topk_prob"] = True
    return LayerShape.of(name, AutoConfig.for_model(model_type, **sizes), worked.num_moe_layers)


def build_layers(
    shape: LayerShape, dtype_name: str, device: torch.device, for_kernels: bool, num_layers: int | None = None
) -> Layers:
    """Random weights. `num_layers` None: as many as are wanted and fit, or ValueError where too few fit."""
    if dtype_name in QUANTIZED and not for_kernels:
        raise ValueError(f"dtype {dtype_name} needs a CUDA device: on the CPU use {' or '.join(FLOATS)}.")
    router, experts = _prototypes(shape.config, FLOATS.get(dtype_name, torch.bfloat16))
    if num_layers is None:
        num_layers = _num_layers(shape, _num_bytes(experts), dtype_name, device)
    generator = torch.Generator(device).manual_seed(0)
    make = partial(_kernel_layer, dtype_name=dtype_name) if for_kernels else _cpu_layer
    layers = [make(_random(experts, device, generator)) for _ in range(num_layers)]
    if for_kernels:
        from kernels.experts import unsupported_reason

        reason = unsupported_reason(layers[0].weights, device)
        if reason is not None:
            raise ValueError(f"{shape.name} in {dtype_name} cannot be timed here: {reason}.")
    backend = choose_backend("auto", device, [layer.experts for layer in layers if layer.experts is not None][:1])
    return Layers(shape, dtype_name, layers, router.to_empty(device=device), _family(shape), backend)


def cache_bytes(device: torch.device) -> int:
    """Of the last-level cache."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    sizes = (path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"))
    return max((int(size.removesuffix("K")) << 10 for size in sizes if size.endswith("K")), default=32 << 20)


def calls_for_rotation(call_bytes: float, device: torch.device) -> int:
    """How many calls of different layers it takes until none finds its own weights in the cache."""
    return math.ceil(MIN_CACHES * cache_bytes(device) / call_bytes)


def _num_layers(shape: LayerShape, float_bytes: int, dtype_name: str, device: torch.device) -> int:
    """The model's own number, or more where the layers are small for the cache; fewer where memory ends."""
    shrink = {"int8": 2, "fp8": 2, "int4": 4}.get(dtype_name, 1)
    layer_bytes, memory_bytes = float_bytes // shrink, max(0, _memory_bytes(float_bytes, device))
    least = calls_for_rotation(layer_bytes * shape.top_k / shape.num_experts, device)
    fitting = memory_bytes // layer_bytes
    if fitting < min(least, 2):
        raise ValueError(
            f"{shape.name} in {dtype_name} does not fit this machine: a layer takes {layer_bytes / 1e9:.1f} GB and "
            f"all weights together may take {memory_bytes / 1e9:.1f} GB of its memory."
        )
    return min(max(shape.num_layers, least), fitting)


def _memory_bytes(float_bytes: int, device: torch.device) -> int:
    """What weights may take: nearly all of a GPU's free memory; a quarter of a CPU's, whose kernels copy them."""
    if device.type == "cuda":
        return free_bytes(device) - _SPARE_BYTES - _SPARE_LAYERS * float_bytes
    return free_bytes(device) // 4


def _prototypes(config: Any, dtype: torch.dtype) -> tuple[Any, Any]:
    """(router, experts) of a model's decoder layer, without memory."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    for parent in model.modules():
        children = list(parent.children())
        experts = next((child for child in children if hasattr(child, "gate_up_proj")), None)
        if experts is not None:
            return next(child for child in children if hasattr(child, "top_k")), experts.eval()
    raise ValueError(f"{type(model).__name__} has no MoE layer.")


def _family(shape: LayerShape) -> RouterFamily:
    """How the model's router makes weights: asked in fp32, where no two logits are equal."""
    router, _ = _prototypes(shape.config, torch.float32)
    router.to_empty(device="cpu").requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for parameter in router.parameters():
        parameter.normal_(0, shape.hidden_size**-0.5, generator=generator)
    with torch.inference_mode():
        logits_TE, weights_TK, ids_TK = router(torch.randn(NUM_PROBE_ROWS, shape.hidden_size, generator=generator))
    family = identify_family(RouterSample(logits_TE, weights_TK, ids_TK, vectors=[], groupings=[], jitter=None))
    if isinstance(family, str):
        raise ValueError(f"{shape.name} cannot be timed: {family}.")
    return family


def _num_bytes(module: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in module.parameters())


@torch.no_grad()
def _random(prototype: nn.Module, device: torch.device, generator: torch.Generator) -> Any:
    """Experts of their own; rows of unit variance come out with about that."""
    experts: Any = copy.deepcopy(prototype).to_empty(device=device).requires_grad_(False)
    for parameter in experts.parameters():
        parameter.normal_(0, experts.down_proj.shape[1] ** -0.5, generator=generator)
    return experts


def _cpu_layer(experts: Any) -> BenchLayer:
    return BenchLayer(experts, None, _num_bytes(experts) // experts.num_experts)


def _kernel_layer(experts: Any, dtype_name: str) -> BenchLayer:
    weights = expert_weights(experts)
    if dtype_name not in QUANTIZED:
        return BenchLayer(experts, weights, weights.bytes_per_expert)
    gate_up, down = (_in_format(matrix, dtype_name) for matrix in (weights.gate_up, weights.down))
    weights = replace(weights, gate_up=gate_up, down=down)
    return BenchLayer(None, weights, weights.bytes_per_expert)


def _in_format(matrix: ExpertMatrix, dtype_name: str) -> ExpertMatrix:
    from kernels.shapes import FORMATS

    return replace(FORMATS[QUANTIZED[dtype_name]](matrix.values), bias=matrix.bias)
