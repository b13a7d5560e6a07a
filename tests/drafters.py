"""Drafters for tests: one that knows the answer and hides it among distractors, one that knows nothing."""

from __future__ import annotations

import random

import torch
from torch import Tensor

from moespec import DraftContext, DraftTree
from moespec.types import ancestor_mask


class PlantingDrafter:
    """Plants the reference continuation at varying depth and sibling rank, `known` share of the time."""

    name = "planting"
    tap_layers: tuple[int, ...] = ()

    def __init__(self, reference: list[int], vocab_size: int, seed: int = 0, known: float = 1.0) -> None:
        self._reference, self._vocab_size, self._known = reference, vocab_size, known
        self._rng = random.Random(seed)

    def observe(self, features_NF: Tensor | None) -> None:
        pass

    def truncate(self, length: int) -> None:
        pass

    def propose(self, context: DraftContext) -> DraftTree:
        length, rng = len(context.token_ids), self._rng
        planted = self._reference[length : length + rng.randint(2, 4)] if rng.random() < self._known else []
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
