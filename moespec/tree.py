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
# Times as likely as the least path that is kept: below less likely nodes nothing is looked for. Of what a pass of the
# drafter finds there most could not be kept, and it costs as much as any other. Where all levels are drafted anyhow,
# with no question to the device, trees are the same.
SEARCHED = 2.0


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


def least_logp(config: TreeConfig) -> float:
    """The least of a path that is kept. Without a limit it is still finite: compiled arithmetic knows no infinity."""
    return math.log(config.min_path_p) if config.min_path_p else -1e30


def least_searched_logp(config: TreeConfig) -> float:
    """The least of a node that children are looked for below. Below the root they always are."""
    return least_logp(config) + math.log(SEARCHED)


def best_tokens(logits_NV: Tensor, num_best: int) -> Best:
    """The likeliest next tokens of each row; no temperature: children are a top-k set."""
    logp_NV = logits_NV.float().log_softmax(dim=-1)
    found = logp_NV.topk(min(num_best, logp_NV.shape[-1]), dim=-1)
    return found.indices, found.values


def seen_below(seen_NR: Tensor, frontier: Frontier) -> Tensor:
    """bool: which of the tree's own rows the frontier's see, of what those above saw: these, and each itself."""
    own_NN = torch.eye(len(frontier.tokens_N), dtype=torch.bool, device=seen_NR.device)
    return torch.cat([seen_NR[frontier.parents_N], own_NN], dim=1)


def grow_tree(
    root_best: Best, scorer: Scorer, root: int, config: TreeConfig, vocab_map: Tensor | None = None
) -> DraftTree:
    """Grow `depth` levels, expanding those of each level's `top_k` best nodes that are likely enough, and keep the best
    `total_tokens - 1` of the pool.

    root_best: the best tokens after the root, N = 1. `vocab_map` int64 [V']: draft ids to the target's, if they differ.
    Cumulative log-probability never rises along a path, so the ancestors of a chosen node are chosen too.
    """
    device, least = root_best[0].device, least_logp(config)
    growth = _Growth(root_best, config, vocab_map)
    while growth.level < config.depth and growth.narrow(least_searched_logp(config) if config.min_path_p else None):
        growth.expand(scorer)
    tree = growth.select(torch.tensor([root], device=device), torch.tensor(least, dtype=torch.float32, device=device))
    assert tree.num_valid is not None
    return tree.first_rows(int(tree.num_valid))


def grow_fixed_tree(
    root_best: Best, scorer: Scorer, root_1: Tensor, config: TreeConfig, least: Tensor, vocab_map: Tensor | None
) -> DraftTree:
    """The same in a fixed shape that asks the device for nothing: all levels are grown, `num_valid` rows count.

    root_1 int64 [1]; least fp32, of a path that is kept: both on the device, and `config.min_path_p` is not read.
    """
    growth = _Growth(root_best, config, vocab_map)
    while growth.level < config.depth:
        growth.expand(scorer)
    return growth.select(root_1, least)


def root_only(root: int, device: torch.device) -> DraftTree:
    """The tree of plain decoding: one row."""
    zero = torch.zeros(1, dtype=torch.long, device=device)
    return DraftTree(
        tokens_T=torch.tensor([root], device=device),
        parents_T=zero - 1,
        depths_T=zero,
        draft_logp_T=torch.zeros(1, dtype=torch.float32, device=device),
        mask_TT=torch.ones(1, 1, dtype=torch.bool, device=device),
        max_depth=0,
    )


def chain(root: int, tokens: list[int], logp: list[float], device: torch.device) -> DraftTree:
    """A tree without branches; `logp` are the tokens' own log-probabilities."""
    num_rows = len(tokens) + 1
    rows = torch.arange(num_rows, device=device)
    return DraftTree(
        tokens_T=torch.tensor([root, *tokens], device=device),
        parents_T=rows - 1,
        depths_T=rows,
        draft_logp_T=torch.tensor([0.0, *logp], dtype=torch.float32, device=device).cumsum(0),
        mask_TT=torch.ones(num_rows, num_rows, dtype=torch.bool, device=device).tril(),
        max_depth=num_rows - 1,
    )


