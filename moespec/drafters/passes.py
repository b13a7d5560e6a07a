"""One pass of an EAGLE-3 head over a few rows, on raw arrays: by torch's operations, or compiled for the CPU.

Owns the head's KV cache and its weights in the form that is multiplied. The formula is `drafters/head.py`'s; a draft
step is short, and through modules the calls would cost more than the products. Knows nothing of trees.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from moespec.config import TreeConfig
from moespec.dense import PackedLinear
from moespec.drafters.head import Eagle3Head
from moespec.lean import MAX_HIDDEN_SIZE
from moespec.native import load_kernels, use_threads
from moespec.tree import NUM_ALTERNATIVES, Best, Frontier, grow_tree, num_asked
from moespec.types import DraftTree

INITIAL_CAPACITY = 512  # positions; doubled when needed


@dataclass(frozen=True)
class Rows:
    """What a pass runs over.

    tokens_N, positions_N  int64; hidden_ND: g
    start                  where the rows' keys and values go
    num_free               every row sees the first so many keys
    seen_NM                bool; which of the keys behind those a row sees. None: all before it, and itself
    """

    tokens_N: Tensor
    positions_N: Tensor
    hidden_ND: Tensor
    start: int
    num_free: int
    seen_NM: Tensor | None = None


class HeadPass(Protocol):
    """What drafting needs of a head."""

    def fuse(self, features_NF: Tensor) -> Tensor:
        """g = fc(concat of the taps) [N, D]."""
        ...

    def run(self, rows: Rows) -> Tensor:
        """States h_out [N, D]."""
        ...

    def grow(self, state_1D: Tensor, length: int, root: int, config: TreeConfig) -> DraftTree:
        """A tree grown from the root's state behind `length` committed keys."""
        ...


def make_pass(head: Eagle3Head, max_context: int) -> HeadPass:
    """Compiled for small fp32 heads on the CPU, torch's operations for all others."""
    weight = head.fc.weight
    small = weight.device.type == "cpu" and weight.dtype == torch.float32 and head.config.hidden_size <= MAX_HIDDEN_SIZE
    return CompiledPass(head, max_context) if small and load_kernels() is not None else TorchPass(head, max_context)


class _KeysAndValues:
    """[2, heads, capacity, head_dim], grown by doubling."""

    def __init__(self, head: Eagle3Head) -> None:
        config, weight = head.config, head.fc.weight
        self.stored = weight.new_empty(2, config.num_key_value_heads, INITIAL_CAPACITY, config.head_dim)

    def reserve(self, length: int) -> None:
        capacity = self.stored.shape[2]
        if length > capacity:
            grown = self.stored.new_empty(*self.stored.shape[:2], max(2 * capacity, length), self.stored.shape[3])
            grown[:, :, :capacity] = self.stored
            self.stored = grown


class TorchPass:
    """Any device and dtype."""

    def __init__(self, head: Eagle3Head, max_context: int) -> None:
        attention, mlp = head.midlayer.self_attn, head.midlayer.mlp
        self._head, self._config = head, head.config
        self._qkv = PackedLinear(_joined(attention.q_proj, attention.k_proj, attention.v_proj))
        self._gate_up = PackedLinear(_joined(mlp.gate_proj, mlp.up_proj))
        self._down, self._lm_head = PackedLinear(mlp.down_proj.weight), PackedLinear(head.lm_head.weight)
        self._cos, self._sin = rope_table(head, max_context)
        self._vocab_map = head.draft_ids()
        self._kv = _KeysAndValues(head)

    def fuse(self, features_NF: Tensor) -> Tensor:
        return self._head.fuse(features_NF.to(self._head.fc.weight.dtype))

    def run(self, rows: Rows) -> Tensor:
        layer, config, hidden_ND = self._head.midlayer, self._config, rows.hidden_ND
        start, num_rows = rows.start, len(rows.tokens_N)
        end = start + num_rows
        self._kv.reserve(end)
        normed_ND = self._norm(hidden_ND, layer.hidden_norm)
        embeds_ND = self._norm(self._head.embed(rows.tokens_N), layer.input_layernorm)
        qkv_NX = self._qkv(torch.cat([embeds_ND, normed_ND], dim=-1))
        num_q, num_kv = config.num_attention_heads, config.num_key_value_heads
        qkv_HNd = qkv_NX.view(num_rows, num_q + 2 * num_kv, config.head_dim).transpose(0, 1)
        rotated_HNd = qkv_HNd[: num_q + num_kv]
        cos_Nd, sin_Nd = self._cos[rows.positions_N], self._sin[rows.positions_N]
        rotated_HNd = rotated_HNd * cos_Nd + _rotate_half(rotated_HNd) * sin_Nd
        stored = self._kv.stored
        stored[0, :, start:end], stored[1, :, start:end] = rotated_HNd[num_q:], qkv_HNd[num_q + num_kv :]
        attended_HNd = F.scaled_dot_product_attention(
            rotated_HNd[None, :num_q],
            stored[None, 0, :, :end],
            stored[None, 1, :, :end],
            attn_mask=_additive_mask(rows, end),
            enable_gqa=num_q != num_kv,
        )[0]
        residual_ND = normed_ND if config.norm_before_residual else hidden_ND
        attended_NX = attended_HNd.transpose(0, 1).reshape(num_rows, -1)
        residual_ND = residual_ND + F.linear(attended_NX, layer.self_attn.o_proj.weight)
        gate_NI, up_NI = self._gate_up(self._norm(residual_ND, layer.post_attention_layernorm)).chunk(2, dim=-1)
        return residual_ND + self._down(F.silu(gate_NI) * up_NI)

    def grow(self, state_1D: Tensor, length: int, root: int, config: TreeConfig) -> DraftTree:
        scorer = _TreeScorer(self, state_1D, length, num_asked(config))
        return grow_tree(self.best(state_1D, num_asked(config)), scorer, root, config, self._vocab_map)

    def best(self, states_ND: Tensor, num_best: int) -> Best:
        """The likeliest next draft tokens; no temperature: children are a top-k set."""
        logp_NV = self._lm_head(self._norm(states_ND, self._head.norm)).float().log_softmax(dim=-1)
        found = logp_NV.topk(min(num_best, logp_NV.shape[-1]), dim=-1)
        return found.indices, found.values

    def next_hidden(self, states_ND: Tensor) -> Tensor:
        """What the next draft step reads as g: the state itself, or its norm for heads of the 3.1 kind."""
        return self._norm(states_ND, self._head.norm) if self._config.norm_output else states_ND

    def _norm(self, x_ND: Tensor, norm: torch.nn.RMSNorm) -> Tensor:
        return F.rms_norm(x_ND, x_ND.shape[-1:], norm.weight, self._config.rms_norm_eps)


