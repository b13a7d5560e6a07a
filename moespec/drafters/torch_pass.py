"""An EAGLE-3 head on torch's operations: any device and dtype. Owns its KV cache; the formula is `head.py`'s."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from moespec.config import TreeConfig
from moespec.dense import PackedLinear
from moespec.drafters.head import Eagle3Head, apply_rotary
from moespec.drafters.passes import KeysAndValues, rope_table
from moespec.tree import Best, Frontier, grow_tree, num_asked
from moespec.types import DraftTree


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


class TorchPass:
    """A `HeadPass`."""

    def __init__(self, head: Eagle3Head, max_context: int) -> None:
        attention, mlp = head.midlayer.self_attn, head.midlayer.mlp
        self._head, self._config = head, head.config
        self._qkv = PackedLinear(_joined(attention.q_proj, attention.k_proj, attention.v_proj))
        self._gate_up = PackedLinear(_joined(mlp.gate_proj, mlp.up_proj))
        self._down, self._lm_head = PackedLinear(mlp.down_proj.weight), PackedLinear(head.lm_head.weight)
        self._cos, self._sin = rope_table(head, max_context)
        self._vocab_map = head.draft_ids()
        self._kv = KeysAndValues(head)

    def extend(self, tokens: list[int], features_NF: Tensor, start: int) -> Tensor:
        like = self._head.fc.weight
        tokens_N = torch.tensor(tokens, device=like.device)
        positions_N = torch.arange(start, start + len(tokens), device=like.device)
        hidden_ND = self._head.fuse(features_NF.to(like.dtype))
        return self.run(Rows(tokens_N, positions_N, hidden_ND, start, start))[-1:]

    def run(self, rows: Rows) -> Tensor:
        """States h_out [N, D]."""
        layer, config, hidden_ND = self._head.midlayer, self._config, rows.hidden_ND
        start, num_rows = rows.start, len(rows.tokens_N)
        end = start + num_rows
        self._kv.reserve(end)
        normed_ND = self._norm(hidden_ND, layer.hidden_norm)
        embeds_ND = self._norm(self._head.embed(rows.tokens_N), layer.input_layernorm)
        qkv_NX = self._qkv(torch.cat([embeds_ND, normed_ND], dim=-1))
        num_q, num_kv = config.num_attention_heads, config.num_key_value_heads
        qkv_HNd = qkv_NX.view(num_rows, num_q + 2 * num_kv, config.head_dim).transpose(0, 1)
        cos_Nd, sin_Nd = self._cos[rows.positions_N], self._sin[rows.positions_N]
        rotated_HNd = apply_rotary(qkv_HNd[: num_q + num_kv], cos_Nd, sin_Nd)
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


def _joined(*layers: torch.nn.Linear) -> Tensor:
    return torch.cat([layer.weight for layer in layers])
