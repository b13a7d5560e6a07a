"""The target: load a transformers MoE, find its MoE layers by structure, and run it with our routing inside a step.

Owns the seams to transformers (router hooks, the experts function, feature taps) and their removal. Outside a step all
of them are inert. Knows nothing of budgets, drafters or trees.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from moespec.dense import PackedLinear, can_pack, grouped_attention
from moespec.experts import choose_backend, unsupported_reason
from moespec.hf import (
    ALL_ATTENTION_FUNCTIONS,
    ALL_EXPERTS_FUNCTIONS,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    Cache,
    PreTrainedModel,
)
from moespec.integrity import verify_manifest
from moespec.routing import RouterFamily, identify_family
from moespec.types import ExpertPlan

EMBEDDED_TARGET = Path(__file__).resolve().parent.parent / "assets" / "model"
EMBEDDED_DRAFTER = EMBEDDED_TARGET.parent / "drafter"

_engine_numbers = itertools.count()

# Called per MoE layer inside a step with the layer's number and its router's output.
RouteFunction = Callable[[int, tuple[Tensor, Tensor, Tensor]], ExpertPlan]


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


class Target:
    """A transformers MoE with our seams attached. Use `stepping` around a forward to route it; `close` to let go."""

    def __init__(self, model: PreTrainedModel, tokenizer: Any = None, tap_layers: tuple[int, ...] = ()) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.moe_layers = find_moe_layers(model)
        self.layers = decoder_layers(model)
        first = self.moe_layers[0]
        self.num_experts: int = first.experts.num_experts
        self.device = next(model.parameters()).device
        self.dtype = next(model.parameters()).dtype
        config = model.config.get_text_config()
        self.vocab_size: int = config.vocab_size
        self.hidden_size: int = config.hidden_size
        self.max_context: int = config.max_position_embeddings
        self.top_k = self._probe_top_k(first.router)
        self.backend, self._experts_function, self.backend_reason = choose_backend(self.device)
        self._route: RouteFunction | None = None
        self._features: dict[int, Tensor] = {}
        self._handles = [
            moe.router.register_forward_hook(self._router_hook(number)) for number, moe in enumerate(self.moe_layers)
        ]
        self._tap_handles: list[Any] = []
        self.tap(tap_layers)
        self._key = f"moespec-{next(_engine_numbers)}"
        ALL_EXPERTS_FUNCTIONS[self._key] = self._experts_function
        ALL_ATTENTION_FUNCTIONS[self._key] = grouped_attention
        self._packed = self._pack_linear_layers()
        self._configs = list({id(moe.experts.config): moe.experts.config for moe in self.moe_layers}.values())

    def _probe_top_k(self, router: nn.Module) -> int:
        with torch.inference_mode():
            row = torch.zeros(1, self.hidden_size, device=self.device, dtype=self.dtype)
            return router(row)[2].shape[-1]

    def tap(self, layers: tuple[int, ...]) -> None:
        """Record the residual entering these decoder layers during steps (EAGLE-3 features)."""
        for handle in self._tap_handles:
            handle.remove()
        self._tap_handles = [
            self.layers[number].register_forward_pre_hook(self._tap_hook(number), with_kwargs=True) for number in layers
        ]
        self._tap_layers = layers

    def _pack_linear_layers(self) -> list[nn.Linear]:
        """Give large linear layers a `forward` that multiplies by packed weights inside a step."""
        large = [m for m in self.model.modules() if type(m) is nn.Linear and can_pack(m.weight)]
        for linear in large:
            linear.forward = self._packed_forward(linear)  # type: ignore[method-assign, assignment]
        return large

    def _packed_forward(self, linear: nn.Linear) -> Callable[[Tensor], Tensor]:
        packed = PackedLinear(linear.weight, linear.bias)

        def forward(x: Tensor) -> Tensor:
            nonlocal packed
            if self._route is None:
                return nn.Linear.forward(linear, x)
            if not packed.packs(linear.weight):
                packed = PackedLinear(linear.weight, linear.bias)
            return packed(x)

        return forward

    @property
    def bytes_per_expert(self) -> int:
        experts = self.moe_layers[0].experts
        tensors = (experts.gate_up_proj, experts.down_proj)
        return sum(tensor[0].numel() * tensor.element_size() for tensor in tensors)

    @contextlib.contextmanager
    def stepping(self, route: RouteFunction) -> Iterator[None]:
        """Inside: `route` decides every MoE layer's experts, and our experts function runs them."""
        previous = [config._experts_implementation for config in self._configs]
        self._route = route
        for config in self._configs:
            config._experts_implementation_internal = self._key
        try:
            yield
        finally:
            self._route = None
            for config, implementation in zip(self._configs, previous, strict=True):
                config._experts_implementation_internal = implementation

    def forward(self, token_ids_T: Tensor, positions_T: Tensor, mask: Tensor | None, cache: Cache, keep: int) -> Tensor:
        """Logits [keep, V] of the last `keep` rows; inside `stepping`. `mask`: additive [1, 1, T, S] or causal."""
        with self._grouped_attention() if mask is not None else contextlib.nullcontext():
            output = self.model(
                input_ids=token_ids_T[None],
                attention_mask=mask,
                position_ids=positions_T[None],
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=keep,
            )
        return output.logits[0]

    @contextlib.contextmanager
    def _grouped_attention(self) -> Iterator[None]:
        """Inside, on a CPU: SDPA with a mask without a copy of every key for each group of heads."""
        swapped = [c for c in self._configs if c._attn_implementation == "sdpa" and self.device.type == "cpu"]
        for config in swapped:
            config._attn_implementation_internal = self._key
        try:
            yield
        finally:
            for config in swapped:
                config._attn_implementation_internal = "sdpa"

    def features(self) -> Tensor | None:
        """[T, num_taps * D]: the tapped residuals of the last forward inside a step; None without taps."""
        if not self._tap_layers:
            return None
        return torch.cat([self._features[number][0] for number in self._tap_layers], dim=-1)

    def close(self) -> None:
        """Remove every hook and the experts function; the model is as it was."""
        for handle in (*self._handles, *self._tap_handles):
            handle.remove()
        for linear in self._packed:
            del linear.forward
        self._handles, self._tap_handles, self._packed = [], [], []
        for functions in (ALL_EXPERTS_FUNCTIONS, ALL_ATTENTION_FUNCTIONS):
            if self._key in functions:
                del functions[self._key]

    def _router_hook(self, number: int) -> Callable:
        def hook(module: nn.Module, args: tuple, output: tuple[Tensor, Tensor, Tensor]) -> tuple | None:
            if self._route is None:
                return None
            plan = self._route(number, output)
            return output[0], plan.weights_TK, plan.ids_TK

        return hook

    def _tap_hook(self, number: int) -> Callable:
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            if self._route is not None:
                self._features[number] = args[0] if args else kwargs["hidden_states"]

        return hook