class _TreeScorer:
    """Scores the frontier of a growing tree; the rows' keys lie behind the committed ones and are discarded after."""

    def __init__(self, head_pass: TorchPass, root_state_1D: Tensor, length: int, num_best: int) -> None:
        self._pass, self._states_ND, self._length, self._num_best = head_pass, root_state_1D, length, num_best
        self._seen_NR = torch.zeros(1, 0, dtype=torch.bool, device=root_state_1D.device)  # of the previous call's rows

    def __call__(self, frontier: Frontier) -> Best:
        num_rows, num_before, device = len(frontier.tokens_N), self._seen_NR.shape[1], frontier.tokens_N.device
        hidden_ND = self._pass.next_hidden(self._states_ND)[frontier.parents_N]
        own_NN = torch.eye(num_rows, dtype=torch.bool, device=device)
        self._seen_NR = torch.cat([self._seen_NR[frontier.parents_N], own_NN], dim=1)
        # The root's row has position length - 1, so its children have position length, equal for siblings.
        positions_N = torch.full((num_rows,), self._length + frontier.level - 1, device=device)
        start = self._length + num_before
        rows = Rows(frontier.tokens_N, positions_N, hidden_ND, start, self._length, self._seen_NR)
        self._states_ND = self._pass.run(rows)
        return self._pass.best(self._states_ND, self._num_best)


class CompiledPass:
    """fp32 on the CPU: a pass is one call, and so is the growth of a whole tree."""

    def __init__(self, head: Eagle3Head, max_context: int) -> None:
        self._kernels: Any = load_kernels()
        layer, config = head.midlayer, head.config
        attention, mlp = layer.self_attn, layer.mlp
        norms = (layer.input_layernorm, layer.hidden_norm, layer.post_attention_layernorm)
        self._weights = (
            _array(torch.stack([norm.weight for norm in norms])),
            config.rms_norm_eps,
            _array(_joined(attention.q_proj, attention.k_proj, attention.v_proj)),
            np.empty((config.num_attention_heads + config.num_key_value_heads, 0), np.float32),
            *(_array(attention.o_proj.weight), _array(_joined(mlp.gate_proj, mlp.up_proj))),
            _array(mlp.down_proj.weight),
        )
        self._final = _array(head.norm.weight), _array(head.lm_head.weight)
        self._fc = _array(head.fc.weight)
        assert head.embeddings is not None
        self._embeddings = head.embeddings.contiguous().numpy()
        vocab_map = head.draft_ids()
        self._vocab_map = np.arange(config.draft_vocab_size) if vocab_map is None else vocab_map.numpy()
        self._cos, self._sin = (_array(table) for table in rope_table(head, max_context))
        self._scale, self._before_residual = config.head_dim**-0.5, config.norm_before_residual
        self._norm_output = config.norm_output
        self._kv = _KeysAndValues(head)

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


def rope_table(head: Eagle3Head, max_context: int) -> tuple[Tensor, Tensor]:
    """cos and sin [positions, head_dim], halves repeated, in the head's dtype; a tree reaches past the context."""
    config, like = head.config, head.fc.weight
    frequencies = config.rope_theta ** -(
        torch.arange(0, config.head_dim, 2, device=like.device).float() / config.head_dim
    )
    angles = torch.arange(max_context + 32, device=like.device).float()[:, None] * frequencies
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos().to(like.dtype), angles.sin().to(like.dtype)


def _joined(*layers: torch.nn.Linear) -> Tensor:
    return torch.cat([layer.weight for layer in layers])


def _array(weight: Tensor) -> np.ndarray:
    return weight.detach().contiguous().numpy()


def _rotate_half(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat([-second, first], dim=-1)


def _additive_mask(rows: Rows, num_keys: int) -> Tensor | None:
    num_rows, like = len(rows.tokens_N), rows.hidden_ND
    minimum = torch.finfo(like.dtype).min
    if rows.seen_NM is None:
        if num_rows == 1:
            return None
        mask_NS = like.new_full((num_rows, num_keys), minimum).triu(num_keys - num_rows + 1)
    else:
        mask_NS = like.new_zeros(num_rows, num_keys)
        mask_NS[:, rows.num_free :].masked_fill_(~rows.seen_NM, minimum)
    return mask_NS[None, None]
