"""The target in a step: a transformers model with our seams attached, run with our routing.

Owns the seams to transformers (router hooks, the experts function, feature taps) and their removal. Outside a step all
of them are inert. Knows nothing of budgets or drafters.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from moespec.backends import TritonBackend, choose_backend
from moespec.batch_cache import BatchCache, RequestRows
from moespec.dense import Mask, PackedLinear, TreeMask, can_pack, mask_by_type, masked_attention
from moespec.fusing import FusedModules
from moespec.graph import Graphs
from moespec.hf import ALL_ATTENTION_FUNCTIONS, ALL_EXPERTS_FUNCTIONS, Cache, PreTrainedModel
from moespec.kv_cache import TreeCache
from moespec.lean import LeanDecoder
from moespec.moe_layers import attention_windows, decoder_layers, find_moe_layers
from moespec.native.weights import version
from moespec.routing import RouterOutput
from moespec.step_router import StepRouter
from moespec.types import DraftTree

_engine_numbers = itertools.count()


class Target:
    """A transformers MoE with our seams attached. Use `stepping` around a forward to route it; `close` to let go."""

    def __init__(
        self, model: PreTrainedModel, tokenizer: Any = None, tap_layers: tuple[int, ...] = (), backend: str = "auto"
    ) -> None:
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
        self.top_k = first.top_k
        self.windows = attention_windows(model)
        self.backend = choose_backend(backend, self.device, [moe.experts for moe in self.moe_layers])
        self.graphs = Graphs(self.device)
        self._router: StepRouter | None = None
        self._features: dict[int, Tensor] = {}
        self._handles = [
            moe.router.register_forward_hook(self._router_hook(number)) for number, moe in enumerate(self.moe_layers)
        ]
        self._tap_handles: list[Any] = []
        self.tap(tap_layers)
        self._key = f"moespec-{next(_engine_numbers)}"
        ALL_EXPERTS_FUNCTIONS[self._key] = self.backend
        ALL_ATTENTION_FUNCTIONS[self._key] = masked_attention(self.device)
        self._lean = self._find_lean()
        self._packed = self._pack_linear_layers() if self._lean is None else []
        self._fused = self._fuse() if self.backend.name == "triton" else None
        self._versions = _versions(model)
        self._mask = TreeMask(self.dtype, self.device, self.windows)
        self._configs = list({id(moe.experts.config): moe.experts.config for moe in self.moe_layers}.values())

    def _find_lean(self) -> LeanDecoder | None:
        if self.backend.name != "cpu" or any(self.windows.values()):
            return None
        return LeanDecoder.of(self.model, self.layers, self.moe_layers, self._run_experts)

    def refresh(self) -> bool:
        """Follow a model whose weights changed, as far as `version` can tell: whether they did. Once per answer."""
        changed = _versions(self.model) != self._versions
        changed = (self._fused is not None and self._fused.refresh()) or changed
        if not changed:
            return False
        if isinstance(self.backend, TritonBackend):
            self.backend.refresh()
        if self._lean is not None:
            self._lean = None  # its copies go before the new ones come
            self._lean = self._find_lean()
        else:
            self._pack(self._packed)
        self._versions = _versions(self.model)  # the last: whatever fails above is tried again
        return True

    def tap(self, layers: tuple[int, ...]) -> None:
        """Record the residual entering these decoder layers during steps (EAGLE-3 features)."""
        for handle in self._tap_handles:
            handle.remove()
        self._tap_handles = [
            self.layers[number].register_forward_pre_hook(self._tap_hook(number), with_kwargs=True) for number in layers
        ]
        self._tap_layers = layers

    def _fuse(self) -> FusedModules:
        return FusedModules(
            self.model,
            list(self.layers),
            self.moe_layers,
            masked_attention(self.device),
            lambda: self._router is not None,
            self.plans_from_logits,
        )

    def plans_from_logits(self) -> bool:
        """Whether the step under way makes its own plan of every router's logits."""
        return self._router is not None and self._router.plans_from_logits

    def _pack_linear_layers(self) -> list[nn.Linear]:
        """Give large linear layers a `forward` that multiplies by packed weights inside a step."""
        large = [m for m in self.model.modules() if type(m) is nn.Linear and can_pack(m.weight)]
        self._pack(large)
        return large

    def _pack(self, layers: list[nn.Linear]) -> None:
        for linear in layers:
            linear.forward = self._packed_forward(linear)  # type: ignore[method-assign, assignment]

    def _packed_forward(self, linear: nn.Linear) -> Callable[[Tensor], Tensor]:
        packed = PackedLinear(linear.weight, linear.bias)

        def forward(x: Tensor) -> Tensor:
            return nn.Linear.forward(linear, x) if self._router is None else packed(x)

        return forward

    @property
    def is_compiled(self) -> bool:
        """Whether steps run through compiled CPU kernels, not through the model's modules."""
        return self._lean is not None

    @property
    def bytes_per_expert(self) -> int:
        experts = self.moe_layers[0].experts
        tensors = (experts.gate_up_proj, experts.down_proj)
        return sum(tensor[0].numel() * tensor.element_size() for tensor in tensors)

    @contextlib.contextmanager
    def stepping(self, router: StepRouter) -> Iterator[None]:
        """Inside: `router` decides every MoE layer's experts, and our experts function runs them."""
        previous = [config._experts_implementation for config in self._configs]
        self._router = router
        for config in self._configs:
            config._experts_implementation_internal = self._key
        try:
            yield
        finally:
            self._router = None
            for config, implementation in zip(self._configs, previous, strict=True):
                config._experts_implementation_internal = implementation

    def forward(
        self, token_ids_T: Tensor, positions_T: Tensor, seen_TT: Tensor | None, cache: TreeCache, keep: int
    ) -> Tensor:
        """Logits [keep, V] of the last `keep` rows; inside `stepping`. Every row sees what the cache holds.

        `seen_TT`: bool, which of the new rows each row sees (a tree's ancestors and itself); None is causal.
        """
        if self._lean is not None:
            return self._run_lean(
                self._lean, token_ids_T, positions_T, [RequestRows(cache, len(token_ids_T), seen_TT)], keep
            )
        masking = contextlib.nullcontext() if seen_TT is None else self._mask.over(seen_TT, positions_T, cache.length)
        with masking as mask:
            return self._run_model(token_ids_T, positions_T, mask, cache, keep)

    def forward_trees(self, trees: Sequence[DraftTree], caches: Sequence[TreeCache]) -> Tensor:
        """Logits [T, V] of all rows of several requests' trees, each behind what its own cache holds; as `forward`."""
        pairs = list(zip(trees, caches, strict=True))
        token_ids_T = torch.cat([tree.tokens_T for tree in trees])
        positions_T = torch.cat([tree.depths_T + cache.length for tree, cache in pairs])
        requests = [RequestRows(cache, tree.num_rows, tree.mask_TT) for tree, cache in pairs]
        if self._lean is not None:
            return self._run_lean(self._lean, token_ids_T, positions_T, requests, len(token_ids_T))
        joined = BatchCache(requests)
        mask_TS, key_positions_S = joined.mask(positions_T, self.dtype)
        mask = mask_by_type(mask_TS, self.windows, positions_T, key_positions_S)
        return self._run_model(token_ids_T, positions_T, mask, joined, len(token_ids_T))

    def _run_lean(
        self, lean: LeanDecoder, token_ids_T: Tensor, positions_T: Tensor, requests: Sequence[RequestRows], keep: int
    ) -> Tensor:
        assert self._router is not None
        logits_TV, entering = lean.forward(token_ids_T, positions_T, requests, keep, self._router)
        self._features = {number: entering[number] for number in self._tap_layers}
        return logits_TV

    def forward_masked(
        self, token_ids_T: Tensor, positions_T: Tensor, mask_TS: Tensor, key_positions_S: Tensor, cache: TreeCache
    ) -> Tensor:
        """Logits [T, V] where the additive mask [1, 1, T, S] says what each row sees of all that the cache stores."""
        mask = mask_by_type(mask_TS, self.windows, positions_T, key_positions_S)
        return self._run_model(token_ids_T, positions_T, mask, cache, len(token_ids_T))

    def _run_model(
        self, token_ids_T: Tensor, positions_T: Tensor, mask: Mask | None, cache: Cache, keep: int
    ) -> Tensor:
        with self._own_attention() if mask is not None else contextlib.nullcontext():
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
    def _own_attention(self) -> Iterator[None]:
        """Inside: SDPA with a mask without a copy of every key for each group of heads."""
        swapped = [config for config in self._configs if config._attn_implementation == "sdpa"]
        for config in swapped:
            config._attn_implementation_internal = self._key
        try:
            yield
        finally:
            for config in swapped:
                config._attn_implementation_internal = "sdpa"

    def _run_experts(self, experts: Any, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """As transformers would run them inside a step."""
        return ALL_EXPERTS_FUNCTIONS[self._key](experts, x_TD, ids_TK, weights_TK)

    def features(self) -> Tensor | None:
        """[T, num_taps * D]: the tapped residuals of the last forward inside a step; None without taps."""
        if not self._tap_layers:
            return None
        return torch.cat([self._features[number] for number in self._tap_layers], dim=-1)

    def close(self) -> None:
        """Remove every hook and the experts function; the model is as it was."""
        for handle in (*self._handles, *self._tap_handles):
            handle.remove()
        for module in self._packed:
            vars(module).pop("forward", None)
        if self._fused is not None:
            self._fused.close()
        self._handles, self._tap_handles, self._packed = [], [], []
        for functions in (ALL_EXPERTS_FUNCTIONS, ALL_ATTENTION_FUNCTIONS):
            if self._key in functions:
                del functions[self._key]

    def _router_hook(self, number: int) -> Callable:
        def hook(module: nn.Module, args: tuple, output: tuple) -> tuple | None:
            if self._router is None:
                return None
            plan = self._router.route(number, RouterOutput(*output[:3]))
            return output[0], plan.weights_TK, plan.ids_TK, *output[3:]

        return hook

    def _tap_hook(self, number: int) -> Callable:
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            if self._router is not None:
                self._features[number] = (args[0] if args else kwargs["hidden_states"])[0]

        return hook


def _versions(model: PreTrainedModel) -> list[tuple]:
    return [version(parameter) for parameter in model.parameters()]
