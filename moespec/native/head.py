"""One EAGLE-3 head pass as compiled CPU kernels: the formula of `drafters/head.py` (EAGLE-3, section 2.2 there).

Rows of several conversations go through together. Knows nothing of trees or vocabularies' maps. Letters: R
conversations, N rows, D width, I MLP width, V draft vocabulary, A alternatives.
"""

from __future__ import annotations

import numpy as np
from numba import njit, prange

from moespec.native.attention import FIRST, NUM_ROWS, attention
from moespec.native.layers import FAST, F, exp, gated, linear, unit_rows


@njit(**FAST)
def states(embeds, hidden, weights, cos, sin, table, seen, options, kept):
    """h_out [R, D] of the `kept` rows of (embedding of the next token, g) [N, D]; all rows' keys and values are stored.

    weights: (norms [3, D] of the embedding, of g and before the MLP, eps, qkv, heads [Hq + Hkv, 0] counts them, out,
    gate_up [2 I, D], down); table and `seen` as in `attention`; options (scale, whether the residual is the normalised
    g).
    """
    norms, eps, qkv, heads, out, gate_up, down = weights
    normed = unit_rows(hidden, norms[1], eps)
    joined = np.concatenate((unit_rows(embeds, norms[0], eps), normed), axis=1)
    scale, before_residual = options
    residual = attention(joined, qkv, heads, eps, out, cos, sin, table, seen, scale)
    residual += normed if before_residual else hidden
    residual = residual[kept]
    gates = linear(unit_rows(residual, norms[2], eps), gate_up)
    return residual + linear(gated(gates), down)


@njit(**FAST)
def extend(features, tokens, positions, fc, weights, embeddings, cos, sin, table, options):
    """The states [R, D] after the last of each conversation's committed pairs, together N: (features [N, F], token
    behind them [N]), in their own conversation's positions [N]."""
    causal, last = np.empty((1, 0), np.bool_), table[:, FIRST] + table[:, NUM_ROWS] - 1
    hidden = linear(features, fc)
    return states(embeddings[tokens], hidden, weights, cos[positions], sin[positions], table, causal, options, last)


@njit(**FAST)
def best_tokens(states, norm, eps, lm_head, num_best):
    """The likeliest tokens after each state [N, D]; see `best_of`."""
    return best_of(linear(unit_rows(states, norm, eps), lm_head), num_best)


@njit(**FAST)
def _best_of_row(logits, ids, logp):
    num_best, found = ids.shape[0], 0
    for token in range(logits.shape[0]):
        value = logits[token]
        if found == num_best and value <= logp[found - 1]:
            continue
        place = min(found, num_best - 1)
        while place > 0 and logp[place - 1] < value:
            logp[place], ids[place] = logp[place - 1], ids[place - 1]
            place -= 1
        logp[place], ids[place] = value, token
        found = min(found + 1, num_best)
    best, total = logp[0], F(0)
    for token in range(logits.shape[0]):
        total += exp(max(logits[token] - best, F(-87)))
    for place in range(num_best):
        logp[place] -= best + np.log(total)


@njit(parallel=True, **FAST)
def best_of(logits, num_best):
    """The likeliest tokens of each row, best first, ties to the lower id: (ids, log-probabilities) [N, A]."""
    num_rows = logits.shape[0]
    ids = np.empty((num_rows, num_best), np.int64)
    logp = np.empty((num_rows, num_best), np.float32)
    for row in prange(num_rows):
        _best_of_row(logits[row], ids[row], logp[row])
    return ids, logp


@njit(**FAST)
def opinions(logits, parents, tokens, num_best):
    """`best_of` the logits [T, V] of a tree's rows, and each row's own log-probability [T] below its parent.

    1 for a row that is none: its parent does not stand before it, or its token has no logit.
    """
    ids, logp = best_of(logits, num_best)
    node_logp = np.zeros(logits.shape[0], np.float32)
    for row in range(1, logits.shape[0]):
        up, token = parents[row], tokens[row]
        if 0 <= up < row and 0 <= token < logits.shape[1]:
            node_logp[row] = logp[up, 0] + logits[up, token] - logits[up, ids[up, 0]]
        else:
            node_logp[row] = F(1)
    return ids, logp, node_logp
