"""The drafter seam. Owns the interface and what a drafter may know; knows nothing of any drafter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from torch import Tensor

from moespec.config import TreeConfig
from moespec.types import DraftTree


@dataclass(frozen=True)
class DraftContext:
    """What a proposal starts from: all committed token ids (the last one is the root) and the tree asked for.

    `max_depth`: a deeper path would be verified for nothing, since not so much may still be written.
    """

    token_ids: list[int]
    tree: TreeConfig
    max_depth: int | None = None

    @property
    def bounded_tree(self) -> TreeConfig:
        """The tree asked for, no deeper than is of use."""
        if self.max_depth is None or self.max_depth >= self.tree.depth:
            return self.tree
        return replace(self.tree, depth=self.max_depth)


class Drafter(Protocol):
    """Proposes trees of one conversation and is told what became of them.

    `tap_layers`: decoder layers whose entering residual it wants as features; empty for none. The rows it observes are
    committed positions in order, none left out.
    """

    name: str
    tap_layers: tuple[int, ...]

    def propose(self, context: DraftContext) -> DraftTree:
        """A tree below the root with at most `context.tree.total_tokens` rows.

        The token ids are those of the proposal before, as far as `truncate` has left them, and more.
        """
        ...

    def observe(self, features_NF: Tensor | None) -> None:
        """N more committed positions and the target's features there, [N, num_taps * D] (None without taps)."""
        ...

    def truncate(self, length: int) -> None:
        """Forget every position from `length` on; the next observed row is position `length`."""
        ...

    def fork(self) -> Drafter:
        """One more like it, with the same weights, for another conversation. Only a batch asks for it."""
        ...


def propose_together(asked: Sequence[tuple[Drafter, DraftContext]]) -> list[DraftTree] | None:
    """Trees of forks of one drafter in passes that they share, or None where such passes are not to be had."""
    shared = getattr(type(asked[0][0]), "propose_together", None)
    return None if shared is None else shared(asked)
