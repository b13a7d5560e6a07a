"""An EAGLE-3 head on compiled CPU kernels: a pass is one call, and so is the growth of a whole tree.

Its matrices are kept in bf16, as heads are published: every level of a tree reads all of them, and that is what a level
costs. The sums are fp32. Owns its KV cache; the formula is `head.py`'s, the kernels are `native/head.py` and
`native/tree.py`.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moespec.config import TreeConfig
from moespec.drafters.head import Eagle3Head
from moespec.drafters.passes import KeysAndValues, Rows, joined, rope_table
from moespec.native import array, half_array, load_kernels, use_threads
from moespec.tree import NUM_ALTERNATIVES, num_asked
from moespec.types import DraftTree


class CompiledPass:
    """A `HeadPass`."""

    def __init__(self, head: Eagle3Head, max_context: int) -> None:
        self._kernels: Any = load_kernels()
        layer, config = head.midlayer, head.config
        attention, mlp = layer.self_attn, layer.mlp
        norms = (layer.input_layernorm, layer.hidden_norm, layer.post_attention_layernorm)
        self._weights = (
            array(torch.stack([norm.weight for norm in norms])),
            config.rms_norm_eps,
            half_array(joined(attention.q_proj, attention.k_proj, attention.v_proj)),
            np.empty((config.num_attention_heads + config.num_key_value_heads, 0), np.float32),
            *(half_array(attention.o_proj.weight), half_array(joined(mlp.gate_proj, mlp.up_proj))),
            half_array(mlp.down_proj.weight),
        )
        self._final = array(head.norm.weight), half_array(head.lm_head.weight)
        self._fc = half_array(head.fc.weight)
        assert head.embeddings is not None
        self._embeddings = head.embeddings.contiguous().numpy()
        vocab_map = head.draft_ids()
        self._vocab_map = np.arange(config.draft_vocab_size) if vocab_map is None else vocab_map.numpy()
        self._cos, self._sin = (array(table) for table in rope_table(head, max_context))
        self._scale, self._before_residual = config.head_dim**-0.5, config.norm_before_residual
        self._norm_output = config.norm_output
        self._kv = KeysAndValues(head)

    def fuse(self, features_NF: Tensor) -> Tensor:
        use_threads()
        return torch.from_numpy(self._kernels.layers.linear(features_NF.float().contiguous().numpy(), self._fc))

    def run(self, rows: Rows) -> Tensor:
        use_threads()
        self._kv.reserve(rows.start + len(rows.tokens_N))
        tokens, positions = rows.tokens_N.numpy(), rows.positions_N.numpy()
        states = self._kernels.head.states(
            *(self._embeddings[tokens], rows.hidden_ND.contiguous().numpy(), *self._weights),
            *(self._cos[positions], self._sin[positions], *self._kv.stored.numpy(), (rows.start, rows.num_free)),
            np.empty((1, 0), np.bool_) if rows.seen_NM is None else rows.seen_NM.numpy(),
            (self._scale, self._before_residual),
        )
        return torch.from_numpy(states)

    def grow(self, state_1D: Tensor, length: int, root: int, config: TreeConfig) -> DraftTree:
        use_threads()
        vocab = len(self._vocab_map)
        top_k = min(config.top_k, vocab)
        least = math.log(config.min_path_p) if config.min_path_p else -1e30  # no infinity in fast arithmetic
        self._kv.reserve(length + (config.depth - 1) * top_k)
        shape = (config.depth, top_k, min(num_asked(config), vocab), least)
        pool = self._kernels.tree.grow(
            *(state_1D.contiguous().numpy(), length, self._weights, self._final, self._embeddings, self._vocab_map),
            *(self._cos, self._sin, *self._kv.stored.numpy(), shape),
            (self._scale, self._before_residual, self._norm_output),
        )
        found = self._kernels.tree.select(root, config.total_tokens - 1, least, pool)
        tokens, parents, depths, logp, mask, alt_ids, alt_logp = (torch.from_numpy(part) for part in found)
        return DraftTree(
            *(tokens, parents, depths, logp, mask), alt_ids[:, :NUM_ALTERNATIVES], alt_logp[:, :NUM_ALTERNATIVES]
        )
