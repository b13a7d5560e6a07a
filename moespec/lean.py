"""A decoder run through compiled kernels, for models whose step would mostly be the cost of calling modules.

Owns what stands in for the modules, on copies of their weights, and the rule for where it does: a small fp32 model on
the CPU whose layers have the usual parts and whose logits are reproduced on a probe. Under no policy or MoE-Spec the
whole decoder is one call; any other policy is asked layer by layer. Experts that no kernel fits run as the experts
function runs them. Knows nothing of trees, budgets or steps.

Measured on 2 cores, fp32, 8 layers of width 256, 64 experts top-8, median ms of a token decoded plainly: transformers'
generate 11.7, here 2.1 (`assets/bench/decode-cpu.json`).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from moespec.batch_cache import RequestRows
from moespec.config import MAX_TREE_TOKENS
from moespec.experts import PackedExperts, can_compile
from moespec.kv_cache import TreeCache
from moespec.native import array, load_kernels, use_threads
from moespec.native.weights import Weight, exact
from moespec.routing import FAMILIES, RouterOutput
from moespec.step_router import NaturalRouter, StepRouter, StepRouting

if TYPE_CHECKING:
    from moespec.moe_layers import MoeLayer

MAX_HIDDEN_SIZE = 1024  # beyond, the products outweigh the calls
MAX_COPIED_BYTES = 2**30
NUM_PROBE_TOKENS = 6
PROBE_TOLERANCE = 1e-4  # of the largest logit

_CAUSAL = np.empty((1, 0), np.bool_)

Experts = Callable[[Any, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class _Layer:
    """One decoder layer's arrays (see `native.attention.attention`) and what follows its attention."""

    input_norm: np.ndarray
    qkv: Weight
    query_key_norms: np.ndarray
    out: Weight
    scale: float
    num_kv_heads: int
    mlp_norm: np.ndarray
    mlp: Any
    router: Weight | None  # None: the MLP is run as a module
    experts: PackedExperts | None  # None: the experts' own function runs them
    kind: int  # of the router's family

    def arrays(self) -> tuple[Any, ...]:
        """As `native.decoder.decode` takes them."""
        assert self.router is not None and self.experts is not None
        return (
            *(self.input_norm, self.qkv, self.query_key_norms, self.out, self.mlp_norm),
            *(self.router, self.experts.gate_up, self.experts.down),
        )


