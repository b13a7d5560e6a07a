"""Prompt look-up: guess that what followed the last few tokens before will follow them again. Needs no model.

Owns an index of where every n-gram of the committed tokens ended, which grows with them: a step costs no search,
however long the text. Knows nothing of models.
"""

from __future__ import annotations

import heapq
import math
from collections import defaultdict
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from moespec.drafters.base import DraftContext
from moespec.tree import root_only, tree_of
from moespec.types import DraftTree

MAX_MATCHES = 64  # of one length that are looked at, the latest: a frequent word has thousands


class _Candidate(NamedTuple):
    """A node that may come next, ordered as it will: `ends` are the positions behind the matches that it continues."""

    minus_p: float
    minus_latest: int
    token: int
    parent: int
    depth: int
    ends: list[int]


class NgramDrafter:
    """Proposes the continuations of all earlier matches of the last `max_ngram` to 1 tokens, merged into one tree.

    A path's probability is the share of the matches that it continues, where the shorter matches together have one vote
    beside the N_n matches of length n, of which c_n agree:  p_n = (c_n + p_(n-1)) / (N_n + 1),  p_0 = 0.
    So a longer match counts most, the more often it was seen the more so, and shorter ones fill the tree where it is
    silent. What is missing to 1 is left to words that never followed.
    """

    name = "n-gram"
    tap_layers: tuple[int, ...] = ()

    def __init__(self, max_ngram: int = 3, device: torch.device | str = "cpu") -> None:
        self._max_ngram = max_ngram
        self._device = torch.device(device)
        self._ids: list[int] = []  # the indexed tokens
        self._ends: defaultdict[tuple[int, ...], list[int]] = defaultdict(list)  # n-gram to the positions behind it

    def observe(self, features_NF: Tensor | None) -> None:
        """Nothing to keep: the tokens come with the context."""

    def truncate(self, length: int) -> None:
        while len(self._ids) > length:
            for gram in self._last_grams():
                self._ends[gram].pop()
                if not self._ends[gram]:
                    del self._ends[gram]
            self._ids.pop()

    def fork(self) -> NgramDrafter:
        """With an empty index: it is of one conversation."""
        return NgramDrafter(self._max_ngram, self._device)

    def propose(self, context: DraftContext) -> DraftTree:
        """The likeliest paths, best first, with at most `top_k` children each; just the root if nothing matches."""
        self._read(context.token_ids)
        config, root = context.bounded_tree, context.token_ids[-1]
        tokens: list[int] = []
        parents: list[int] = []
        logp: list[float] = []
        votes = self._votes()
        # Best first; of equal ones the latest seen, and so along one match rather than across several.
        candidates = self._children([*votes], votes, 0, 0, config.top_k)
        heapq.heapify(candidates)
        while candidates and len(tokens) < config.total_tokens - 1:
            best = heapq.heappop(candidates)
            if -best.minus_p < config.min_path_p:
                break
            tokens.append(best.token)
            parents.append(best.parent)
            logp.append(math.log(-best.minus_p))
            if best.depth < config.depth:
                for child in self._children(best.ends, votes, best.depth, len(tokens), config.top_k):
                    heapq.heappush(candidates, child)
        if not tokens:
            return root_only(root, self._device)
        return tree_of(root, tokens, parents, logp, self._device)

    def _read(self, token_ids: list[int]) -> None:
        """Index the tokens that are new."""
        for token in token_ids[len(self._ids) :]:
            self._ids.append(token)
            for gram in self._last_grams():
                self._ends[gram].append(len(self._ids))

    def _votes(self) -> dict[int, float]:
        """Position behind each match to what it adds to the probability of a path that it continues."""
        votes: defaultdict[int, float] = defaultdict(float)
        share = 1.0
        for gram in reversed([*self._last_grams()]):
            ends = self._ends[gram][-1 - MAX_MATCHES : -1]  # the last one is where the text ends
            share /= len(ends) + 1
            for end in ends:
                votes[end] += share
        return votes

    def _children(
        self, ends: list[int], votes: dict[int, float], depth: int, parent: int, top_k: int
    ) -> list[_Candidate]:
        """What followed `depth` tokens behind these positions."""
        by_token: defaultdict[int, list[int]] = defaultdict(list)
        for end in ends:
            if end + depth < len(self._ids):
                by_token[self._ids[end + depth]].append(end)
        found = [
            _Candidate(-sum(votes[end] for end in ends), -max(ends), token, parent, depth + 1, ends)
            for token, ends in by_token.items()
        ]
        return heapq.nsmallest(top_k, found)

    def _last_grams(self) -> Iterator[tuple[int, ...]]:
        """The n-grams that end with the last token, the shortest first."""
        for size in range(1, min(self._max_ngram, len(self._ids)) + 1):
            yield tuple(self._ids[-size:])
