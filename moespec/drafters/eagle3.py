"""EAGLE-3 drafting: the head run incrementally over committed features, then level by level over the growing tree.

Owns the head's KV cache and the step's small tensors. The head's formula is `drafters/head.py`'s; here it is written
out on raw tensors because a draft step is short: on a small model module calls would cost more than the products.
Knows nothing of the target but its features.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from moespec.dense import PackedLinear
from moespec.drafters.base import DraftContext
from moespec.drafters.head import Eagle3Head
from moespec.tree import Frontier, grow_tree, root_only
from moespec.types import DraftTree

INITIAL_CAPACITY = 512  # positions; doubled when needed


class Eagle3Drafter:
    """Feature of position t is paired with token t + 1, so `n` committed positions and a root give `n` head rows."""

    name = "EAGLE-3"

    def __init__(self, head: Eagle3Head, max_context: int) -> None:
        config = head.config
        self.tap_layers = config.tap_layers
        self._config = config
        attention, mlp = head.midlayer.self_attn, head.midlayer.mlp
        weights = [attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight]
        self._qkv = PackedLinear(torch.cat(weights))
        self._gate_up = PackedLinear(torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]))
        self._down, self._lm_head = PackedLinear(mlp.down_proj.weight), PackedLinear(head.lm_head.weight)
        self._head = head
        device, self._dtype = weights[0].device, weights[0].dtype
        self._vocab_map: Tensor | None = None
        if head.d2t is not None:
            self._vocab_map = torch.arange(config.draft_vocab_size, device=device) + head.d2t
        self._cos, self._sin = _rope_table(config.head_dim, config.rope_theta, max_context + 32, weights[0])
        shape = (2, config.num_key_value_heads, INITIAL_CAPACITY, config.head_dim)
        self._kv = torch.empty(shape, dtype=self._dtype, device=device)
        self._length = 0  # committed positions whose pair is in the KV cache
        self._pending: list[Tensor] = []  # features of later committed positions

    def observe(self, features_NF: Tensor | None) -> None:
        assert features_NF is not None
        self._pending.append(features_NF)

    def truncate(self, length: int) -> None:
        if length <= self._length:
            self._length, self._pending = length, []
        else:
            kept = torch.cat(self._pending)[: length - self._length]
            self._pending = [kept]

    def propose(self, context: DraftContext) -> DraftTree:
        """Catch up with the committed positions, then grow the tree from the last one's prediction."""
        root = context.token_ids[-1]
        if context.tree.total_tokens == 1:
            return root_only(root, self._kv.device)
        hidden_D = self._catch_up(context.token_ids)
        scorer = _TreeScorer(self, hidden_D)
        return grow_tree(self._log_probs(hidden_D[None])[0], scorer, root, context.tree, self._vocab_map)

    def _catch_up(self, token_ids: list[int]) -> Tensor:
        """Run the head over the pending pairs; the state [D] after the last one, which predicts the root's children."""
        features_NF = torch.cat(self._pending) if len(self._pending) > 1 else self._pending[0]
        start, end = self._length, self._length + features_NF.shape[0]
        assert end == len(token_ids) - 1, "every committed position but the root's has been observed"
        tokens_N = torch.tensor(token_ids[start + 1 : end + 1], device=self._kv.device)
        states_ND = self._forward(
            tokens_N, self._fuse(features_NF), torch.arange(start, end, device=self._kv.device), start, None
        )
        self._length, self._pending = end, []
        return states_ND[-1]

    def _fuse(self, features_NF: Tensor) -> Tensor:
        """g = fc(concat of the taps), with the 3.1 norms where the head has them. [N, D]"""
        return self._head.fuse(features_NF.to(self._dtype))

    def _forward(
        self, tokens_N: Tensor, hidden_ND: Tensor, positions_N: Tensor, offset: int, mask_NS: Tensor | None
    ) -> Tensor:
        """One pass of the head's layer over N rows whose keys go to `offset`; states h_out [N, D].

        `mask_NS` is additive over all `offset + N` keys; None is causal.
        """
        head, config = self._head, self._config
        layer, num_rows, end = head.midlayer, tokens_N.shape[0], offset + tokens_N.shape[0]
        self._reserve(end)
        normed_ND = F.rms_norm(hidden_ND, hidden_ND.shape[-1:], layer.hidden_norm.weight, config.rms_norm_eps)
        embeds_ND = F.rms_norm(
            head.embed(tokens_N), hidden_ND.shape[-1:], layer.input_layernorm.weight, config.rms_norm_eps
        )
        qkv_NX = self._qkv(torch.cat([embeds_ND, normed_ND], dim=-1))
        num_q, num_kv, head_dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        qkv_HNd = qkv_NX.view(num_rows, num_q + 2 * num_kv, head_dim).transpose(0, 1)
        cos_Nd, sin_Nd = self._cos[positions_N], self._sin[positions_N]
        rotated_HNd = qkv_HNd[: num_q + num_kv]
        rotated_HNd = rotated_HNd * cos_Nd + _rotate_half(rotated_HNd) * sin_Nd
        self._kv[0, :, offset:end] = rotated_HNd[num_q:]
        self._kv[1, :, offset:end] = qkv_HNd[num_q + num_kv :]
        if mask_NS is None and num_rows > 1:
            mask_NS = _causal_mask(num_rows, end, hidden_ND)
        attended_HNd = F.scaled_dot_product_attention(
            rotated_HNd[None, :num_q],
            self._kv[None, 0, :, :end],
            self._kv[None, 1, :, :end],
            attn_mask=None if mask_NS is None else mask_NS[None, None],
            enable_gqa=num_q != num_kv,
        )[0]
        attended_NX = attended_HNd.transpose(0, 1).reshape(num_rows, -1)
        residual_ND = normed_ND if config.norm_before_residual else hidden_ND
        residual_ND = residual_ND + F.linear(attended_NX, layer.self_attn.o_proj.weight)
        mlp_in_ND = F.rms_norm(
            residual_ND, residual_ND.shape[-1:], layer.post_attention_layernorm.weight, config.rms_norm_eps
        )
        gate_NI, up_NI = self._gate_up(mlp_in_ND).chunk(2, dim=-1)
        return residual_ND + self._down(F.silu(gate_NI) * up_NI)

    def _log_probs(self, states_ND: Tensor) -> Tensor:
        """fp32 log-probabilities [N, V'] over the draft vocabulary; no temperature: children are a top-k set."""
        normed_ND = F.rms_norm(states_ND, states_ND.shape[-1:], self._head.norm.weight, self._config.rms_norm_eps)
        return self._lm_head(normed_ND).float().log_softmax(dim=-1)

    def _next_hidden(self, states_ND: Tensor) -> Tensor:
        """What the next draft step reads as g: the state itself, or its norm for heads of the 3.1 kind."""
        if not self._config.norm_output:
            return states_ND
        return F.rms_norm(states_ND, states_ND.shape[-1:], self._head.norm.weight, self._config.rms_norm_eps)

    def _reserve(self, length: int) -> None:
        capacity = self._kv.shape[2]
        if length > capacity:
            grown = self._kv.new_empty(*self._kv.shape[:2], max(2 * capacity, length), self._kv.shape[3])
            grown[:, :, :capacity] = self._kv
            self._kv = grown


