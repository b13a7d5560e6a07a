"""Attention of a few rows over KV caches as a compiled CPU kernel: projections, norms, rope, the rows' own mask.

| kernel       | reads                                          | writes                           |
|--------------|------------------------------------------------|----------------------------------|
| `attention`  | x [T, D], weights, table, mask [T, M]          | [T, D]; keys and values in place |
| `keep_rows`  | keys, values                                   | some of their rows, moved up     |

The rows of several requests go through the projections together, and each request's attend to its own keys and values.
The heads that share those take them together, a block of rows at a time, so that each is read once per block. Knows
nothing of models or trees. Letters as in `types.py`; R requests, H heads, d head size, S keys, Q queries (row by row,
and in a row head by head) of one key head.

A table of requests, int64 [R, 7], says which rows are whose and where their keys and values lie: its columns are
numbered below. Addresses instead of arrays, because a kernel would be compiled anew for every number of arrays.
"""

from __future__ import annotations

import numpy as np
from numba import njit, prange

from moespec.native.layers import FAST, F, dot, dot_products, exp, linear, mixes
from moespec.native.memory import floats_at

# Columns of a table: the request's first row of x and how many it has; where their keys and values go, and how many
# keys before that all of its rows see; the positions and the addresses of its keys and values, each [Hkv, capacity, d].
FIRST, NUM_ROWS, START, NUM_FREE, CAPACITY, KEYS, VALUES = range(7)
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
def _split(projected, norms, eps, cos, sin, queries, table):
    """Queries [Hkv, T group, d], and every request's keys and values, of projected rows [T, (...) d]."""
    num_kv, size = queries.shape[0], queries.shape[2]
    num_q = norms.shape[0] - num_kv
    group = num_q // num_kv
    for request in range(table.shape[0]):
        first, start = table[request, FIRST], table[request, START]
        shape = (num_kv, table[request, CAPACITY], size)
        keys, values = floats_at(table[request, KEYS], shape), floats_at(table[request, VALUES], shape)
        for number in range(table[request, NUM_ROWS]):
            row = first + number
            heads = projected[row].reshape(num_q + 2 * num_kv, size)
            for head in range(num_q):
                place = queries[head // group, row * group + head % group]
                _rotate(heads[head], norms[head], eps, cos[row], sin[row], place)
            for head in range(num_kv):
                place = keys[head, start + number]
                _rotate(heads[num_q + head], norms[num_q + head], eps, cos[row], sin[row], place)
                values[head, start + number] = heads[num_q + num_kv + head]


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
def _causal(table, num_rows):
    """`seen` where a row sees of its request's rows those before it and itself."""
    seen = np.zeros((num_rows, table[:, NUM_ROWS].max()), np.bool_)
    for request in range(table.shape[0]):
        for number in range(table[request, NUM_ROWS]):
            seen[table[request, FIRST] + number, : number + 1] = True
    return seen


@njit(**FAST)
def _blocks(table, size):
    """Up to `size` rows of one request at a time: (request, first row of its own) [N, 2]."""
    blocks = np.empty((((table[:, NUM_ROWS] + size - 1) // size).sum(), 2), np.int64)
    filled = 0
    for request in range(table.shape[0]):
        for first in range(0, table[request, NUM_ROWS], size):
            blocks[filled] = request, first
            filled += 1
    return blocks


@njit(**FAST)
def _attend_block(queries, places, head, first, last, is_causal, seen, scale, mixed):
    """A request's own rows `first` to `last` - 1 of one key head; places: its row of the table."""
    num_free, shape = places[NUM_FREE], (queries.shape[0], places[CAPACITY], queries.shape[2])
    num_keys = num_free + last if is_causal else places[START] + places[NUM_ROWS]
    keys, values = floats_at(places[KEYS], shape)[head, :num_keys], floats_at(places[VALUES], shape)[head, :num_keys]
    group, begin, end = queries.shape[1] // seen.shape[0], places[FIRST] + first, places[FIRST] + last
    own = queries[head, begin * group : end * group]
    _attend(own, keys, values, num_free, seen[begin:end], scale, mixed[head, begin * group : end * group])


@njit(parallel=True, **FAST)
def attention(x, qkv, norms, eps, out, cos, sin, table, seen, scale):
    """[T, D] of normalised rows x [T, D]; their keys and values go where the table [R, 7] says.

    Weights: qkv [(Hq + 2 Hkv) d, D], out [D, Hq d]; norms [Hq + Hkv, d] of queries and keys, or [Hq + Hkv, 0]. cos, sin
    [T, d]. Every row sees its request's free keys, and of those behind them what its row of `seen` [T, M] says; without
    columns, what lies before it and itself.
    """
    num_rows, size = x.shape[0], cos.shape[1]
    num_kv = qkv[1].shape[0] // size - norms.shape[0]
    group = norms.shape[0] // num_kv - 1
    queries = np.empty((num_kv, num_rows * group, size), np.float32)
    _split(linear(x, qkv), norms, eps, cos, sin, queries, table)
    mixed = np.empty_like(queries)
    is_causal = seen.shape[1] == 0
    if is_causal:
        seen = _causal(table, num_rows)
    rows_per_task = max(1, BLOCK // group)
    blocks = _blocks(table, rows_per_task)
    for task in prange(num_kv * blocks.shape[0]):
        head, number = task // blocks.shape[0], task % blocks.shape[0]
        request, first = blocks[number, 0], blocks[number, 1]
        last = min(table[request, NUM_ROWS], first + rows_per_task)
        _attend_block(queries, table[request], head, first, last, is_causal, seen, F(scale), mixed)
    return linear(_by_row(mixed, num_rows), out)


@njit(**FAST)
def keep_rows(keys, values, start, rows):
    """Of keys and values [Hkv, capacity, d] the given rows behind `start`, ascending, move up to it."""
    for stored in (keys, values):
        for head in range(stored.shape[0]):
            for place in range(rows.shape[0]):
                if rows[place] != place:
                    stored[head, start + place] = stored[head, start + rows[place]]
