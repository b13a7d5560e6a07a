"""The key-value cache of one conversation: write tree rows behind the prefix, keep the accepted path.

Owns preallocated storage per layer that grows by doubling. Knows nothing of trees beyond row numbers.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from moespec.hf import Cache, CacheLayerMixin
from moespec.native import kernels_for

INITIAL_CAPACITY = 512  # positions; a short chat never grows


class TreeCacheLayer(CacheLayerMixin):
    """One attention layer's keys and values [1, heads, capacity, head_dim]; the first `length` positions count."""

    is_sliding = False

    keys: Any  # Tensors once initialised; the base class allows None
    values: Any

    def __init__(self) -> None:
        super().__init__()
        self.length = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self._initialize(tuple(key_states.shape), key_states)

    def _initialize(self, shape: tuple[int, ...], like: Tensor) -> None:
        self.keys, self.values = (_empty(shape, INITIAL_CAPACITY, like) for _ in range(2))
        self.is_initialized = True
        self._arrays: tuple[Any, Any] | None = None

    def arrays(self) -> tuple[Any, Any]:
        """Keys and values [heads, capacity, head_dim] as numpy arrays over the same memory; on the CPU."""
        if self._arrays is None:
            self._arrays = self.keys[0].numpy(), self.values[0].numpy()
        return self._arrays

    def reserve(self, shape: tuple[int, ...], like: Tensor) -> int:
        """Make room for rows of [1, heads, rows, head_dim] and count them; returns the first's position."""
        if not self.is_initialized:
            self._initialize(shape, like)
        start, end = self.length, self.length + shape[2]
        if end > self.keys.shape[2]:
            self.keys, self.values = _grown(self.keys, start, end), _grown(self.values, start, end)
            self._arrays = None
        self.length = end
        return start

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Append the new rows; returns views of all positions, the new ones included."""
        start = self.reserve(tuple(key_states.shape), key_states)
        end = self.length
        self.keys[:, :, start:end] = key_states
        self.values[:, :, start:end] = value_states
        return self.keys[:, :, :end], self.values[:, :, :end]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + int(query_length), 0

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return -1

    def get_max_cache_shape(self) -> int:
        """The name of `get_max_length` before transformers 5.20."""
        return -1


class TreeCache(Cache):
    """The cache that the engine hands to the model."""

    layers: Any  # list[TreeCacheLayer]; the base class allows kinds that we never build

    def __init__(self, num_layers: int) -> None:
        super().__init__(layers=[TreeCacheLayer() for _ in range(num_layers)])

    @property
    def length(self) -> int:
        return self.layers[0].length

    def truncate(self, length: int) -> None:
        """Forget every position from `length` on."""
        assert length <= self.length
        for layer in self.layers:
            layer.length = length

    def keep_path(self, prefix_length: int, path: list[int]) -> None:
        """Of the tree rows written at `prefix_length`, keep those of `path` (increasing row numbers), in its order.

        Keys need no new rotation: a row's position was prefix + depth, and the path has one row per depth.
        """
        length = prefix_length + len(path)
        if path != list(range(len(path))):
            self._move_up(prefix_length, path)
        self.truncate(length)

    def _move_up(self, start: int, path: list[int]) -> None:
        keys = self.layers[0].keys
        kernels = kernels_for(keys)
        if kernels is not None:
            rows = np.array(path)
            for layer in self.layers:
                kernels.attention.keep_rows(*layer.arrays(), start, rows)
            return
        rows_N, end = torch.tensor(path, device=keys.device) + start, start + len(path)
        for layer in self.layers:
            for stored in (layer.keys, layer.values):
                stored[:, :, start:end] = stored.index_select(2, rows_N)


def _empty(shape: tuple[int, ...], capacity: int, like: Tensor) -> Tensor:
    batch, heads, num_rows, head_dim = shape
    return like.new_empty(batch, heads, max(capacity, num_rows), head_dim)


def _grown(stored: Tensor, length: int, needed: int) -> Tensor:
    grown = _empty(tuple(stored.shape), max(2 * stored.shape[2], needed), stored)
    grown[:, :, :length] = stored[:, :, :length]
    return grown
