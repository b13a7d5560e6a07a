"""Prompt look-up: guess that what followed the last few tokens before will follow them again. Needs no model."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from moespec.drafters.base import DraftContext
from moespec.tree import chain, root_only
from moespec.types import DraftTree


class NgramDrafter:
    """Proposes the continuation of the longest earlier match of the last `max_ngram` to 1 tokens, as a chain."""

    name = "n-gram"
    tap_layers: tuple[int, ...] = ()

    def __init__(self, max_ngram: int = 3, device: torch.device | str = "cpu") -> None:
        self._max_ngram = max_ngram
        self._device = torch.device(device)

    def observe(self, features_NF: Tensor | None) -> None:
        """Nothing to keep: all it needs comes with the context."""

    def truncate(self, length: int) -> None:
        """Nothing is kept."""

    def fork(self) -> NgramDrafter:
        """Itself: it keeps nothing of a conversation."""
        return self

    def propose(self, context: DraftContext) -> DraftTree:
        """A chain of at most min(depth, total_tokens - 1) tokens; just the root if nothing matches."""
        ids = context.token_ids
        tree = context.bounded_tree
        limit = min(tree.depth, tree.total_tokens - 1)
        for size in range(min(self._max_ngram, len(ids) - 1), 0, -1):
            ends = _match_ends(ids, size)
            if ends and limit:
                tokens, logp = _continuation(ids, ends, limit, tree.min_path_p)
                return chain(ids[-1], tokens, logp, self._device)
        return root_only(ids[-1], self._device)


def _match_ends(ids: list[int], size: int) -> list[int]:
    """Positions right behind each earlier occurrence of the last `size` tokens, oldest first."""
    needle = ids[-size:]
    return [end for end in range(size, len(ids)) if ids[end - size : end] == needle]


def _continuation(ids: list[int], ends: list[int], limit: int, least_p: float) -> tuple[list[int], list[float]]:
    """What followed the latest match, with the share of the matches that agree as each token's probability.

    It ends where the path would be less likely than `least_p`.
    """
    tokens: list[int] = []
    logp: list[float] = []
    latest, num_matches = ends[-1], len(ends)
    for offset in range(min(limit, len(ids) - latest)):
        token = ids[latest + offset]
        agreeing = [end for end in ends if end + offset < len(ids) and ids[end + offset] == token]
        if len(agreeing) / num_matches < least_p:
            break
        logp.append(math.log(len(agreeing) / len(ends)))
        tokens.append(token)
        ends = agreeing
    return tokens, logp