class _TreeScorer:
    """Scores the frontier of a growing tree; the rows' keys lie behind the committed ones and are discarded after."""

    def __init__(self, drafter: Eagle3Drafter, root_state_D: Tensor) -> None:
        self._drafter = drafter
        self._states_ND = root_state_D[None]
        self._num_rows = 0  # tree rows written so far
        self._ancestors_NR: Tensor | None = None  # of the previous call: additive mask over the tree rows

    def __call__(self, frontier: Frontier) -> Tensor:
        drafter = self._drafter
        num_rows, device = frontier.tokens_N.shape[0], frontier.tokens_N.device
        hidden_ND = drafter._next_hidden(self._states_ND)[frontier.parents_N]
        own_NN = torch.full((num_rows, num_rows), torch.finfo(hidden_ND.dtype).min, device=device).fill_diagonal_(0)
        own_NN = own_NN.to(hidden_ND.dtype)
        if self._ancestors_NR is None:
            ancestors_NR = own_NN
        else:
            ancestors_NR = torch.cat([self._ancestors_NR[frontier.parents_N], own_NN], dim=1)
        length = drafter._length
        mask_NS = torch.cat([hidden_ND.new_zeros(num_rows, length), ancestors_NR], dim=1)
        # The root's row has position length - 1, so its children have position length, equal for siblings.
        positions_N = torch.full((num_rows,), length + frontier.level - 1, device=device)
        self._states_ND = drafter._forward(frontier.tokens_N, hidden_ND, positions_N, length + self._num_rows, mask_NS)
        self._num_rows += num_rows
        self._ancestors_NR = ancestors_NR
        return drafter._log_probs(self._states_ND)


def _rope_table(head_dim: int, theta: float, num_positions: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin [positions, head_dim], halves repeated, in the dtype of `like`."""
    frequencies = theta ** -(torch.arange(0, head_dim, 2, device=like.device).float() / head_dim)
    angles = torch.arange(num_positions, device=like.device).float()[:, None] * frequencies
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos().to(like.dtype), angles.sin().to(like.dtype)


def _rotate_half(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat([-second, first], dim=-1)


def _causal_mask(num_rows: int, num_keys: int, like: Tensor) -> Tensor:
    """Additive [rows, keys]: the last `num_rows` keys are the rows' own."""
    minimum = torch.finfo(like.dtype).min
    return torch.full((num_rows, num_keys), minimum, dtype=like.dtype, device=like.device).triu(num_keys - num_rows + 1)
