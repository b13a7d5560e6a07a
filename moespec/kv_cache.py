"""The key-value cache of one conversation: write tree rows behind the prefix, keep the accepted path.

Owns preallocated storage per layer that grows by doubling. Knows nothing of trees beyond row numbers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moespec.hf import Cache, CacheLayerMixin
from moespec.native import kernels_for

INITIAL_CAPACITY = 512  # positions; a short chat never grows
ALIGNED = 64  # positions; fused attention wants rows of a mask to begin at multiples of 16 bytes


class TreeCacheLayer(CacheLayerMixin):
    """One attention layer's keys and values [1, heads, capacity, head_dim]; the first `length` positions count."""

    is_sliding = False

    keys: Any  # Tensors once initialised; the base class allows None
    values: Any

    def __init__(self, cache: TreeCache) -> None:
        super().__init__()
        self._cache = cache
        self._arrays: tuple[Any, Any] | None = None
        self.length = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self._initialize(tuple(key_states.shape), tuple(value_states.shape), key_states)

    def _initialize(self, key_shape: tuple[int, ...], value_shape: tuple[int, ...], like: Tensor) -> None:
        self.keys, self.values = (_empty(shape, INITIAL_CAPACITY, like) for shape in (key_shape, value_shape))
        self.is_initialized = True
        self._moved()

    def arrays(self) -> tuple[Any, Any]:
        """Keys and values [heads, capacity, head_dim] as numpy arrays over the same memory; on the CPU."""
        if self._arrays is None:
            self._arrays = self.keys[0].numpy(), self.values[0].numpy()
        return self._arrays

    def reserve(self, shape: tuple[int, ...], like: Tensor) -> int:
        """Make room for rows of [1, heads, rows, head_dim] and count them; returns the first's position."""
        if not self.is_initialized:
            self._initialize(shape, shape, like)
        start, end = self.length, self.length + shape[2]
        if end > self.keys.shape[2]:
            self.grow(end)
        self.length = end
        return start

    def grow(self, num_positions: int) -> None:
        """Larger storage with the same contents."""
        self.keys, self.values = (_grown(part, self.length, num_positions) for part in (self.keys, self.values))
        self._moved()

    def _moved(self) -> None:
        self._arrays = None
        self._cache.forget_places()

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Append the new rows; returns views of all positions, the new ones included.

        In a step of fixed shape (`TreeCache.writing_at`) the rows go where it says and all that is stored is returned.
        """
        rows_T = self._cache.rows_T
        if rows_T is not None:
            self.keys.index_copy_(2, rows_T, key_states)
            self.values.index_copy_(2, rows_T, value_states)
            return self.keys, self.values
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
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
        super().__init__(layers=[TreeCacheLayer(self) for _ in range(num_layers)])
        self.rows_T: Tensor | None = None
        self._table: tuple[tuple[int, ...], Tensor | None] | None = None
        self._places: np.ndarray | None = None

    def places(self) -> np.ndarray:
        """Per layer the capacity and the addresses of keys and values, int64 [L, 3], as `native.attention` takes them.

        On the CPU, for as long as no layer moves to larger storage.
        """
        if self._places is None:
            parts = [(layer.keys.shape[2], layer.keys.data_ptr(), layer.values.data_ptr()) for layer in self.layers]
            self._places = np.array(parts)
        return self._places

    def forget_places(self) -> None:
        self._places = None

    @property
    def length(self) -> int:
        return self.layers[0].length

    @property
    def capacity(self) -> int:
        """Positions that the storage holds; 0 before the first row."""
        return self.layers[0].keys.shape[2] if self.layers[0].is_initialized else 0

    def reserve(self, num_positions: int) -> None:
        """Storage for so many positions in every layer, without counting them; after the first row."""
        if num_positions > self.capacity:
            for layer in self.layers:
                layer.grow(num_positions)

    @contextlib.contextmanager
    def writing_at(self, rows_T: Tensor) -> Iterator[None]:
        """Inside, a forward writes its rows at these positions (int64, on the device), counts none of them, and sees
        everything that is stored: its mask says what of it. For steps of fixed shape, whose addresses must not move.
        """
        self.rows_T = rows_T
        try:
            yield
        finally:
            self.rows_T = None

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
        for layer in self.layers:  # a step of fixed shape has not counted its rows
            layer.length = length

    def _move_up(self, start: int, path: list[int]) -> None:
        keys = self.layers[0].keys
        kernels = kernels_for(keys)
        if kernels is not None:
            rows = np.array(path)
            for layer in self.layers:
                kernels.attention.keep_rows(*layer.arrays(), start, rows)
            return
        table_P = self._address_table() if keys.device.type == "cuda" else None
        if table_P is not None:
            from kernels.keep_rows import keep_rows

            keep_rows(table_P, keys, start, path)
            return
        rows_N, end = torch.tensor(path, device=keys.device) + start, start + len(path)
        for stored in (part for layer in self.layers for part in (layer.keys, layer.values)):
            stored[:, :, start:end] = stored.index_select(2, rows_N)

    def _address_table(self) -> Tensor | None:
        """Where all layers' keys and values lie, for one launch over all of them; None where they are not alike."""
        storage = tuple(layer.keys.data_ptr() for layer in self.layers)
        if self._table is None or self._table[0] != storage:
            from kernels.keep_rows import address_table, are_alike

            caches = [part for layer in self.layers for part in (layer.keys, layer.values)]
            self._table = storage, address_table(caches) if are_alike(caches) else None
        return self._table[1]


def _empty(shape: tuple[int, ...], capacity: int, like: Tensor) -> Tensor:
    # Zeros: where a step sees all that is stored, a weight of 0 does not silence a NaN.
    batch, heads, num_rows, head_dim = shape
    size = -(-max(capacity, num_rows) // ALIGNED) * ALIGNED
    return like.new_zeros(batch, heads, size, head_dim)


def _grown(stored: Tensor, length: int, needed: int) -> Tensor:
    grown = _empty(tuple(stored.shape), max(2 * stored.shape[2], needed), stored)
    grown[:, :, :length] = stored[:, :, :length]
    return grown
