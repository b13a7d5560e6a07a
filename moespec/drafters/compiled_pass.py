"""An EAGLE-3 head on compiled CPU kernels: a pass is one call, and so is the growth of a whole tree.

Its matrices are quantized to int8: every level of a tree reads all of them, and that is what a level costs. A drafter
may be wrong: without a budget that costs tokens per step and nothing else. Sums and all else are fp32. Owns its KV
cache; the formula is `head.py`'s, the kernels are `native/head.py` and `native/tree.py`.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moespec.config import TreeConfig
from moespec.drafters.head import Eagle3Head
from moespec.drafters.passes import KeysAndValues, rope_table
from moespec.native import array, load_kernels, use_threads
from moespec.native.weights import quantized
from moespec.tree import NUM_ALTERNATIVES, least_logp, num_asked
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
        width = self._fc[0].shape[1]
        if features_NF.shape != (len(tokens), width):
            raise ValueError(f"the draft head reads features [{len(tokens)}, {width}], not {[*features_NF.shape]}.")
        use_threads()
        end = start + len(tokens)
        self._kv.reserve(end)
        state = self._kernels.head.extend(
            *(self._head.normed(features_NF.float()).contiguous().numpy(), np.array(tokens, np.int64)),
            *(self._fc, self._weights, self._embeddings, self._cos[start:end], self._sin[start:end]),
            *(self._table(len(tokens), start), (self._scale, self._before_residual)),
        )
        return torch.from_numpy(state)

    def grow(self, state_1D: Tensor, length: int, root: int, config: TreeConfig) -> DraftTree:
        use_threads()
        vocab = len(self._vocab_map)
        top_k = min(config.top_k, vocab)
        least = least_logp(config)
        self._kv.reserve(length + (config.depth - 1) * top_k)
        shape = (config.depth, top_k, min(num_asked(config), vocab), least)
        pool = self._kernels.tree.grow(
            *(state_1D.contiguous().numpy(), length, self._weights, self._final, self._embeddings, self._vocab_map),
            *(self._cos, self._sin, self._table(0, length), shape),
            (self._scale, self._before_residual, self._norm_output),
        )
        found = self._kernels.tree.select(root, config.total_tokens - 1, least, pool)
        tokens, parents, depths, logp, mask, alt_ids, alt_logp = (torch.from_numpy(part) for part in found)
        return DraftTree(
            *(tokens, parents, depths, logp, mask), alt_ids[:, :NUM_ALTERNATIVES], alt_logp[:, :NUM_ALTERNATIVES]
        )

    def _table(self, num_rows: int, start: int) -> np.ndarray:
        """Of `native.attention`: rows that go behind the first `start` keys, all of which they see."""
        keys, values = self._kv.stored
        return np.array([[0, num_rows, start, start, keys.shape[1], keys.data_ptr(), values.data_ptr()]])