def most_likely_rows(tree: DraftTree, num_rows: int) -> DraftTree:
    """The root and the rows most likely to be reached, `num_rows` in all, in the order they had.

    A path is never likelier than where it began, so the ancestors of a row that is kept are kept, too.
    """
    if num_rows == 1:
        return tree.first_rows(1)  # several times as quick, and asked for often
    order_T = tree.draft_logp_T.sort(descending=True, stable=True).indices  # stable: parents before children as likely
    rows_N = order_T[:num_rows].sort().values
    places_T = torch.full_like(tree.parents_T, -1).index_copy_(0, rows_N, torch.arange(num_rows, device=rows_N.device))
    parents_N = tree.parents_T[rows_N]
    alt_ids_TA, alt_logp_TA = tree.alt_ids_TA, tree.alt_logp_TA
    return DraftTree(
        tokens_T=tree.tokens_T[rows_N],
        parents_T=torch.where(parents_N < 0, parents_N, places_T[parents_N.clamp(min=0)]),
        depths_T=tree.depths_T[rows_N],
        draft_logp_T=tree.draft_logp_T[rows_N],
        mask_TT=tree.mask_TT[rows_N][:, rows_N],
        alt_ids_TA=None if alt_ids_TA is None else alt_ids_TA[rows_N],
        alt_logp_TA=None if alt_logp_TA is None else alt_logp_TA[rows_N],
        max_depth=tree.max_depth,
    )


def tree_of(root: int, tokens: list[int], parents: list[int], logp: list[float], device: torch.device) -> DraftTree:
    """A tree from its rows behind the root: each one's parent row, which stands before it, and its path's logp."""
    depths = [0]
    for parent in parents:
        depths.append(depths[parent] + 1)
    parents_T = torch.tensor([-1, *parents], device=device)
    return DraftTree(
        tokens_T=torch.tensor([root, *tokens], device=device),
        parents_T=parents_T,
        depths_T=torch.tensor(depths, device=device),
        draft_logp_T=torch.tensor([0.0, *logp], dtype=torch.float32, device=device),
        mask_TT=ancestor_mask(parents_T, max(depths)),
        max_depth=max(depths),
    )


