"""An EAGLE-3 head in steps of fixed shape, for CUDA graphs: following the committed tokens, and growing a whole tree.

Owns the buffers. What is computed is `torch_pass.py`'s layer and `tree.py`'s growth; every level is grown and nothing
asked of the device, so that the tree arrives with its padding. Longer passes, which are prompts, run as they are.
"""

from __future__ import annotations

import copy
from functools import partial

import torch
from torch import Tensor

from moespec.config import TreeConfig
from moespec.dense import hidden_value, mask_behind
from moespec.drafters.head import Eagle3Head
from moespec.drafters.torch_pass import HeadLayer, TorchPass
from moespec.graph import Graphs, Prepared
from moespec.tree import Best, Frontier, grow_fixed_tree, least_logp, num_asked, seen_below
from moespec.types import DraftTree

BUCKETS = (1, 2, 4, 8, 16)  # committed tokens of one step: a path and its bonus token


class StaticPass:
    """A `HeadPass`. Graphs are captured anew when the keys and values move to larger storage."""

    has_fixed_shape = True

    def __init__(self, head: Eagle3Head, max_context: int, graphs: Graphs) -> None:
        self._graphs = graphs
        self._begin(TorchPass(head, max_context))

    def _begin(self, eager: TorchPass) -> None:
        self._eager, self._layer, self._kv = eager, eager.layer, eager.kv
        self._extensions: Prepared[Tensor] = Prepared(self._graphs)
        self._growths: Prepared[DraftTree] = Prepared(self._graphs)

    def fork(self) -> StaticPass:
        twin = copy.copy(self)
        twin._begin(self._eager.fork())  # what is captured reads and writes its own keys and values
        return twin

    def extend(self, tokens: list[int], features_NF: Tensor, start: int) -> Tensor:
        size = next((bucket for bucket in BUCKETS if len(tokens) <= bucket), None)
        self._reserve(start + (size or len(tokens)))
        if size is None:
            return self._eager.extend(tokens, features_NF, start)
        make = partial(_Extension, self._layer, self._kv.stored, size)
        return self._extensions.run(size, make, (tokens, features_NF, start))

    def grow(self, state_1D: Tensor, length: int, root: int, config: TreeConfig) -> DraftTree:
        self._reserve(length + config.depth * config.top_k)
        shape = config.total_tokens, config.depth, config.top_k
        make = partial(_Growth, self._layer, self._kv.stored, config)
        return self._growths.run(shape, make, (state_1D, length, root, config))

    def _reserve(self, length: int) -> None:
        before = self._kv.stored
        self._kv.reserve(length)
        if self._kv.stored is not before:
            self._extensions, self._growths = Prepared(self._graphs), Prepared(self._graphs)


class _Extension:
    """The head over N committed pairs, fewer of which may be there."""

    def __init__(self, layer: HeadLayer, stored: Tensor, num_rows: int) -> None:
        self._layer, self._stored = layer, stored
        head, device = layer.head, stored.device
        self._rows_N = torch.arange(num_rows, device=device)
        self._keys_M = torch.arange(stored.shape[2], device=device)
        self._tokens_N = torch.zeros_like(self._rows_N)
        self._features_NF = head.fc.weight.new_zeros(num_rows, head.fc.weight.shape[1])
        self._start_1, self._last_1 = self._rows_N.new_zeros(1), self._rows_N.new_zeros(1)

    def fill(self, tokens: list[int], features_NF: Tensor, start: int) -> None:
        self._tokens_N[: len(tokens)].copy_(torch.tensor(tokens))
        self._features_NF[: len(tokens)].copy_(features_NF)
        self._start_1.fill_(start)
        self._last_1.fill_(len(tokens) - 1)

    def run(self) -> Tensor:
        """The state [1, D] of the last row that is there. Rows behind it write where the next step writes again."""
        positions_N = self._start_1 + self._rows_N
        dtype = self._stored.dtype
        mask_NM = torch.where(self._keys_M > positions_N[:, None], hidden_value(dtype), 0.0).to(dtype)
        store = _Store(self._stored, positions_N)
        hidden_ND = self._layer.head.fuse(self._features_NF)
        states_ND = self._layer.states(self._tokens_N, positions_N, hidden_ND, store, mask_NM)
        return states_ND.index_select(0, self._last_1)


class _Growth:
    """A tree of one shape from the root's state."""

    def __init__(self, layer: HeadLayer, stored: Tensor, config: TreeConfig) -> None:
        self._layer, self._stored, self._config = layer, stored, config
        self._state_1D = stored.new_zeros(1, layer.head.config.hidden_size)
        self._length_1 = torch.zeros(1, dtype=torch.int64, device=stored.device)
        self._root_1 = torch.zeros_like(self._length_1)
        self._least_logp = torch.zeros((), dtype=torch.float32, device=stored.device)

    def fill(self, state_1D: Tensor, length: int, root: int, config: TreeConfig) -> None:
        self._state_1D.copy_(state_1D)
        self._length_1.fill_(length)
        self._root_1.fill_(root)
        self._least_logp.fill_(least_logp(config))

    def run(self) -> DraftTree:
        num_best = num_asked(self._config)
        scorer = _FixedScorer(self._layer, self._stored, self._state_1D, self._length_1, num_best)
        best = self._layer.best(self._state_1D, num_best)
        return grow_fixed_tree(best, scorer, self._root_1, self._config, self._least_logp, self._layer.vocab_map)


class _FixedScorer:
    """Scores the frontier of a growing tree behind a length that only the device knows."""

    def __init__(self, layer: HeadLayer, stored: Tensor, state_1D: Tensor, length_1: Tensor, num_best: int) -> None:
        self._layer, self._stored, self._length_1, self._num_best = layer, stored, length_1, num_best
        self._states_ND = state_1D
        self._keys_M = torch.arange(stored.shape[2], device=stored.device)
        self._seen_NR = torch.zeros(1, 0, dtype=torch.bool, device=stored.device)

    def __call__(self, frontier: Frontier) -> Best:
        hidden_ND = self._layer.next_hidden(self._states_ND)[frontier.parents_N]
        self._seen_NR = seen_below(self._seen_NR, frontier)
        num_rows, num_own = self._seen_NR.shape
        own_R = self._length_1 + torch.arange(num_own, device=self._keys_M.device)
        mask_NM = mask_behind(self._length_1, self._seen_NR, own_R, self._keys_M, self._stored.dtype)
        positions_N = (self._length_1 + frontier.level - 1).expand(num_rows)
        store = _Store(self._stored, own_R[-num_rows:])
        self._states_ND = self._layer.states(frontier.tokens_N, positions_N, hidden_ND, store, mask_NM)
        return self._layer.best(self._states_ND, self._num_best)


class _Store:
    """Writes keys and values at positions on the device and shows everything that is stored."""

    def __init__(self, stored: Tensor, positions_N: Tensor) -> None:
        self._stored, self._positions_N = stored, positions_N

    def __call__(self, keys_HNd: Tensor, values_HNd: Tensor) -> Tensor:
        self._stored[0].index_copy_(1, self._positions_N, keys_HNd)
        self._stored[1].index_copy_(1, self._positions_N, values_HNd)
        return self._stored
