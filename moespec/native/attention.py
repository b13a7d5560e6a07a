"""Attention of a few rows over a KV cache as a compiled CPU kernel: projections, norms, rope, the rows' own mask.

| kernel       | reads                                          | writes                           |
|--------------|------------------------------------------------|----------------------------------|
| `attention`  | x [T, D], weights, mask [T, M]                 | [T, D]; keys and values in place |
| `keep_rows`  | keys, values                                   | some of their rows, moved up     |

The heads that share keys and values take them together, a block of rows at a time, so that each key and value is read
once per block. Knows nothing of models or trees. Letters as in `types.py`; H heads, d head size, S keys, Q queries (row
by row, and in a row head by head) of one key head.
"""

from __future__ import annotations

import numpy as np
from numba import njit, prange

from moespec.native.layers import FAST, F, dot, dot_products, exp, linear, mixes

BLOCK = 4  # queries per task, or those of one row where they are more
LEAST = F(-1e30)  # instead of an infinity, which fast arithmetic may assume away


@njit(inline="always", **FAST)
def _rotate(head, weight, eps, cos, sin, out):
    """One head's vector: RMS-normalised where it has a weight, then turned by its position."""
    size = head.shape[0]
    scale = F(1)
    if weight.shape[0]:
        scale = F(1) / np.sqrt(dot(head, head) / F(size) + F(eps))
    half = size // 2
    for i in range(half):
        a = head[i] * scale
        b = head[i + half] * scale
        if weight.shape[0]:
            a *= weight[i]
            b *= weight[i + half]
        out[i] = a * cos[i] - b * sin[i]
        out[i + half] = b * cos[i + half] + a * sin[i + half]


@njit(**FAST)
def _shares(scores, scale):
    """Softmax of scale * scores, in place."""
    best = LEAST
    for s in range(scores.shape[0]):
        best = max(best, scores[s])
    total = F(0)
    for s in range(scores.shape[0]):
        scores[s] = exp(max((scores[s] - best) * scale, F(-87)))
        total += scores[s]
    for s in range(scores.shape[0]):
        scores[s] /= total


@njit(**FAST)
def _attend(queries, keys, values, num_free, seen, scale, out):
    """out [Q, d] over the first `num_free` of keys [S, d] and those of the rest that a query's row of `seen` shows."""
    num_keys = keys.shape[0]
    group = queries.shape[0] // seen.shape[0]
    scores = np.empty((queries.shape[0], num_keys), np.float32)
    dot_products(queries, keys, scores)
    for j in range(queries.shape[0]):
        for s in range(num_free, num_keys):
            if not seen[j // group, s - num_free]:
                scores[j, s] = LEAST
        _shares(scores[j], scale)
    mixes(scores, values, out)


# Copies of parts of arrays are kept out of `attention`: inside a parallel kernel each would be a parallel region.
@njit(**FAST)
def _split(projected, norms, eps, cos, sin, queries, keys, values, start):
    """Queries [Hkv, T group, d], keys and values [Hkv, capacity, d] from `start` on, of projected rows [T, (...) d]."""
    num_kv, size = keys.shape[0], cos.shape[1]
    num_q = norms.shape[0] - num_kv
    group = num_q // num_kv
    for row in range(projected.shape[0]):
        heads = projected[row].reshape(num_q + 2 * num_kv, size)
        for head in range(num_q):
            place = queries[head // group, row * group + head % group]
            _rotate(heads[head], norms[head], eps, cos[row], sin[row], place)
        for head in range(num_kv):
            place = keys[head, start + row]
            _rotate(heads[num_q + head], norms[num_q + head], eps, cos[row], sin[row], place)
            values[head, start + row] = heads[num_q + num_kv + head]


@njit(**FAST)
def _by_row(mixed, num_rows):
    """[T, Hq d] of mixed [Hkv, T group, d]."""
    num_kv, size = mixed.shape[0], mixed.shape[2]
    group = mixed.shape[1] // num_rows
    rows = np.empty((num_rows, num_kv, group, size), np.float32)
    for row in range(num_rows):
        for head in range(num_kv):
            rows[row, head] = mixed[head, row * group : (row + 1) * group]
    return rows.reshape(num_rows, num_kv * group * size)


@njit(**FAST)
def _causal(num_rows):
    seen = np.zeros((num_rows, num_rows), np.bool_)
    for row in range(num_rows):
        seen[row, : row + 1] = True
    return seen


@njit(parallel=True, **FAST)
def attention(x, qkv, norms, eps, out, cos, sin, keys, values, start, num_free, seen, scale):
    """[T, D] of normalised rows x [T, D]; their keys and values go to positions `start` on.

    Weights: qkv [(Hq + 2 Hkv) d, D], out [D, Hq d]; norms [Hq + Hkv, d] of queries and keys, or [Hq + Hkv, 0]. cos, sin
    [T, d]; keys, values [Hkv, capacity, d]. Every row sees the first `num_free` keys, and of those behind them what its
    row of `seen` [T, M] says; without columns, what lies before it and itself.
    """
    num_rows, size, num_kv = x.shape[0], cos.shape[1], keys.shape[0]
    group = norms.shape[0] // num_kv - 1
    queries = np.empty((num_kv, num_rows * group, size), np.float32)
    _split(linear(x, qkv), norms, eps, cos, sin, queries, keys, values, start)
    mixed = np.empty_like(queries)
    is_causal = seen.shape[1] == 0
    if is_causal:
        seen, num_free = _causal(num_rows), start
    rows_per_task = max(1, BLOCK // group)
    num_blocks = (num_rows + rows_per_task - 1) // rows_per_task
    for task in prange(num_kv * num_blocks):
        head, first = task // num_blocks, task % num_blocks * rows_per_task
        last = min(num_rows, first + rows_per_task)
        num_keys = num_free + (last if is_causal else seen.shape[1])
        _attend(
            queries[head, first * group : last * group], keys[head, :num_keys], values[head, :num_keys],
            num_free, seen[first:last], F(scale), mixed[head, first * group : last * group],
        )  # fmt: skip
    return linear(_by_row(mixed, num_rows), out)


@njit(**FAST)
def keep_rows(keys, values, start, rows):
    """Of keys and values [Hkv, capacity, d] the given rows behind `start`, ascending, move up to it."""
    for stored in (keys, values):
        for head in range(stored.shape[0]):
            for place in range(rows.shape[0]):
                if rows[place] != place:
                    stored[head, start + place] = stored[head, start + rows[place]]
