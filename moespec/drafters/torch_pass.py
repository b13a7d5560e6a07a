"""An EAGLE-3 head on torch's operations: any device and dtype. Owns its KV cache; the formula is `head.py`'s."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from moespec.config import TreeConfig
from moespec.dense import PackedLinear, additive_mask, masked_attention
from moespec.drafters.head import Eagle3Head
from moespec.drafters.passes import KeysAndValues, rope_table
from moespec.drafters.rope import apply_rotary
from moespec.tree import Best, Frontier, best_tokens, grow_tree, num_asked, seen_below
from moespec.types import DraftTree

# Takes the rows' own keys and values [heads, N, d]; returns all that they see, [2, heads, M, d].
Store = Callable[[Tensor, Tensor], Tensor]


class HeadLayer:
    """The head's one layer and its output on raw weights. Letters as in `passes.py`; M keys."""

    def __init__(self, head: Eagle3Head, max_context: int) -> None:
        attention, mlp = head.midlayer.self_attn, head.midlayer.mlp
        self.head, self._config = head, head.config
        self._qkv = PackedLinear(_joined(attention.q_proj, attention.k_proj, attention.v_proj))
        self._gate_up = PackedLinear(_joined(mlp.gate_proj, mlp.up_proj))
        self._down, self._lm_head = PackedLinear(mlp.down_proj.weight), PackedLinear(head.lm_head.weight)
        self._cos, self._sin = rope_table(head, max_context)
        self._attend = masked_attention(head.fc.weight.device)
        self.vocab_map = head.draft_ids()

    def states(
        self, tokens_N: Tensor, positions_N: Tensor, hidden_ND: Tensor, store: Store, mask_NM: Tensor | None
    ) -> Tensor:
        """States h_out [N, D] of rows with g `hidden_ND`; `mask_NM` is additive, None where a row sees all keys."""
        layer, config, num_rows = self.head.midlayer, self._config, len(tokens_N)
        normed_ND = self._norm(hidden_ND, layer.hidden_norm)
        embeds_ND = self._norm(self.head.embed(tokens_N), layer.input_layernorm)
        qkv_NX = self._qkv(torch.cat([embeds_ND, normed_ND], dim=-1))
        num_q, num_kv = config.num_attention_heads, config.num_key_value_heads
        qkv_HNd = qkv_NX.view(num_rows, num_q + 2 * num_kv, config.head_dim).transpose(0, 1)
        cos_Nd, sin_Nd = self._cos[positions_N], self._sin[positions_N]
        rotated_HNd = apply_rotary(qkv_HNd[: num_q + num_kv], cos_Nd, sin_Nd)
        keys, values = store(rotated_HNd[num_q:], qkv_HNd[num_q + num_kv :])
        mask = None if mask_NM is None else mask_NM[None, None]
        attended, _ = self._attend(None, rotated_HNd[None, :num_q], keys[None], values[None], mask)
        residual_ND = normed_ND if config.norm_before_residual else hidden_ND
        residual_ND = residual_ND + F.linear(attended.reshape(num_rows, -1), layer.self_attn.o_proj.weight)
        gate_NI, up_NI = self._gate_up(self._norm(residual_ND, layer.post_attention_layernorm)).chunk(2, dim=-1)
        return residual_ND + self._down(F.silu(gate_NI) * up_NI)

    def best(self, states_ND: Tensor, num_best: int) -> Best:
        """The likeliest next draft tokens; no temperature: children are a top-k set."""
        return best_tokens(self._lm_head(self._norm(states_ND, self.head.norm)), num_best)

    def next_hidden(self, states_ND: Tensor) -> Tensor:
        """What the next draft step reads as g: the state itself, or its norm for heads of the 3.1 kind."""
        return self._norm(states_ND, self.head.norm) if self._config.norm_output else states_ND

    def _norm(self, x_ND: Tensor, norm: torch.nn.RMSNorm) -> Tensor:
        return F.rms_norm(x_ND, x_ND.shape[-1:], norm.weight, self._config.rms_norm_eps)


