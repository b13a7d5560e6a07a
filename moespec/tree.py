"""The dynamic draft tree (EAGLE-2 and -3): grow level by level, keep the nodes most likely to be reached.

Owns growth and selection, given a function that scores the next tokens below given nodes. Knows nothing of draft heads.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from moespec.config import TreeConfig
from moespec.types import DraftTree, ancestor_mask

NUM_ALTERNATIVES = 5  # what a reader of the trace wants to see below a node


@dataclass(frozen=True)
class Frontier:
    """The nodes to expand next: tokens int64 [N], the expanded row each hangs below int64 [N], and their level.

    `parents_N` numbers the rows of the previous call of the scorer (0 in the first: the root's own row).
    """

    tokens_N: Tensor
    parents_N: Tensor
    level: int


# The likeliest next tokens below each node, best first: draft ids int64 [N, A] and log-probabilities fp32 [N, A].
Best = tuple[Tensor, Tensor]
Scorer = Callable[[Frontier], Best]


def num_asked(config: TreeConfig) -> int:
    """How many next tokens a scorer gives per node (fewer if the vocabulary has no more)."""
    return max(config.top_k, NUM_ALTERNATIVES)


def grow_tree(
    root_best: Best, scorer: Scorer, root: int, config: TreeConfig, vocab_map: Tensor | None = None
) -> DraftTree:
    """Grow `depth` levels, expanding the `top_k` best nodes of each, and keep the best `total_tokens - 1` of the pool.

    root_best: the best tokens after the root, N = 1. `vocab_map` int64 [V']: draft ids to the target's, if they differ.
    Cumulative log-probability never rises along a path, so the ancestors of a chosen node are chosen too.
    """
    ids_NA, logp_NA = root_best
    top_k = min(config.top_k, ids_NA.shape[1])
    device = ids_NA.device
    pool = _Pool(vocab_map)
    pool.expanded(torch.full((1,), -1, device=device), ids_NA, logp_NA)
    candidates_N = logp_NA[0, :top_k]
    children_N, rows_N = ids_NA[0, :top_k], torch.zeros(top_k, dtype=torch.long, device=device)
    start = pool.add(children_N, candidates_N, torch.full((top_k,), -1, device=device))
    frontier_logp_N, frontier_pool_N = candidates_N, torch.arange(start, start + top_k, device=device)
    least_logp = math.log(config.min_path_p) if config.min_path_p else -math.inf
    for level in range(1, config.depth):
        if config.min_path_p and float(frontier_logp_N[0]) < least_logp:
            break  # nothing below could be kept
        ids_NA, logp_NA = scorer(Frontier(pool.target_ids(children_N), rows_N, level))
        pool.expanded(frontier_pool_N, ids_NA, logp_NA)
        candidates_NK = frontier_logp_N[:, None] + logp_NA[:, :top_k]
        start = pool.add(ids_NA[:, :top_k].flatten(), candidates_NK.flatten(), frontier_pool_N.repeat_interleave(top_k))
        frontier_logp_N, best_N = candidates_NK.flatten().topk(min(top_k, candidates_NK.numel()))
        children_N, rows_N = ids_NA[:, :top_k].flatten()[best_N], best_N // top_k
        frontier_pool_N = best_N + start
    return pool.select(root, config.total_tokens - 1, least_logp, config.depth)


def root_only(root: int, device: torch.device) -> DraftTree:
    """The tree of plain decoding: one row."""
    zero = torch.zeros(1, dtype=torch.long, device=device)
    return DraftTree(
        tokens_T=torch.tensor([root], device=device),
        parents_T=zero - 1,
        depths_T=zero,
        draft_logp_T=torch.zeros(1, device=device),
        mask_TT=torch.ones(1, 1, dtype=torch.bool, device=device),
    )


def chain(root: int, tokens: list[int], logp: list[float], device: torch.device) -> DraftTree:
    """A tree without branches; `logp` are the tokens' own log-probabilities."""
    num_rows = len(tokens) + 1
    rows = torch.arange(num_rows, device=device)
    return DraftTree(
        tokens_T=torch.tensor([root, *tokens], device=device),
        parents_T=rows - 1,
        depths_T=rows,
        draft_logp_T=torch.tensor([0.0, *logp], device=device).cumsum(0),
        mask_TT=torch.ones(num_rows, num_rows, dtype=torch.bool, device=device).tril(),
    )


class _Pool:
    """All candidates of one growth, in pool order (parents before children), and what was seen on the way."""

    def __init__(self, vocab_map: Tensor | None) -> None:
        self._vocab_map = vocab_map
        self._tokens: list[Tensor] = []
        self._logp: list[Tensor] = []
        self._parents: list[Tensor] = []
        self._levels: list[int] = []
        self._expanded: list[tuple[Tensor, Tensor, Tensor]] = []
        self._size = 0

    def target_ids(self, draft_ids: Tensor) -> Tensor:
        return draft_ids if self._vocab_map is None else self._vocab_map[draft_ids]

    def add(self, tokens_N: Tensor, logp_N: Tensor, parents_N: Tensor) -> int:
        """Add one level; returns the pool index of its first candidate. Parents are pool indices, -1 is the root."""
        start = self._size
        self._tokens.append(tokens_N)
        self._logp.append(logp_N)
        self._parents.append(parents_N)
        self._levels.append(tokens_N.shape[0])
        self._size += tokens_N.shape[0]
        return start

    def expanded(self, pool_N: Tensor, ids_NA: Tensor, logp_NA: Tensor) -> None:
        self._expanded.append((pool_N, ids_NA, logp_NA))

    def select(self, root: int, num_drafts: int, least_logp: float, depth: int) -> DraftTree:
        """The best candidates, at most `num_drafts` of them, as a tree in pool order behind the root."""
        logp_P, tokens_P = torch.cat(self._logp), self.target_ids(torch.cat(self._tokens))
        device = logp_P.device
        # Stable: where a child is as likely as its parent, the parent comes first.
        order_P = logp_P.sort(descending=True, stable=True).indices
        if least_logp > -math.inf:
            num_drafts = min(num_drafts, int((logp_P >= least_logp).sum()))
        chosen_N = order_P[: min(num_drafts, self._size)].sort().values
        # Row of each pool index; one slot more so that index -1, the root, finds row 0.
        rows_P = torch.zeros(self._size + 1, dtype=torch.long, device=device)
        rows_P[chosen_N] = torch.arange(1, chosen_N.shape[0] + 1, device=device)
        sizes = torch.tensor(self._levels, device=device)
        levels_P = torch.repeat_interleave(torch.arange(1, len(self._levels) + 1, device=device), sizes)
        parents_T = torch.cat([sizes.new_full((1,), -1), rows_P[torch.cat(self._parents)[chosen_N]]])
        alt_ids_TA, alt_logp_TA = self._alternatives(rows_P, parents_T.shape[0])
        return DraftTree(
            tokens_T=torch.cat([sizes.new_full((1,), root), tokens_P[chosen_N]]),
            parents_T=parents_T,
            depths_T=torch.cat([sizes.new_zeros(1), levels_P[chosen_N]]),
            draft_logp_T=torch.cat([logp_P.new_zeros(1), logp_P[chosen_N]]),
            mask_TT=ancestor_mask(parents_T, depth),
            alt_ids_TA=alt_ids_TA,
            alt_logp_TA=alt_logp_TA,
        )

    def _alternatives(self, rows_P: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
        """What the drafter saw below each row of the tree that it expanded; id -1 elsewhere."""
        pool_X = torch.cat([pool for pool, _, _ in self._expanded])
        ids_XA = self.target_ids(torch.cat([ids for _, ids, _ in self._expanded]))[:, :NUM_ALTERNATIVES]
        logp_XA = torch.cat([logp for _, _, logp in self._expanded])[:, :NUM_ALTERNATIVES]
        rows_X = rows_P[pool_X]
        # Candidates that were expanded but not chosen also find row 0; only the first expansion is the root's.
        rows_X = torch.where((rows_X == 0) & (pool_X >= 0), num_rows, rows_X)
        alt_ids_TA = ids_XA.new_full((num_rows + 1, ids_XA.shape[1]), -1)
        alt_logp_TA = logp_XA.new_full(alt_ids_TA.shape, -torch.inf)
        alt_ids_TA[rows_X], alt_logp_TA[rows_X] = ids_XA, logp_XA
        return alt_ids_TA[:num_rows], alt_logp_TA[:num_rows]
