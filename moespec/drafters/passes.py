"""What drafting needs of an EAGLE-3 head: one pass over a few rows, and the growth of a tree. Owns the seam.

Behind it the head's formula is written out on raw arrays (`torch_pass.py`, `compiled_pass.py`): a draft step is short,
and through modules the calls would cost more than the products. Knows nothing of committed tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from moespec.config import MAX_TREE_TOKENS, TreeConfig
from moespec.drafters.head import Eagle3Head, rotary
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


class KeysAndValues:
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


def rope_table(head: Eagle3Head, max_context: int) -> tuple[Tensor, Tensor]:
    """cos and sin [positions, head_dim], halves repeated, in the head's dtype; a tree reaches past the context."""
    like = head.fc.weight
    positions = torch.arange(max_context + MAX_TREE_TOKENS, device=like.device)
    cos, sin = rotary(positions, head.config.head_dim, head.config.rope_theta)
    return cos.to(like.dtype), sin.to(like.dtype)


def joined(*layers: torch.nn.Linear) -> Tensor:
    return torch.cat([layer.weight for layer in layers])
