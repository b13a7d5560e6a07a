"""The EAGLE-3 draft head: its config, its modules under the native checkpoint names, the training-time forward.

Knows nothing of files: what people store a head in is `checkpoint.py`'s business. How it drafts is `eagle3.py`'s, how
it is trained `moespec.train.drafter`'s.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moespec.drafters.rope import Rope, apply_rotary


@dataclass(frozen=True)
class Eagle3Config:
    """Shape and variants of a head. `tap_layers`: decoder layers whose entering residual is a feature.

    norm_before_residual  the layer's residual is the normalised g, not g itself
    norm_output           the next draft step reads the state behind the final norm, as EAGLE-3.1 does
    norm_before_fc        one norm over all taps joined, before `fc`
    fc_norm               one norm per tap before `fc`, as EAGLE-3.1 has
    """

    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    draft_vocab_size: int
    tap_layers: tuple[int, ...]
    target_hidden_size: int
    rms_norm_eps: float = 1e-6
    rope: Rope = field(default_factory=Rope)
    norm_before_residual: bool = False
    norm_output: bool = False
    norm_before_fc: bool = False
    fc_norm: bool = False


class _Attention(nn.Module):
    def __init__(self, config: Eagle3Config) -> None:
        super().__init__()
        width_in, head_dim = 2 * config.hidden_size, config.head_dim
        self.q_proj = nn.Linear(width_in, config.num_attention_heads * head_dim, bias=False)
        self.k_proj = nn.Linear(width_in, config.num_key_value_heads * head_dim, bias=False)
        self.v_proj = nn.Linear(width_in, config.num_key_value_heads * head_dim, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * head_dim, config.hidden_size, bias=False)


class _Mlp(nn.Module):
    def __init__(self, config: Eagle3Config) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class _Layer(nn.Module):
    def __init__(self, config: Eagle3Config) -> None:
        super().__init__()
        self.hidden_norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = _Attention(config)
        self.mlp = _Mlp(config)


class Eagle3Head(nn.Module):
    """One decoder layer on [embedding of token t + 1, fused features of token t]. See section 2.2 of EAGLE-3."""

    d2t: Tensor | None
    t2d: Tensor | None

    def __init__(self, config: Eagle3Config) -> None:
        super().__init__()
        self.config = config
        num_taps, width, eps = len(config.tap_layers), config.target_hidden_size, config.rms_norm_eps
        self.input_norm = nn.RMSNorm(num_taps * width, eps=eps) if config.norm_before_fc else None
        self.fc_norm = nn.ModuleList(nn.RMSNorm(width, eps=eps) for _ in range(num_taps)) if config.fc_norm else None
        self.fc = nn.Linear(num_taps * width, config.hidden_size, bias=False)
        self.midlayer = _Layer(config)
        self.norm = nn.RMSNorm(config.hidden_size, eps=eps)
        self.lm_head = nn.Linear(config.hidden_size, config.draft_vocab_size, bias=False)
        has_map = config.draft_vocab_size != config.vocab_size
        self.register_buffer("d2t", torch.zeros(config.draft_vocab_size, dtype=torch.long) if has_map else None)
        self.register_buffer("t2d", torch.zeros(config.vocab_size, dtype=torch.bool) if has_map else None)
        self.embeddings: Tensor | None = None  # [vocab, hidden]; the target's unless the checkpoint has its own

    def draft_only(self, ids_V: Tensor) -> None:
        """Draft these target tokens, int64 [V'], and no others."""
        assert self.d2t is not None and self.t2d is not None
        self.d2t.copy_(ids_V - torch.arange(len(ids_V)))
        self.t2d.zero_()[ids_V] = True

    def draft_ids(self) -> Tensor | None:
        """The target's id of each draft token, int64 [V'], or None where they are the same."""
        return None if self.d2t is None else torch.arange(len(self.d2t), device=self.d2t.device) + self.d2t

    def embed(self, tokens: Tensor) -> Tensor:
        assert self.embeddings is not None, "attach the target's embeddings first"
        return F.embedding(tokens, self.embeddings)

    @property
    def lacks_lm_head(self) -> bool:
        """Whether it was stored without an output layer and borrows the target's."""
        return self.lm_head.weight.is_meta

    def normed(self, features: Tensor) -> Tensor:
        """The joined taps as `fc` takes them."""
        if self.input_norm is not None:
            features = self.input_norm(features)
        if self.fc_norm is not None:
            taps = features.chunk(len(self.fc_norm), dim=-1)
            features = torch.cat([norm(tap) for norm, tap in zip(self.fc_norm, taps, strict=True)], dim=-1)
        return features

    def fuse(self, features: Tensor) -> Tensor:
        """g = fc(concat of the taps)."""
        return self.fc(self.normed(features))

    def unrolled(self, tokens_BS: Tensor, features_BSF: Tensor, num_steps: int) -> Iterator[Tensor]:
        """The training-time test: logits [B, S, V'] of each unrolled step, tokens teacher-forced.

        `tokens_BS[t]` is token t + 1, `features_BSF[t]` the features of token t. At step i row t has read the
        embedding of token t + 1 + i (rows run off the end and must be masked) and predicts token t + 2 + i. Keys:
        causal over step 0, plus the same row's of steps 1..i; rotary position t + i.
        """
        keys: list[Tensor] = []
        values: list[Tensor] = []
        hidden_BSD = self.fuse(features_BSF)
        for step in range(num_steps):
            shifted_BS = F.pad(tokens_BS[:, step:], (0, step))
            state_BSD = self._training_layer(self.embed(shifted_BS), hidden_BSD, step, keys, values)
            yield self.lm_head(self.norm(state_BSD))
            hidden_BSD = self.norm(state_BSD) if self.config.norm_output else state_BSD

    def _training_layer(
        self, embeds_BSD: Tensor, hidden_BSD: Tensor, step: int, keys: list[Tensor], values: list[Tensor]
    ) -> Tensor:
        layer, config = self.midlayer, self.config
        normed_BSD = layer.hidden_norm(hidden_BSD)
        joined_BSX = torch.cat([layer.input_layernorm(embeds_BSD), normed_BSD], dim=-1)
        attention = layer.self_attn
        positions_S = torch.arange(step, step + joined_BSX.shape[1], device=joined_BSX.device)
        cos_Sd, sin_Sd = config.rope.table(positions_S, config.head_dim)
        query = apply_rotary(self._heads(attention.q_proj(joined_BSX)), cos_Sd, sin_Sd)
        repeat = config.num_attention_heads // config.num_key_value_heads
        key = apply_rotary(self._heads(attention.k_proj(joined_BSX)), cos_Sd, sin_Sd)
        keys.append(key.repeat_interleave(repeat, dim=1))
        values.append(self._heads(attention.v_proj(joined_BSX)).repeat_interleave(repeat, dim=1))
        scale = config.head_dim**-0.5
        causal_SS = torch.ones(len(positions_S), len(positions_S), dtype=torch.bool, device=query.device).tril()
        scores = (query @ keys[0].transpose(-1, -2) * scale).masked_fill(~causal_SS, -torch.inf)
        own = [(query * earlier).sum(dim=-1, keepdim=True) * scale for earlier in keys[1:]]
        shares = torch.cat([scores, *own], dim=-1).float().softmax(dim=-1).to(query.dtype)
        attended = shares[..., : scores.shape[-1]] @ values[0]
        for number, value in enumerate(values[1:]):
            column = scores.shape[-1] + number
            attended = attended + shares[..., column : column + 1] * value
        residual_BSD = normed_BSD if config.norm_before_residual else hidden_BSD
        residual_BSD = residual_BSD + attention.o_proj(attended.transpose(1, 2).flatten(2))
        return residual_BSD + layer.mlp(layer.post_attention_layernorm(residual_BSD))

    def _heads(self, projected_BSX: Tensor) -> Tensor:
        return projected_BSX.unflatten(-1, (-1, self.config.head_dim)).transpose(1, 2)
