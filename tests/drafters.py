"""Drafters for tests: one that knows the answer and hides it among distractors, one that knows nothing."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from torch import Tensor

from moespec import DraftContext, DraftTree
from moespec.types import ancestor_mask


class PlantingDrafter:
    """Plants the reference continuation at varying depth and sibling rank, `known` share of the time.

    Of several references, that of the prompt.
    """

    name = "planting"
    tap_layers: tuple[int, ...] = ()

    def __init__(
        self,
        reference: list[int],
        vocab_size: int,
        seed: int = 0,
        known: float = 1.0,
        further: Sequence[list[int]] = (),
    ) -> None:
        self._references, self._vocab_size, self._known = (reference, *further), vocab_size, known
        self._rng = random.Random(seed)

    def fork(self) -> PlantingDrafter:
        reference, *further = self._references
        return PlantingDrafter(reference, self._vocab_size, self._rng.randrange(100), self._known, further)

    def observe(self, features_NF: Tensor | None) -> None:
        pass

    def truncate(self, length: int) -> None:
        pass

    def propose(self, context: DraftContext) -> DraftTree:
        length, rng = len(context.token_ids), self._rng
        reference = max(self._references, key=lambda ids: _num_shared(ids, context.token_ids))
        planted = reference[length : length + rng.randint(2, 4)] if rng.random() < self._known else []
        tokens, parents, depths = [context.token_ids[-1]], [-1], [0]
        parent = 0
        for depth in range(1, max(len(planted), 2) + 1):
            right = planted[depth - 1 : depth]
            others = [token for token in rng.sample(range(self._vocab_size), 4) if token not in right]
            level = right + others[: rng.randint(1, 3)]
            rng.shuffle(level)
            first = len(tokens)
            tokens += level
            parents += [parent] * len(level)
            depths += [depth] * len(level)
            parent = first + (level.index(right[0]) if right else 0)
        parents_T, depths_T = torch.tensor(parents), torch.tensor(depths)
        mask_TT = ancestor_mask(parents_T, max(depths))
        return DraftTree(torch.tensor(tokens), parents_T, depths_T, -depths_T.float(), mask_TT)


def _num_shared(ours: list[int], theirs: list[int]) -> int:
    return next((n for n, (one, other) in enumerate(zip(ours, theirs, strict=False)) if one != other), len(ours))
