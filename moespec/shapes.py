"""What a step of a model reads, counted from its parameters. They may lie on the meta device: no weight is needed.

Owns how experts are told from what every step reads, by structure, and what the published ways of storing weights
take. Serves every family that keeps a layer's experts in three-dimensional parameters, as transformers 5 does. Knows
nothing of machines, routing or engines.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moespec.cost import MXFP4_BYTES, ModelShape
from moespec.hf import AutoModelForCausalLM

FP8_BYTES = 1 + 4 / 128**2  # per weight: 8 bits, and an fp32 scale for every block of 128 x 128


@dataclass(frozen=True)
class Storage:
    """Bytes per weight: of most parameters, of the experts' matrices, and of other linear layers but the output's."""

    other: float
    experts: float
    linear: float

    @staticmethod
    def of(config: Any, dtype: torch.dtype | None) -> Storage:
        """As loaded in `dtype`, or, for None, as published. ValueError for a quantization of unknown size."""
        quantization = getattr(config, "quantization_config", None)
        if dtype is not None or quantization is None:
            size = (dtype or checkpoint_dtype(config)).itemsize
            return Storage(size, size, size)
        method = quantization["quant_method"] if isinstance(quantization, dict) else quantization.quant_method
        size = checkpoint_dtype(config).itemsize
        if method == "mxfp4":
            return Storage(size, MXFP4_BYTES, size)
        if method == "fp8":
            return Storage(size, FP8_BYTES, FP8_BYTES)
        raise ValueError(
            f"quantization {str(method)!r} has no known size per weight: give the dtype that the model is loaded in."
        )


def checkpoint_dtype(config: Any) -> torch.dtype:
    """What the weights were published in; bf16 where the config does not say, as all of the last years are."""
    dtype = getattr(config, "dtype", None)
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype, None)
    return dtype if isinstance(dtype, torch.dtype) else torch.bfloat16


def meta_model(config: Any) -> Any:
    """The model without its weights, in torch's default dtype. ValueError in one sentence for what transformers cannot
    build.

    In its own dtype it would be built by setting torch's default one, which all threads share: a step that another runs
    meanwhile would go wrong.
    """
    config = copy.deepcopy(config)  # transformers writes the dtype into it
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, dtype=torch.get_default_dtype(), trust_remote_code=False)
    except Exception as error:  # configs of foreign or broken models fail in every possible way
        raise ValueError(f"a model of type {config.model_type!r} cannot be built from this config: {error}") from error


def shape_of(model: Any, name: str, storage: Storage | None = None) -> ModelShape:
    """Experts of one layer, and all that is always read: no embeddings, unless the output layer shares them.

    `storage` None: as the parameters are. ValueError for a model without experts, or with layers of different ones.
    """
    found = [module for module in model.modules() if _is_experts(module)]
    if not found:
        raise ValueError(f"{name} has no experts: budgets, and this advice, are for Mixture-of-Experts models.")
    if len({tuple(tuple(p.shape) for p in experts.parameters(recurse=False)) for experts in found}) > 1:
        raise ValueError(f"{name} has layers with different experts, whose bytes cannot be counted here.")
    experts = list(found[0].parameters(recurse=False))
    num_experts, hidden_size = int(found[0].num_experts), model.config.get_text_config().hidden_size
    embeddings = model.get_input_embeddings().weight
    unread = {id(parameter) for module in found for parameter in module.parameters(recurse=False)}
    if model.get_output_embeddings().weight is not embeddings:
        unread.add(id(embeddings))
    dense = [parameter for parameter in model.parameters() if id(parameter) not in unread]
    sizes = {} if storage is None else _sizes(model, found, storage)
    return ModelShape(
        name=name,
        num_moe_layers=len(found),
        num_experts=num_experts,
        top_k=_top_k(model, found[0], name),
        hidden_size=hidden_size,
        expert_ffn_size=found[0].down_proj.numel() // (num_experts * hidden_size),
        dense_bytes=_num_bytes(dense, sizes),
        expert_bytes=_num_bytes(experts, sizes) // num_experts,
        dense_weights=sum(parameter.numel() for parameter in dense),
        expert_weights=sum(parameter.numel() for parameter in experts) // num_experts,
    )


def weights_bytes(model: Any, storage: Storage) -> int:
    """All that must lie in memory."""
    return _num_bytes(list(model.parameters()), _sizes(model, [m for m in model.modules() if _is_experts(m)], storage))


def kv_bytes(config: Any, num_positions: int, dtype_bytes: int) -> int:
    """Keys and values of so many positions, as transformers caches them: sliding layers keep their window alone,
    layers of linear attention none; compressed ones (DeepSeek's) are kept expanded.
    """
    config = config.get_text_config()
    num_heads = config.num_attention_heads
    if getattr(config, "kv_lora_rank", None):
        per_position = num_heads * (config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim)
    else:
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // num_heads
        per_position = 2 * (getattr(config, "num_key_value_heads", None) or num_heads) * head_dim
    layer_types = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    window = min(num_positions, getattr(config, "sliding_window", None) or num_positions)
    kept = {"sliding_attention": window, "linear_attention": 0, "mamba": 0, "conv": 0}
    return dtype_bytes * per_position * sum(kept.get(kind, num_positions) for kind in layer_types)


def _is_experts(module: nn.Module) -> bool:
    down: Any = getattr(module, "down_proj", None)
    return isinstance(down, Tensor) and down.dim() == 3 and hasattr(module, "num_experts")


def _top_k(model: Any, experts: nn.Module, name: str) -> int:
    """Of the router beside the experts, or of the block that holds both."""
    block = next(module for module in model.modules() if any(child is experts for child in module.children()))
    found = [getattr(module, "top_k", None) for module in (*block.children(), block)]
    top_k = next((number for number in found if isinstance(number, int)), None)
    if top_k is None:
        raise ValueError(f"{name} does not say how many experts a token uses: its config has no top-k.")
    return top_k


def _sizes(model: Any, blocks: list[Any], storage: Storage) -> dict[int, float]:
    """Bytes per weight of every parameter, by its id."""
    sizes = {id(parameter): storage.other for parameter in model.parameters()}
    sizes |= {id(module.weight): storage.linear for module in model.modules() if isinstance(module, nn.Linear)}
    sizes[id(model.get_output_embeddings().weight)] = storage.other
    matrices = [p for experts in blocks for p in experts.parameters(recurse=False) if p.dim() == 3]
    return sizes | {id(parameter): storage.experts for parameter in matrices}


def _num_bytes(parameters: list[Any], sizes: dict[int, float]) -> int:
    return round(sum(p.numel() * sizes.get(id(p), p.element_size()) for p in parameters))
