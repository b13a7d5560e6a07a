"""EAGLE-3 drafting: the head run incrementally over committed features, then level by level over the growing tree.

Owns which positions the head has seen; how a pass is computed and a tree grown is behind `drafters/passes.py`.
Knows nothing of the target but its features.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moespec.drafters.base import DraftContext
from moespec.drafters.compiled_pass import CompiledPass
from moespec.drafters.head import Eagle3Head
from moespec.drafters.passes import HeadPass
from moespec.drafters.static_pass import StaticPass
from moespec.drafters.torch_pass import TorchPass
from moespec.graph import Graphs
from moespec.lean import MAX_HIDDEN_SIZE
from moespec.native import load_kernels
from moespec.tree import root_only
from moespec.types import DraftTree


class Eagle3Drafter:
    """Feature of position t is paired with token t + 1, so `n` committed positions and a root give `n` head rows."""

    name = "EAGLE-3"

    def __init__(self, head: Eagle3Head, max_context: int, head_pass: HeadPass | None = None) -> None:
        config = head.config
        self.head, self._max_context = head, max_context
        self.tap_layers = config.tap_layers
        self._pass = head_pass or make_pass(head, max_context)
        self._device = head.fc.weight.device
        self._length = 0  # committed positions whose pair is in the KV cache
        self._pending: list[Tensor] = []  # features of later committed positions

    def fork(self) -> Eagle3Drafter:
        """Of the same head and its weights."""
        return Eagle3Drafter(self.head, self._max_context, self._pass.fork())

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
            return root_only(root, self._device)
        tree = context.tree if self._pass.has_fixed_shape else context.bounded_tree
        state_1D = self._pass.extend(*self._pending_pairs(context.token_ids))
        self._caught_up(context)
        return self._pass.grow(state_1D, self._length, root, tree)

    @staticmethod
    def propose_together(asked: Sequence[tuple[Eagle3Drafter, DraftContext]]) -> list[DraftTree] | None:
        """`propose` of forks of one drafter, in passes over the rows of them all; None where the pass knows no such."""
        passes = [drafter._pass for drafter, _ in asked if isinstance(drafter._pass, CompiledPass)]
        contexts = [context for _, context in asked]
        if len(passes) < len(asked) or len({context.tree.top_k for context in contexts}) > 1:
            return None
        pending = [drafter._pending_pairs(context.token_ids) for drafter, context in asked]
        states_RD = CompiledPass.extend_together(passes, *map(list, zip(*pending, strict=True)))
        for drafter, context in asked:
            drafter._caught_up(context)
        return CompiledPass.grow_together(
            passes,
            states_RD,
            [drafter._length for drafter, _ in asked],
            [context.token_ids[-1] for context in contexts],
            [context.bounded_tree for context in contexts],
        )

    def _pending_pairs(self, token_ids: list[int]) -> tuple[list[int], Tensor, int]:
        """Pairs that the head has not run over: tokens, features, the first one's position."""
        features_NF = torch.cat(self._pending) if len(self._pending) > 1 else self._pending[0]
        start, end = self._length, self._length + features_NF.shape[0]
        assert end == len(token_ids) - 1, "every committed position but the root's has been observed"
        return token_ids[start + 1 : end + 1], features_NF, start

    def _caught_up(self, context: DraftContext) -> None:
        self._length, self._pending = len(context.token_ids) - 1, []


def make_pass(head: Eagle3Head, max_context: int, graphs: Graphs | None = None) -> HeadPass:
    """In steps of fixed shape, replayed as CUDA graphs, on a GPU; for small fp32 heads on the CPU compiled, on weights
    quantized to int8; on torch's operations for all others."""
    weight = head.fc.weight
    if weight.device.type == "cuda":
        return StaticPass(head, max_context, graphs or Graphs(weight.device))
    small = weight.dtype == torch.float32 and head.config.hidden_size <= MAX_HIDDEN_SIZE
    return CompiledPass(head, max_context) if small and load_kernels() is not None else TorchPass(head, max_context)