class TorchPass:
    """A `HeadPass` whose rows and keys are as many as there are."""

    has_fixed_shape = False

    def __init__(self, head: Eagle3Head, max_context: int) -> None:
        self.layer = HeadLayer(head, max_context)
        self.kv = KeysAndValues(head)

    def fork(self) -> TorchPass:
        twin = copy.copy(self)
        twin.kv = self.kv.empty()
        return twin

    def extend(self, tokens: list[int], features_NF: Tensor, start: int) -> Tensor:
        head = self.layer.head
        like = head.fc.weight
        tokens_N = torch.tensor(tokens, device=like.device)
        positions_N = torch.arange(start, start + len(tokens), device=like.device)
        hidden_ND = head.fuse(features_NF.to(like.dtype))
        return self.run(Rows(tokens_N, positions_N, hidden_ND, start, start))[-1:]

    def run(self, rows: Rows) -> Tensor:
        """States h_out [N, D]."""
        start, end = rows.start, rows.start + len(rows.tokens_N)
        self.kv.reserve(end)

        def store(keys_HNd: Tensor, values_HNd: Tensor) -> Tensor:
            self.kv.stored[0, :, start:end], self.kv.stored[1, :, start:end] = keys_HNd, values_HNd
            return self.kv.stored[:, :, :end]

        mask_NM = None
        if rows.seen_NM is not None:
            mask_NM = additive_mask(rows.num_free, rows.seen_NM, rows.hidden_ND.dtype)
        return self.layer.states(rows.tokens_N, rows.positions_N, rows.hidden_ND, store, mask_NM)

    def grow(self, state_1D: Tensor, length: int, root: int, config: TreeConfig) -> DraftTree:
        num_best = num_asked(config)
        scorer = _TreeScorer(self, self.layer, state_1D, length, num_best)
        return grow_tree(self.layer.best(state_1D, num_best), scorer, root, config, self.layer.vocab_map)


@dataclass(frozen=True)
class Rows:
    """What a pass runs over.

    tokens_N, positions_N  int64; hidden_ND: g
    start                  where the rows' keys and values go
    num_free               every row sees the first so many keys
    seen_NM                bool; which of the keys behind those a row sees. None: all, which is right for the last row;
                           what one layer keeps of the others, keys and values, does not depend on what they see
    """

    tokens_N: Tensor
    positions_N: Tensor
    hidden_ND: Tensor
    start: int
    num_free: int
    seen_NM: Tensor | None = None


class _TreeScorer:
    """Scores the frontier of a growing tree; the rows' keys lie behind the committed ones and are discarded after."""

    def __init__(
        self, head_pass: TorchPass, layer: HeadLayer, root_state_1D: Tensor, length: int, num_best: int
    ) -> None:
        self._pass, self._layer = head_pass, layer
        self._states_ND, self._length, self._num_best = root_state_1D, length, num_best
        self._seen_NR = torch.zeros(1, 0, dtype=torch.bool, device=root_state_1D.device)  # of the previous call's rows

    def __call__(self, frontier: Frontier) -> Best:
        num_rows, num_before, device = len(frontier.tokens_N), self._seen_NR.shape[1], frontier.tokens_N.device
        hidden_ND = self._layer.next_hidden(self._states_ND)[frontier.parents_N]
        self._seen_NR = seen_below(self._seen_NR, frontier)
        # The root's row has position length - 1, so its children have position length, equal for siblings.
        positions_N = torch.full((num_rows,), self._length + frontier.level - 1, device=device)
        start = self._length + num_before
        rows = Rows(frontier.tokens_N, positions_N, hidden_ND, start, self._length, self._seen_NR)
        self._states_ND = self._pass.run(rows)
        return self._layer.best(self._states_ND, self._num_best)


def _joined(*layers: torch.nn.Linear) -> Tensor:
    return torch.cat([layer.weight for layer in layers])
