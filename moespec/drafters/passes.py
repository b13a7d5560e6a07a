"""What drafting needs of an EAGLE-3 head: to follow committed tokens, and to grow a tree. Owns the seam.

Behind it the head's formula is written out on raw arrays (`torch_pass.py`, `compiled_pass.py`): a draft step is short,
and through modules the calls would cost more than the products. Knows nothing of engines.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from moespec.config import MAX_TREE_TOKENS, TreeConfig
from moespec.drafters.head import Eagle3Head
from moespec.types import DraftTree

INITIAL_CAPACITY = 512  # positions; doubled when needed


class HeadPass(Protocol):
    """What drafting needs of a head. `has_fixed_shape`: every other shape of a tree has to be prepared, at a cost."""

    has_fixed_shape: bool

    def fork(self) -> HeadPass:
        """The same weights, with keys and values of its own."""
        ...

    def extend(self, tokens: list[int], features_NF: Tensor, start: int) -> Tensor:
        """Run over the committed pairs (features of a position, token behind it) from position `start` on and keep
        their keys and values; the state h_out [1, D] of the last."""
        ...

    def grow(self, state_1D: Tensor, length: int, root: int, config: TreeConfig) -> DraftTree:
        """A tree grown from the root's state behind `length` committed keys."""
        ...


class KeysAndValues:
    """[2, heads, capacity, head_dim], grown by doubling."""

    def __init__(self, head: Eagle3Head) -> None:
        self._head = head
        config, weight = head.config, head.fc.weight
        # Zeros: where a pass sees all that is stored, a weight of 0 does not silence a NaN.
        self.stored = weight.new_zeros(2, config.num_key_value_heads, INITIAL_CAPACITY, config.head_dim)

    def empty(self) -> KeysAndValues:
        """Others of the same head."""
        return KeysAndValues(self._head)

    def reserve(self, length: int) -> None:
        capacity = self.stored.shape[2]
        if length > capacity:
            grown = self.stored.new_zeros(*self.stored.shape[:2], max(2 * capacity, length), self.stored.shape[3])
            grown[:, :, :capacity] = self.stored
            self.stored = grown


def rope_table(head: Eagle3Head, max_context: int) -> tuple[Tensor, Tensor]:
    """cos and sin [positions, head_dim], halves repeated, in the head's dtype; a tree reaches past the context."""
    like = head.fc.weight
    positions = torch.arange(max_context + MAX_TREE_TOKENS, device=like.device)
    cos, sin = head.config.rope.table(positions, head.config.head_dim)
    return cos.to(like.dtype), sin.to(like.dtype)
