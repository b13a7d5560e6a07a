"""Attention modules that a step on a GPU runs with fewer launches: one product for queries, keys and values, one kernel
for their norms, their rotation and the cache.

Owns the replacement of their `forward`: for modules of the usual parts alone, which it reproduces on a probe, and only
in a step of fixed shape; elsewhere the module's own code runs. Knows nothing of trees: the mask says what is seen.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moespec.dense import hidden_value
from moespec.fused import NUM_PROBE_ROWS, are_alike, eps_of, probe
from moespec.kv_cache import TreeCache

_JOINED, _NORMS = ("q_proj", "k_proj", "v_proj"), ("q_norm", "k_norm")
_PARAMETERS = {f"{name}.{kind}" for name in (*_JOINED, "o_proj") for kind in ("weight", "bias")}
_PARAMETERS |= {f"{name}.weight" for name in _NORMS}
_log = logging.getLogger(__name__)

Attend = Callable[..., tuple[Tensor, None]]


class FusedAttention:
    """A `forward` for an attention module. Make it with `of`."""

    def __init__(self, module: Any, attend: Attend) -> None:
        self._module, self._attend = module, attend
        self._projections = [getattr(module, name) for name in _JOINED]
        self._weight = _joined([layer.weight for layer in self._projections])
        has_bias = self._projections[0].bias is not None
        self._bias = _joined([layer.bias for layer in self._projections]) if has_bias else None

    @staticmethod
    def of(module: Any, attend: Attend) -> FusedAttention | None:
        """The stand-in, or None for a module of other parts, or one that it does not reproduce.

        The projections' weights become views of one tensor, so that nothing lies in memory twice.
        """
        if not _has_usual_parts(module):
            return None
        try:
            fused = FusedAttention(module, attend)
            if not fused._reproduces():
                return None
        except Exception as error:  # a kernel that does not compile here, or a module that wants to be told more
            _log.warning("%s runs as it is: %s", type(module).__name__, error)
            return None
        for whole, parts in fused._wholes():
            _become_views(parts, whole)
        return fused

    def is_current(self) -> bool:
        """Whether the module still has the parts that were joined, and they no code of their own."""
        if not _has_usual_parts(self._module):
            return False
        if any(getattr(self._module, name) is not own for name, own in zip(_JOINED, self._projections, strict=True)):
            return False
        return all(
            part.data_ptr() == view.data_ptr()
            for whole, parts in self._wholes()
            for part, view in zip(parts, _views(whole, parts), strict=True)
        )

    def __call__(self, hidden_states: Tensor, *args: Any, **given: Any) -> Any:
        cache, turns = given.get("past_key_values"), given.get("position_embeddings")
        is_fixed = not args and isinstance(cache, TreeCache) and cache.rows_T is not None
        if not is_fixed or turns is None or turns[0].shape[-1] != self._module.head_dim:
            return type(self._module).forward(self._module, hidden_states, *args, **given)
        return self._run(hidden_states[0], turns, given.get("attention_mask"), cache)[None], None

    def _run(self, x_TD: Tensor, turns: tuple[Tensor, Tensor], mask: Tensor | None, cache: Any) -> Tensor:
        from kernels.rotate import rotate

        stored = cache.layers[self._module.layer_idx]
        qkv_TX = F.linear(x_TD, self._weight, self._bias)
        turns_Td = turns[0][0].contiguous(), turns[1][0].contiguous()
        queries = rotate(qkv_TX, turns_Td, self._norms(), cache.rows_T, stored.keys[0], stored.values[0])
        keys, values = stored.keys, stored.values
        attended, _ = self._attend(self._module, queries[None], keys, values, mask, scaling=self._module.scaling)
        return self._module.o_proj(attended.reshape(len(x_TD), -1))

    def _norms(self) -> Any:
        from kernels.rotate import HeadNorms

        query, key = _norms_of(self._module)
        return None if query is None else HeadNorms(query.weight, key.weight, eps_of(query))

    def _wholes(self) -> list[tuple[Tensor, list[nn.Parameter]]]:
        """What is joined, of which parts."""
        found = [(self._weight, [layer.weight for layer in self._projections])]
        if self._bias is not None:
            found.append((self._bias, [layer.bias for layer in self._projections]))
        return found

    def _reproduces(self) -> bool:
        """Whether a few rows come out alike, and what is kept of them, too."""
        module, like, num_rows = self._module, self._weight, NUM_PROBE_ROWS
        x = probe(module.q_proj.in_features, like)[None]
        angles = probe(module.head_dim // 2, like).repeat(1, 2)[None]
        cache = TreeCache(module.layer_idx + 1)
        hidden = hidden_value(like.dtype)
        mask_TT = torch.full((num_rows, num_rows), hidden, dtype=like.dtype, device=like.device).triu(1)
        given = {"position_embeddings": (angles.cos(), angles.sin()), "past_key_values": cache}
        theirs = type(module).forward(module, x, attention_mask=mask_TT[None, None], **given)
        stored = cache.layers[module.layer_idx]
        mask_TS = torch.full((num_rows, stored.keys.shape[2]), hidden, dtype=like.dtype, device=like.device)
        mask_TS[:, num_rows : 2 * num_rows] = mask_TT
        with cache.writing_at(torch.arange(num_rows, 2 * num_rows, device=like.device)):
            ours = self(x, attention_mask=mask_TS[None, None], **given)
        pairs = [part[:, :, : 2 * num_rows].chunk(2, dim=2) for part in (stored.keys, stored.values)]
        is_kept_alike = all(are_alike(own, other) for other, own in pairs)
        return len(theirs) == len(ours) and are_alike(ours[0], theirs[0]) and is_kept_alike


def _has_usual_parts(module: Any) -> bool:
    """Projections, perhaps with biases, perhaps norms of queries and keys; nothing else that a probe might not feel."""
    if not {name for name, _ in module.named_parameters()} <= _PARAMETERS:
        return False  # sinks, gates
    if any(not hasattr(module, name) for name in ("head_dim", "scaling", "layer_idx", "config")):
        return False
    projections = [getattr(module, name, None) for name in (*_JOINED, "o_proj")]
    if not all(type(layer) is nn.Linear and _is_plain(layer) for layer in projections):
        return False
    for kind in ("weight", "bias"):
        parts = [getattr(layer, kind) for layer in projections[: len(_JOINED)]]
        if len({None if part is None else (part.dtype, part.device) for part in parts}) > 1:
            return False
    norms = _norms_of(module)
    if any(
        norm is not None and (isinstance(norm, nn.LayerNorm) or not isinstance(eps_of(norm), float)) for norm in norms
    ):
        return False
    if (norms[0] is None) != (norms[1] is None) or eps_of(norms[0]) != eps_of(norms[1]):
        return False
    return getattr(module.config, "clip_qkv", None) is None  # OLMoE's; a limit that no probe may reach


def _norms_of(module: Any) -> tuple[Any, Any]:
    return getattr(module, "q_norm", None), getattr(module, "k_norm", None)


def _is_plain(layer: nn.Module) -> bool:
    """Whether calling it runs its class's code and nothing beside that."""
    return "forward" not in vars(layer) and not layer._forward_hooks and not layer._forward_pre_hooks


def _joined(parts: list[nn.Parameter]) -> Tensor:
    """One tensor of all parts; no inference tensor where they are none: the model may be trained later."""
    with torch.inference_mode(parts[0].is_inference()), torch.no_grad():
        return torch.cat([part.detach() for part in parts])


def _views(whole: Tensor, parts: list[nn.Parameter]) -> tuple[Tensor, ...]:
    return whole.split([len(part) for part in parts])


def _become_views(parts: list[nn.Parameter], whole: Tensor) -> None:
    with torch.inference_mode(parts[0].is_inference()), torch.no_grad():
        for part, view in zip(parts, _views(whole, parts), strict=True):
            part.data = view
