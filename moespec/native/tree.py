"""Growth of the dynamic draft tree as one compiled call: the algorithm of `tree.py` over the head of `native/head.py`.

Tested against those two. Letters: N frontier rows, P pool of candidates, X expanded nodes, A alternatives, T tree rows.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from moespec.native.attention import NUM_ROWS, START
from moespec.native.head import best_tokens, states
from moespec.native.layers import FAST, F, unit_rows
from moespec.native.routing import highest


@njit(**FAST)
def _highest(values, count):
    """Indices of the highest values, best first; ties to the lower index, so that a parent comes before its child."""
    found = np.empty(count, np.int64)
    highest(values, np.ones(values.shape[0], np.bool_), found)
    return found


@njit(**FAST)
def grow(state, length, head, final, embeddings, vocab_map, cos, sin, table, shape, options):
    """The pool of one growth from the root's state [1, D]; committed keys fill the first `length` places.

    head: the weights of `states`; final: (norm, lm_head); table [1, 7] says where keys and values lie;
    shape: (depth, top_k, alternatives, least log-probability of a path);
    options: (scale, residual is normalised, the next g is normalised).
    Returns candidates (tokens [P], logp [P], parents [P] in the pool or -1, levels [P]) and, per expanded node, its
    place in the pool [X] with what was seen below it, ids and log-probabilities [X, A].
    """
    eps = head[1]
    norm, lm_head = final
    depth, top_k, num_best, least_logp = shape
    scale, before_residual, norm_output = options
    size, num_expanded = top_k + (depth - 1) * top_k * top_k, 1 + (depth - 1) * top_k
    tokens, parents, levels = np.empty(size, np.int64), np.empty(size, np.int64), np.empty(size, np.int64)
    logp = np.empty(size, np.float32)
    places = np.full(num_expanded, -1)
    alt_ids, alt_logp = np.empty((num_expanded, num_best), np.int64), np.empty((num_expanded, num_best), np.float32)
    seen = np.zeros((num_expanded, num_expanded), np.bool_)  # rows and columns: expanded nodes but the root
    ids, best = best_tokens(state, norm, eps, lm_head, num_best)
    alt_ids[0], alt_logp[0] = vocab_map[ids[0]], best[0]
    frontier = np.arange(top_k)
    tokens[:top_k], logp[:top_k], parents[:top_k], levels[:top_k] = vocab_map[ids[0, :top_k]], best[0, :top_k], -1, 1
    filled, rows_before, rows_above = top_k, 0, 0
    above, row_of = state, np.zeros(top_k, np.int64)  # states of the level above, and each frontier node's row in it
    for level in range(1, depth):
        likely = frontier[logp[frontier] >= least_logp]  # below the others nothing could be kept
        width = likely.shape[0]
        if width == 0:
            break
        hidden = unit_rows(above, norm, eps) if norm_output else above
        for i in range(width):
            row = rows_before + i
            if level > 1:
                seen[row] = seen[rows_before - rows_above + row_of[i]]
            seen[row, row] = True
        turns = np.full(width, length + level - 1)
        table[0, NUM_ROWS], table[0, START] = width, length + rows_before
        above = states(
            embeddings[tokens[likely]], hidden[row_of[:width]], head, cos[turns], sin[turns], table,
            np.ascontiguousarray(seen[rows_before : rows_before + width, : rows_before + width]),
            (scale, before_residual), width,
        )  # fmt: skip
        ids, best = best_tokens(above, norm, eps, lm_head, num_best)
        first = filled
        for i in range(width):
            places[1 + rows_before + i] = likely[i]
            for a in range(num_best):
                alt_ids[1 + rows_before + i, a] = vocab_map[ids[i, a]]
                alt_logp[1 + rows_before + i, a] = best[i, a]
            for k in range(top_k):
                tokens[filled], logp[filled] = vocab_map[ids[i, k]], logp[likely[i]] + best[i, k]
                parents[filled], levels[filled] = likely[i], level + 1
                filled += 1
        rows_before, rows_above = rows_before + width, width
        best_of_level = _highest(logp[first:filled], top_k)
        frontier, row_of = first + best_of_level, best_of_level // top_k
    expanded = 1 + rows_before
    return (
        *(tokens[:filled], logp[:filled], parents[:filled], levels[:filled]),
        *(places[:expanded], alt_ids[:expanded], alt_logp[:expanded]),
    )


@njit(**FAST)
def select(root, num_drafts, least_logp, pool):
    """The best candidates as a tree in pool order behind the root: tokens, parents, depths, logp [T], mask [T, T], and
    what the drafter saw below each row, ids (-1 where it was not asked) and log-probabilities [T, A]."""
    pool_tokens, pool_logp, pool_parents, pool_levels, places, pool_alt_ids, pool_alt_logp = pool
    num_rows = 1 + min(num_drafts, (pool_logp >= least_logp).sum())
    chosen = np.zeros(pool_tokens.shape[0], np.bool_)
    chosen[_highest(pool_logp, num_rows - 1)] = True
    row_of = np.full(pool_tokens.shape[0], -1)
    tokens, parents, depths = np.empty(num_rows, np.int64), np.empty(num_rows, np.int64), np.empty(num_rows, np.int64)
    logp, mask = np.empty(num_rows, np.float32), np.zeros((num_rows, num_rows), np.bool_)
    tokens[0], parents[0], depths[0], logp[0], mask[0, 0] = root, -1, 0, F(0), True
    row = 1
    for i in range(pool_tokens.shape[0]):
        if chosen[i]:
            row_of[i] = row
            tokens[row], depths[row], logp[row] = pool_tokens[i], pool_levels[i], pool_logp[i]
            parents[row] = 0 if pool_parents[i] < 0 else row_of[pool_parents[i]]
            mask[row] = mask[parents[row]]
            mask[row, row] = True
            row += 1
    alt_ids = np.full((num_rows, pool_alt_ids.shape[1]), -1)
    alt_logp = np.full((num_rows, pool_alt_ids.shape[1]), F(-np.inf))
    for x in range(places.shape[0]):
        row = 0 if x == 0 else row_of[places[x]]
        if row >= 0:
            alt_ids[row], alt_logp[row] = pool_alt_ids[x], pool_alt_logp[x]
    return tokens, parents, depths, logp, mask, alt_ids, alt_logp