class _Growth:
    """A tree as it grows: all candidates in pool order (parents before children), and what was seen on the way."""

    def __init__(self, root_best: Best, config: TreeConfig, vocab_map: Tensor | None) -> None:
        ids_NA, logp_NA = root_best
        self._config, self._vocab_map = config, vocab_map
        self._top_k = min(config.top_k, ids_NA.shape[1])
        root_N = ids_NA.new_full((1,), -1)  # the root's index in the pool, which it is not in
        self._levels: list[tuple[Tensor, Tensor, Tensor]] = []  # tokens, log-probabilities, parents
        self._expanded = [(root_N, ids_NA, logp_NA)]
        self._size = 0
        self.level = 1
        self._frontier_logp_N = logp_NA[0, : self._top_k]
        self._children_N, self._rows_N = ids_NA[0, : self._top_k], ids_NA.new_zeros(self._top_k)
        start = self._add(self._children_N, self._frontier_logp_N, root_N.repeat(self._top_k))
        self._frontier_N = start + torch.arange(self._top_k, device=ids_NA.device)

    def narrow(self, least: float | None) -> bool:
        """Leave nodes that are less likely out of the frontier, if there is a limit; whether there is one left."""
        if least is None:
            return True
        num_left = int((self._frontier_logp_N >= least).sum())  # they are the first ones
        self._frontier_logp_N, self._frontier_N = self._frontier_logp_N[:num_left], self._frontier_N[:num_left]
        self._children_N, self._rows_N = self._children_N[:num_left], self._rows_N[:num_left]
        return num_left > 0

    def expand(self, scorer: Scorer) -> None:
        """One level more below the frontier."""
        ids_NA, logp_NA = scorer(Frontier(self._target_ids(self._children_N), self._rows_N, self.level))
        self._expanded.append((self._frontier_N, ids_NA, logp_NA))
        top_k = self._top_k
        candidates_NK = self._frontier_logp_N[:, None] + logp_NA[:, :top_k]
        parents_N = self._frontier_N[:, None].expand_as(candidates_NK).flatten()
        start = self._add(ids_NA[:, :top_k].flatten(), candidates_NK.flatten(), parents_N)
        self._frontier_logp_N, best_N = candidates_NK.flatten().topk(min(top_k, candidates_NK.numel()))
        self._children_N, self._rows_N = ids_NA[:, :top_k].flatten()[best_N], best_N // top_k
        self._frontier_N = best_N + start
        self.level += 1

    def select(self, root_1: Tensor, least: Tensor) -> DraftTree:
        """The best candidates as a tree in pool order behind the root, at most `total_tokens` rows with it.

        Those less likely than `least`, and those that were not looked for, are its last rows, and no valid ones.
        """
        tokens_P, logp_P, parents_P = (torch.cat(parts) for parts in zip(*self._levels, strict=True))
        levels_P = torch.cat([torch.full_like(part, n + 1) for n, (part, _, _) in enumerate(self._levels)])
        # One slot more, so that index -1, the root, is one to look below.
        is_root_1 = torch.ones_like(root_1, dtype=torch.bool)
        is_searched_P = torch.cat([logp_P >= least + math.log(SEARCHED), is_root_1])
        found_logp_P = torch.where(is_searched_P[parents_P], logp_P, -torch.inf)
        # Stable: where a child is as likely as its parent, the parent comes first.
        order_N = found_logp_P.sort(descending=True, stable=True).indices[: self._config.total_tokens - 1]
        is_valid_N = found_logp_P[order_N] >= least
        ranks_N = torch.arange(len(order_N), device=order_N.device)
        chosen_N = order_N[torch.where(is_valid_N, order_N, self._size + ranks_N).argsort()]
        # Row of each pool index; the root finds row 0.
        rows_P = torch.zeros(self._size + 1, dtype=torch.long, device=order_N.device)
        rows_P[chosen_N] = ranks_N + 1
        parents_T = torch.cat([torch.full_like(root_1, -1), rows_P[parents_P[chosen_N]]])
        alt_ids_TA, alt_logp_TA = self._alternatives(rows_P, is_searched_P, len(parents_T))
        return DraftTree(
            tokens_T=torch.cat([root_1, self._target_ids(tokens_P)[chosen_N]]),
            parents_T=parents_T,
            depths_T=torch.cat([torch.zeros_like(root_1), levels_P[chosen_N]]),
            draft_logp_T=torch.cat([logp_P.new_zeros(1), logp_P[chosen_N]]),
            mask_TT=ancestor_mask(parents_T, self._config.depth),
            alt_ids_TA=alt_ids_TA,
            alt_logp_TA=alt_logp_TA,
            num_valid=is_valid_N.sum() + 1,
            max_depth=self._config.depth,
        )

    def _target_ids(self, draft_ids: Tensor) -> Tensor:
        return draft_ids if self._vocab_map is None else self._vocab_map[draft_ids]

    def _add(self, tokens_N: Tensor, logp_N: Tensor, parents_N: Tensor) -> int:
        """Add one level; returns the pool index of its first candidate. Parents are pool indices, -1 is the root."""
        start = self._size
        self._levels.append((tokens_N, logp_N, parents_N))
        self._size += tokens_N.shape[0]
        return start

    def _alternatives(self, rows_P: Tensor, is_searched_P: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
        """What the drafter saw below each row of the tree that was one to look below; id -1 elsewhere."""
        pool_X = torch.cat([pool for pool, _, _ in self._expanded])
        ids_XA = self._target_ids(torch.cat([ids for _, ids, _ in self._expanded]))[:, :NUM_ALTERNATIVES]
        logp_XA = torch.cat([logp for _, _, logp in self._expanded])[:, :NUM_ALTERNATIVES]
        rows_X = rows_P[pool_X]
        # Candidates that were expanded but not chosen also find row 0; only the first expansion is the root's.
        is_other_X = (rows_X == 0) & (pool_X >= 0) | ~is_searched_P[pool_X]
        rows_X = torch.where(is_other_X, num_rows, rows_X)
        alt_ids_TA = ids_XA.new_full((num_rows + 1, ids_XA.shape[1]), -1)
        alt_logp_TA = logp_XA.new_full(alt_ids_TA.shape, -torch.inf)
        alt_ids_TA[rows_X], alt_logp_TA[rows_X] = ids_XA, logp_XA
        return alt_ids_TA[:num_rows], alt_logp_TA[:num_rows]
