"""The caches of several requests as one, for a forward through the model's modules over the rows of them all.

Owns the split of new rows by request and the mask that keeps requests apart. Every layer sees all requests' keys side
by side: as many copies and products more as there are requests, and right for any attention that takes a mask. Small
models on the CPU do without (`native/attention.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from moespec.dense import hidden_value
from moespec.hf import Cache, CacheLayerMixin
from moespec.kv_cache import TreeCache, TreeCacheLayer


class RequestRows(NamedTuple):
    """A request's rows in a forward: how many, and which of them each sees, bool [T, T] (None: causal)."""

    cache: TreeCache
    num_rows: int
    seen_TT: Tensor | None


class BatchCacheLayer(CacheLayerMixin):
    """One attention layer's caches, request by request."""

    is_sliding = False

    def __init__(self, layers: Sequence[TreeCacheLayer], sizes: list[int]) -> None:
        super().__init__()
        self._layers, self._sizes = layers, sizes

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Each request's layer initialises itself."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Append every request's rows to its own cache; returns all positions of all requests, one after the other."""
        parts = zip(self._layers, key_states.split(self._sizes, 2), value_states.split(self._sizes, 2), strict=True)
        stored = [layer.update(keys, values) for layer, keys, values in parts]
        keys, values = (torch.cat(some, dim=2) for some in zip(*stored, strict=True))
        return keys, values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + int(query_length), 0

    def get_seq_length(self) -> int:
        return sum(layer.length for layer in self._layers)

    def get_max_length(self) -> int:
        return -1

    def get_max_cache_shape(self) -> int:
        """The name of `get_max_length` before transformers 5.20."""
        return -1


class BatchCache(Cache):
    """What is handed to the model for one forward over these requests' rows."""

    def __init__(self, requests: Sequence[RequestRows]) -> None:
        self._requests = requests
        sizes = [rows.num_rows for rows in requests]
        by_layer = zip(*(rows.cache.layers for rows in requests), strict=True)
        super().__init__(layers=[BatchCacheLayer(layers, sizes) for layers in by_layer])

    def mask(self, positions_T: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Before the forward: additive [1, 1, T, S], a row sees its own request's prefix and the rows it may see; and
        every key's position, int64 [S]."""
        device, key_positions = positions_T.device, []
        num_keys = sum(rows.cache.length + rows.num_rows for rows in self._requests)
        num_rows = sum(rows.num_rows for rows in self._requests)
        mask_TS = torch.full((num_rows, num_keys), hidden_value(dtype), dtype=dtype, device=device)
        row = key = 0
        for cache, size, seen_TT in self._requests:
            own_TS = mask_TS[row : row + size, key : key + cache.length + size]
            own_TS[:, : cache.length] = 0
            assert seen_TT is not None, "a prompt is read alone"
            own_TS[:, cache.length :].masked_fill_(seen_TT, 0)
            key_positions += [torch.arange(cache.length, device=device), positions_T[row : row + size]]
            row, key = row + size, key + cache.length + size
        return mask_TS[None, None], torch.cat(key_positions)
