"""Growth of dynamic draft trees as one compiled call: the algorithm of `tree.py` over the head of `native/head.py`.

The trees of several conversations grow together, so that a level reads the head's weights once for all of them. Tested
against those two. Letters: R conversations, N rows of a level, P pool of candidates, X expanded nodes, A alternatives,
K children per node, T tree rows.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from moespec.native.attention import FIRST, NUM_FREE, NUM_ROWS, START
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
def _expand(state, found, widths, frontier, level, vocab_map, pool, nodes):
    """Take note of the rows that were run, `widths` [R] of each tree, and add the candidates below them.

    state [N, D]; found: the likeliest tokens after each row.
    """
    tokens, logp, parents, levels, filled = pool
    places, alt_ids, alt_logp, kept_states, _, expanded = nodes
    ids, best = found
    row = 0
    for tree in range(widths.shape[0]):
        for number in range(widths[tree]):
            up, x = frontier[tree, number] if level > 1 else -1, expanded[tree]
            places[tree, x], kept_states[tree, x] = up, state[row]
            for a in range(ids.shape[1]):
                alt_ids[tree, x, a], alt_logp[tree, x, a] = vocab_map[ids[row, a]], best[row, a]
            for k in range(frontier.shape[1]):
                n = filled[tree]
                tokens[tree, n], parents[tree, n], levels[tree, n] = alt_ids[tree, x, k], up, level
                logp[tree, n] = best[row, k] if up < 0 else logp[tree, up] + best[row, k]
                filled[tree] += 1
            expanded[tree] += 1
            row += 1


@njit(**FAST)
def _choose(widths, frontier, ups, level, shape, pool, expanded):
    """What to expand next: of each tree the best of the newest level, as many as are likely. Updates `widths` [R], the
    nodes' places in the pool and their parents' numbers among the expanded [R, K]."""
    (depths, least_searched, top_k, _), (_, logp, _, _, filled) = shape, pool
    for tree in range(widths.shape[0]):
        width, widths[tree] = widths[tree], 0
        if width == 0 or level == depths[tree]:
            continue
        first = filled[tree] - width * top_k
        best = _highest(logp[tree, first : filled[tree]], top_k)
        for number in range(top_k):
            frontier[tree, number] = first + best[number]
            ups[tree, number] = expanded[tree] - width + best[number] // top_k
            if logp[tree, first + best[number]] >= least_searched[tree]:
                widths[tree] += 1


@njit(**FAST)
def _rows(widths, frontier, ups, level, lengths, pool, nodes, table):
    """A level's rows, tree after tree: tokens [N], states above [N, D], positions [N], and what each sees of its tree's
    rows [N, M]; fills in the table."""
    _, _, _, kept_states, seen, expanded = nodes
    num_rows, num_columns = widths.sum(), (expanded + widths).max() - 1
    tokens, turns = np.empty(num_rows, np.int64), np.empty(num_rows, np.int64)
    hidden, mask = np.empty((num_rows, kept_states.shape[2]), np.float32), np.zeros((num_rows, num_columns), np.bool_)
    row = 0
    for tree in range(widths.shape[0]):
        table[tree, FIRST], table[tree, NUM_ROWS] = row, widths[tree]
        table[tree, START], table[tree, NUM_FREE] = lengths[tree] + expanded[tree] - 1, lengths[tree]
        for number in range(widths[tree]):
            x, up = expanded[tree] + number, ups[tree, number]
            seen[tree, x] = seen[tree, up]
            seen[tree, x, x - 1] = True
            mask[row, :x] = seen[tree, x, :x]
            tokens[row], hidden[row] = pool[0][tree, frontier[tree, number]], kept_states[tree, up]
            turns[row] = lengths[tree] + level - 1
            row += 1
    return tokens, hidden, turns, mask


@njit(**FAST)
def grow(state, lengths, head, final, embeddings, vocab_map, cos, sin, table, shape, options):
    """The pool of each of R growths from its root's state [R, D]; committed keys fill its first `lengths` [R] places.

    head: the weights of `states`; final: (norm, lm_head); table [R, 7] says where keys and values lie;
    shape: (depths [R], least log-probability of a node to look below [R], top_k, alternatives);
    options: (scale, residual is normalised, the next g is normalised).
    Returns candidates (tokens [R, P], logp, parents in the pool or -1, levels, how many [R]), and of the expanded nodes
    the place in the pool [R, X], what was seen below, ids and log-probabilities [R, X, A], and how many [R].
    """
    (norm, lm_head), eps = final, head[1]
    depths, _, top_k, num_best = shape
    scale, before_residual, norm_output = options
    num_trees, most = state.shape[0], 1 + (depths.max() - 1) * top_k  # expanded nodes, the root the first
    integers = np.empty((3, num_trees, most * top_k), np.int64)
    logp, filled = np.empty((num_trees, most * top_k), np.float32), np.zeros(num_trees, np.int64)
    pool = integers[0], logp, integers[1], integers[2], filled
    places, alt_ids = np.empty((num_trees, most), np.int64), np.empty((num_trees, most, num_best), np.int64)
    alt_logp = np.empty((num_trees, most, num_best), np.float32)
    kept_states = np.empty((num_trees, most, state.shape[1]), np.float32)
    seen = np.zeros((num_trees, most, most), np.bool_)  # columns: nodes that have a row in the tree, all but the root
    expanded = np.zeros(num_trees, np.int64)
    nodes = places, alt_ids, alt_logp, kept_states, seen, expanded
    frontier, ups = np.empty((num_trees, top_k), np.int64), np.empty((num_trees, top_k), np.int64)
    widths, level = np.ones(num_trees, np.int64), 1
    while True:
        found = best_tokens(state, norm, eps, lm_head, num_best)
        _expand(state, found, widths, frontier, level, vocab_map, pool, nodes)
        _choose(widths, frontier, ups, level, shape, pool, expanded)
        if widths.sum() == 0:
            return *pool, places, alt_ids, alt_logp, expanded
        tokens, hidden, turns, mask = _rows(widths, frontier, ups, level, lengths, pool, nodes, table)
        hidden = unit_rows(hidden, norm, eps) if norm_output else hidden
        state = states(
            *(embeddings[tokens], hidden, head, cos[turns], sin[turns], table, mask),
            *((scale, before_residual), np.arange(tokens.shape[0])),
        )
        level += 1


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
