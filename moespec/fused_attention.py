"""Attention modules that a step on a GPU runs with fewer launches: one product for queries, keys and values, one kernel
for their norms, their rotation and the cache.

Owns the replacement of their `forward`, only where it reproduces the module on a probe, and only in a step of fixed
shape; elsewhere the module's own code runs. Knows nothing of trees: the mask says what is seen.
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

_PROJECTIONS = ("q_proj", "k_proj", "v_proj")
_log = logging.getLogger(__name__)


class FusedAttention:
    """A `forward` for an attention module with the usual parts. Make it with `of`."""

    def __init__(self, module: Any, attend: Callable[..., tuple[Tensor, None]]) -> None:
        self._module, self._attend = module, attend
        self.refresh()

    @staticmethod
    def of(module: Any, attend: Callable[..., tuple[Tensor, None]]) -> FusedAttention | None:
        """The stand-in, or None for a module of other parts, or one that it does not reproduce."""
        projections = [getattr(module, name, None) for name in (*_PROJECTIONS, "o_proj")]
        has_parts = all(type(part) is nn.Linear and "forward" not in vars(part) for part in projections)
        if not has_parts or any(not hasattr(module, name) for name in ("head_dim", "scaling", "layer_idx", "config")):
            return None
        if len({module.get_parameter(f"{name}.weight").dtype for name in _PROJECTIONS}) > 1:
            return None
        if len({getattr(module, name).bias is None for name in _PROJECTIONS}) > 1:
            return None
        if (getattr(module, "q_norm", None) is None) != (getattr(module, "k_norm", None) is None):
            return None
        try:
            fused = FusedAttention(module, attend)
            return fused if fused._reproduces() else None
        except Exception as error:  # a kernel that does not compile here, or a module that wants to be told more
            _log.info("attention stays as it is: %s", error)
            return None

    def refresh(self) -> None:
        """Join the projections' weights: they become views of one tensor, so that nothing lies in memory twice."""
        layers = [getattr(self._module, name) for name in _PROJECTIONS]
        self._weight = _joined([layer.weight for layer in layers])
        self._bias = None if layers[0].bias is None else _joined([layer.bias for layer in layers])

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

        query, key = getattr(self._module, "q_norm", None), getattr(self._module, "k_norm", None)
        if query is None or key is None:
            return None
        return HeadNorms(query.weight, key.weight, eps_of(query))

    def _reproduces(self) -> bool:
        """Whether a few rows come out alike, and what is kept of them, too."""
        module, like, num_rows = self._module, self._weight, NUM_PROBE_ROWS
        x = probe(module.q_proj.in_features, like)[None]
        angles = probe(module.head_dim // 2, like).repeat(1, 2)[None]
        cache = TreeCache(module.layer_idx + 1)
        hidden = hidden_value(like.dtype)
        mask_TT = torch.full((num_rows, num_rows), hidden, dtype=like.dtype, device=like.device).triu(1)
        given = {"position_embeddings": (angles.cos(), angles.sin()), "past_key_values": cache}
        theirs = type(module).forward(module, x, attention_mask=mask_TT[None, None], **given)[0]
        stored = cache.layers[module.layer_idx]
        mask_TS = torch.full((num_rows, stored.keys.shape[2]), hidden, dtype=like.dtype, device=like.device)
        mask_TS[:, num_rows : 2 * num_rows] = mask_TT
        with cache.writing_at(torch.arange(num_rows, 2 * num_rows, device=like.device)):
            ours = self(x, attention_mask=mask_TS[None, None], **given)[0]
        pairs = [part[:, :, : 2 * num_rows].chunk(2, dim=2) for part in (stored.keys, stored.values)]
        return are_alike(ours, theirs) and all(are_alike(own, other) for other, own in pairs)


def _joined(parts: list[nn.Parameter]) -> Tensor:
    """One tensor of all parts, which become views of it."""
    # No inference tensors: the model may be trained later.
    with torch.inference_mode(False), torch.no_grad():
        whole = torch.cat([part.detach() for part in parts])
        for part, view in zip(parts, whole.split([len(part) for part in parts]), strict=True):
            part.data = view
    return whole
