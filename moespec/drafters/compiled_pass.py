"""An EAGLE-3 head on compiled CPU kernels: a pass is one call, and so is the growth of a whole tree.

Its matrices are quantized to int8: every level of a tree reads all of them, and that is what a level costs. A drafter
may be wrong: without a budget that costs tokens per step and nothing else. Sums and all else are fp32. Owns its KV
cache; the formula is `head.py`'s, the kernels are `native/head.py` and `native/tree.py`.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moespec.config import TreeConfig
from moespec.drafters.head import Eagle3Head
from moespec.drafters.passes import KeysAndValues, rope_table
from moespec.native import array, load_kernels, use_threads
from moespec.native.weights import quantized
from moespec.tree import NUM_ALTERNATIVES, least_logp, least_searched_logp, num_asked
from moespec.types import DraftTree


class CompiledPass:
    """A `HeadPass`."""

    has_fixed_shape = False

    def __init__(self, head: Eagle3Head, max_context: int) -> None:
        self._kernels: Any = load_kernels()
        self._head, layer, config = head, head.midlayer, head.config
        attention, mlp = layer.self_attn, layer.mlp
        norms = (layer.input_layernorm, layer.hidden_norm, layer.post_attention_layernorm)
        self._weights = (
            array(torch.stack([norm.weight for norm in norms])),
            config.rms_norm_eps,
            quantized(attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight),
            np.empty((config.num_attention_heads + config.num_key_value_heads, 0), np.float32),
            *(quantized(attention.o_proj.weight), quantized(mlp.gate_proj.weight, mlp.up_proj.weight)),
            quantized(mlp.down_proj.weight),
        )
        self._final = array(head.norm.weight), quantized(head.lm_head.weight)
        self._fc = quantized(head.fc.weight)
        assert head.embeddings is not None
        self._embeddings = head.embeddings.contiguous().numpy()
        vocab_map = head.draft_ids()
        self._vocab_map = np.arange(config.draft_vocab_size) if vocab_map is None else vocab_map.numpy()
        self._cos, self._sin = (array(table) for table in rope_table(head, max_context))
        self._scale, self._before_residual = config.head_dim**-0.5, config.norm_before_residual
        self._norm_output = config.norm_output
        self._kv = KeysAndValues(head)

    def fork(self) -> CompiledPass:
        twin = copy.copy(self)
        twin._kv = self._kv.empty()
        return twin

    def extend(self, tokens: list[int], features_NF: Tensor, start: int) -> Tensor:
        return self.extend_together([self], [tokens], [features_NF], [start])

    def grow(self, state_1D: Tensor, length: int, root: int, config: TreeConfig) -> DraftTree:
        return self.grow_together([self], state_1D, [length], [root], [config])[0]

    @staticmethod
    def extend_together(
        passes: Sequence[CompiledPass], tokens: list[list[int]], features: list[Tensor], starts: list[int]
    ) -> Tensor:
        """`extend` of several conversations with forks of one pass: states [R, D]."""
        first, width = passes[0], passes[0]._fc[0].shape[1]
        for own, features_NF in zip(tokens, features, strict=True):
            if features_NF.shape != (len(own), width):
                raise ValueError(f"the draft head reads features [{len(own)}, {width}], not {[*features_NF.shape]}.")
        use_threads()
        ends = [start + len(own) for start, own in zip(starts, tokens, strict=True)]
        positions = np.concatenate([np.arange(start, end) for start, end in zip(starts, ends, strict=True)])
        features_NF = first._head.normed(torch.cat(features).float()).contiguous()
        tokens_N = [token for own in tokens for token in own]
        states = first._kernels.head.extend(
            *(features_NF.numpy(), np.array(tokens_N), positions, first._fc, first._weights, first._embeddings),
            *(first._cos, first._sin, _table(passes, starts, ends), (first._scale, first._before_residual)),
        )
        return torch.from_numpy(states)

    @staticmethod
    def grow_together(
        passes: Sequence[CompiledPass],
        states_RD: Tensor,
        lengths: list[int],
        roots: list[int],
        configs: list[TreeConfig],
    ) -> list[DraftTree]:
        """`grow` of several conversations with forks of one pass, whose trees have the same `top_k`."""
        use_threads()
        first, (wanted,) = passes[0], {config.top_k for config in configs}
        vocab = len(first._vocab_map)
        top_k = min(wanted, vocab)
        least_searched = [least_searched_logp(config) for config in configs]
        ends = [length + (config.depth - 1) * top_k for length, config in zip(lengths, configs, strict=True)]
        most = np.array([config.depth for config in configs])
        shape = most, np.array(least_searched, np.float32), top_k, min(num_asked(configs[0]), vocab)
        *candidates, filled, places, below_ids, below_logp, expanded = first._kernels.tree.grow(
            *(states_RD.contiguous().numpy(), np.array(lengths), first._weights, first._final, first._embeddings),
            *(first._vocab_map, first._cos, first._sin, _table(passes, lengths, ends), shape),
            (first._scale, first._before_residual, first._norm_output),
        )
        trees = []
        for n, (root, config) in enumerate(zip(roots, configs, strict=True)):
            pool = [part[n, : filled[n]] for part in candidates]
            pool += [part[n, : expanded[n]] for part in (places, below_ids, below_logp)]
            found = first._kernels.tree.select(root, config.total_tokens - 1, least_logp(config), tuple(pool))
            tokens, parents, depths, logp, mask, alt_ids, alt_logp = (torch.from_numpy(part) for part in found)
            alternatives = alt_ids[:, :NUM_ALTERNATIVES], alt_logp[:, :NUM_ALTERNATIVES]
            trees.append(DraftTree(tokens, parents, depths, logp, mask, *alternatives))
        return trees


def _table(passes: Sequence[CompiledPass], starts: list[int], ends: list[int]) -> np.ndarray:
    """Of `native.attention`: rows of each conversation at `starts` to `ends`, for which room is made."""
    table, first = np.empty((len(passes), 7), np.int64), 0
    for number, (each, start, end) in enumerate(zip(passes, starts, ends, strict=True)):
        each._kv.reserve(end)
        keys, values = each._kv.stored
        places = keys.shape[1], keys.data_ptr(), values.data_ptr()
        table[number] = first, end - start, start, start, *places
        first += end - start
    return table