class LeanDecoder:
    """Stands in for a causal model's forward. Make it with `of`."""

    def __init__(self, model: Any, layers: Sequence[Any], moe_layers: list[MoeLayer], experts: Experts) -> None:
        self._kernels: Any = load_kernels()
        self._model, self._experts = model, experts
        config = model.config.get_text_config()
        self._eps: float = config.rms_norm_eps
        self._top_k: int = config.num_experts_per_tok
        families = {moe.layer: FAMILIES.index(moe.family) for moe in moe_layers}
        self._moe_numbers = {moe.layer: number for number, moe in enumerate(moe_layers)}
        self._layers = [_lean_layer(layer, families.get(number)) for number, layer in enumerate(layers)]
        # Copies throughout: half of a model whose weights were changed unseen would be no model's.
        self._final = array(model.model.norm.weight), exact(model.lm_head.weight)
        self._like = model.model.embed_tokens.weight.detach()
        self._embeddings = array(self._like)
        self._table: Any = None
        # A table where turns depend on positions alone; a tree's rows reach past the context.
        if getattr(model.model.rotary_emb, "rope_type", None) == "default":
            self._table = self._rotate(torch.arange(config.max_position_embeddings + MAX_TREE_TOKENS))
        uniform = len({(layer.kind, layer.scale) for layer in self._layers}) == 1
        routed = [layer for layer in self._layers if layer.experts is not None]
        self._is_one_call = uniform and len(routed) == len(self._layers)
        self._all_arrays = tuple(layer.arrays() for layer in routed) if self._is_one_call else ()

    @staticmethod
    @torch.inference_mode()
    def of(model: Any, layers: Any, moe_layers: list[MoeLayer], experts: Experts) -> LeanDecoder | None:
        """The stand-in, or None where it does not pay or does not reproduce the model."""
        if unsupported_reason(model, layers) is not None or load_kernels() is None:
            return None
        if any(moe.family not in FAMILIES for moe in moe_layers):
            return None
        lean = LeanDecoder(model, layers, moe_layers, experts)
        tokens_T, positions_T = torch.arange(NUM_PROBE_TOKENS), torch.arange(NUM_PROBE_TOKENS)
        expected_TV = model(tokens_T[None], use_cache=False).logits[0]
        router = NaturalRouter(NUM_PROBE_TOKENS)
        rows = [RequestRows(TreeCache(len(layers)), NUM_PROBE_TOKENS, None)]
        logits_TV, _ = lean.forward(tokens_T, positions_T, rows, NUM_PROBE_TOKENS, router)
        error = (logits_TV - expected_TV).abs().max()
        return lean if error <= PROBE_TOLERANCE * expected_TV.abs().max() else None

    def forward(
        self,
        token_ids_T: Tensor,
        positions_T: Tensor,
        requests: Sequence[RequestRows],
        keep: int,
        router: StepRouter,
    ) -> tuple[Tensor, Sequence[Tensor] | Tensor]:
        """(logits [keep, V] of the last rows, the residual [T, D] entering each layer); see `Target.forward`."""
        use_threads()
        embeds = self._embeddings.take(token_ids_T.numpy(), axis=0)
        turns = self._turns(positions_T)
        tables, seen = self._tables(requests, turns[0].shape[1]), _seen(requests)
        budget = router.compiled_budget() if self._is_one_call else None
        if budget is None:
            return self._layer_by_layer(embeds, turns, (tables, seen), keep, router)
        first = self._layers[0]
        logits, entering, *routing, kept = self._kernels.decoder.decode(
            *(embeds, self._all_arrays, tables, self._final, self._eps, *turns, seen),
            (self._top_k, first.kind, first.scale),
            (
                budget.is_shared,
                (budget.natural, budget.protect_root, budget.size, budget.coverage, budget.truncates),
            ),
            *(budget.row_weights_T.numpy(), keep),
        )
        sizes = [rows.num_rows for rows in requests]
        parts = [torch.from_numpy(part) for part in routing]
        router.record(StepRouting.by_request(parts, list(torch.from_numpy(kept)), sizes))
        return torch.from_numpy(logits), torch.from_numpy(entering)

    def _tables(self, requests: Sequence[RequestRows], head_dim: int) -> np.ndarray:
        """Each layer's table for `native.attention`, int64 [L, R, 7]; room for the rows is made."""
        tables = np.empty((len(self._layers), len(requests), 7), np.int64)
        first = 0
        for number, (cache, num_rows, _) in enumerate(requests):
            start = cache.length
            for layer, kept in zip(self._layers, cache.layers, strict=True):
                kept.reserve((1, layer.num_kv_heads, num_rows, head_dim), self._like)
            tables[:, number, :4] = first, num_rows, start, start
            tables[:, number, 4:] = cache.places()
            first += num_rows
        return tables

    def _layer_by_layer(
        self, hidden: np.ndarray, turns: Any, place: tuple[np.ndarray, np.ndarray], keep: int, router: StepRouter
    ) -> tuple[Tensor, list[Tensor]]:
        layers, entering, (tables, seen) = self._kernels.layers, [], place
        for number, layer in enumerate(self._layers):
            entering.append(torch.from_numpy(hidden))
            hidden = hidden + self._kernels.attention.attention(
                layers.unit_rows(hidden, layer.input_norm, self._eps),
                *(layer.qkv, layer.query_key_norms, self._eps, layer.out, *turns, tables[number], seen, layer.scale),
            )
            hidden = hidden + self._mlp(number, layer, layers.unit_rows(hidden, layer.mlp_norm, self._eps), router)
        norm, lm_head = self._final
        return torch.from_numpy(layers.linear(layers.unit_rows(hidden[-keep:], norm, self._eps), lm_head)), entering

    def _mlp(self, number: int, layer: _Layer, x: np.ndarray, router: StepRouter) -> np.ndarray:
        x_TD = torch.from_numpy(x)
        if layer.router is None:
            return layer.mlp(x_TD[None])[0].numpy()
        logits = self._kernels.layers.linear(x, layer.router)
        probs, ids, weights = self._kernels.routing.route(logits, self._top_k, layer.kind)
        output = RouterOutput(*(torch.from_numpy(part) for part in (logits, weights, ids, probs)))
        plan = router.route(self._moe_numbers[number], output)
        run = self._experts if layer.experts is None else layer.experts.run
        return run(layer.mlp.experts, x_TD, plan.ids_TK, plan.weights_TK).numpy()

    def _turns(self, positions_T: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """cos and sin [T, d] of the rows' positions."""
        if self._table is None:
            return self._rotate(positions_T)
        positions = positions_T.numpy()
        return self._table[0].take(positions, axis=0), self._table[1].take(positions, axis=0)

    def _rotate(self, positions_T: Tensor) -> tuple[np.ndarray, np.ndarray]:
        like = self._model.model.embed_tokens.weight
        cos, sin = (array(part[0]) for part in self._model.model.rotary_emb(like, positions_T[None]))
        return cos, sin


def _seen(requests: Sequence[RequestRows]) -> np.ndarray:
    """The mask [T, M] of `native.attention`: of the rows of its request, which each row sees; no columns for causal."""
    if len(requests) == 1:
        seen_TT = requests[0].seen_TT
        return _CAUSAL if seen_TT is None else seen_TT.numpy()
    sizes = [rows.num_rows for rows in requests]
    seen, first = np.zeros((sum(sizes), max(sizes)), np.bool_), 0
    for _, size, seen_TT in requests:
        assert seen_TT is not None, "a prompt is read alone"
        seen[first : first + size, :size] = seen_TT.numpy()
        first += size
    return seen


def unsupported_reason(model: Any, layers: Sequence[Any]) -> str | None:
    """Why a model is not even tried, in words; None if its numbers decide."""
    weight = next(model.parameters())
    config = model.config.get_text_config()
    if weight.device.type != "cpu" or weight.dtype != torch.float32:
        return "it is not in fp32 on a CPU"
    if config.hidden_size > MAX_HIDDEN_SIZE:
        return "its layers are wide"
    if sum(parameter.numel() * 4 for parameter in model.parameters()) > MAX_COPIED_BYTES:
        return "a copy of its weights would be large"
    base: Any = getattr(model, "model", None)
    if any(not hasattr(base, name) for name in ("embed_tokens", "rotary_emb", "norm")):
        return "it has other parts"
    rotary = getattr(base.rotary_emb, "forward", None)
    if rotary is None or list(inspect.signature(rotary).parameters) != ["x", "position_ids"]:
        return "its rotary embedding depends on more than positions"
    if type(base.embed_tokens) is not nn.Embedding:
        return "its embeddings are no plain table"
    if any(not hasattr(config, name) for name in ("rms_norm_eps", "num_experts_per_tok")):
        return "its config names no norm or no number of experts"
    for layer in layers:
        attention: Any = getattr(layer, "self_attn", None)
        wanted = [(attention, name) for name in ("q_proj", "k_proj", "v_proj", "o_proj", "head_dim", "scaling")]
        wanted += [(layer, name) for name in ("input_layernorm", "post_attention_layernorm", "mlp")]
        if any(not hasattr(owner, name) for owner, name in wanted):
            return "its layers have other parts"
        if any(getattr(attention, name).bias is not None for name in ("q_proj", "k_proj", "v_proj", "o_proj")):
            return "its attention adds biases"
        norm = getattr(attention, "q_norm", None)
        if norm is not None and norm.weight.shape != (attention.head_dim,):
            return "its queries are normalised across heads"
    return None


def _lean_layer(layer: Any, kind: int | None) -> _Layer:
    attention, mlp = layer.self_attn, layer.mlp
    num_q, num_kv = (p.out_features // attention.head_dim for p in (attention.q_proj, attention.k_proj))
    routes_only = {name for name, _ in mlp.named_children()} == {"gate", "experts"} and kind is not None
    return _Layer(
        input_norm=array(layer.input_layernorm.weight),
        qkv=exact(attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight),
        query_key_norms=_query_key_norms(attention, num_q, num_kv),
        out=exact(attention.o_proj.weight),
        scale=attention.scaling,
        num_kv_heads=num_kv,
        mlp_norm=array(layer.post_attention_layernorm.weight),
        mlp=mlp,
        router=exact(mlp.gate.weight) if routes_only else None,
        experts=PackedExperts(mlp.experts) if routes_only and can_compile(mlp.experts) else None,
        kind=kind or 0,
    )


def _query_key_norms(attention: Any, num_q: int, num_kv: int) -> np.ndarray:
    """[Hq + Hkv, d], or no columns where queries and keys are not normalised."""
    if getattr(attention, "q_norm", None) is None:
        return np.empty((num_q + num_kv, 0), np.float32)
    weights = (attention.q_norm.weight.expand(num_q, -1), attention.k_norm.weight.expand(num_kv, -1))
    return array(torch.cat(weights))
