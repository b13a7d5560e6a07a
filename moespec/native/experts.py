"""The experts of one MoE layer as a compiled CPU kernel, expert-major.

| kernel    | reads                                                                          | writes |
|-----------|--------------------------------------------------------------------------------|--------|
| `experts` | x [T, D], ids, weights [T, K], panels of gate_up [E, 2 I, D], down [E, D, I]   | [T, D] |

An expert with no surviving (row, slot) is not touched; the others' weights come from memory once for all their rows.
Knows nothing of routers or budgets: a weight of 0 is all that it sees of them.
"""

from __future__ import annotations

import numpy as np
from numba import njit, prange

from moespec.native.layers import FAST, gated, products


@njit(**FAST)
def _by_expert(ids, weights, num_experts):
    """Surviving (row, slot) pairs by expert: experts that have any [A], first pair of each [E + 1], rows of the pairs
    [N], and each pair's place [T, K]."""
    starts = np.zeros(num_experts + 1, np.int64)
    num_rows, top_k = ids.shape
    for row in range(num_rows):
        for slot in range(top_k):
            if weights[row, slot] != 0:
                starts[ids[row, slot] + 1] += 1
    for expert in range(num_experts):
        starts[expert + 1] += starts[expert]
    rows = np.empty(starts[num_experts], np.int64)
    places = np.full((num_rows, top_k), -1)
    filled = starts.copy()
    for row in range(num_rows):
        for slot in range(top_k):
            if weights[row, slot] != 0:
                expert = ids[row, slot]
                rows[filled[expert]] = row
                places[row, slot] = filled[expert]
                filled[expert] += 1
    return np.nonzero(starts[1:] - starts[:-1])[0], starts, rows, places


@njit(**FAST)
def _feed_forward(x, rows, gate_up, down, out):
    """out [N, D]: the FFN of one expert on these rows of x [T, D]. Panels of gate_up [2 I, D], gates before ups."""
    num_rows, width = rows.shape[0], down.shape[1]
    own = np.empty((num_rows, x.shape[1]), np.float32)
    gates = np.empty((num_rows, 2 * width), np.float32)
    for n in range(num_rows):
        own[n] = x[rows[n]]
    products(own, gate_up, 0, gate_up.shape[0], gates)
    products(gated(gates), down, 0, down.shape[0], out)


@njit(parallel=True, **FAST)
def experts(x, ids, weights, gate_up, down):
    """out_t = sum_k weights[t, k] FFN_{ids[t, k]}(x_t), [T, D]; a pair of weight 0 reads nothing.

    Panels of gate_up [E, 2 I, D] and down [E, D, I]: each expert's come from memory once for all its rows.
    """
    active, starts, rows, places = _by_expert(ids, weights, gate_up.shape[0])
    outputs = np.empty((rows.shape[0], x.shape[1]), np.float32)
    for number in prange(active.shape[0]):
        expert = active[number]
        first, last = starts[expert], starts[expert + 1]
        _feed_forward(x, rows[first:last], gate_up[expert], down[expert], outputs[first:last])
    total = np.zeros_like(x)
    for row in range(x.shape[0]):
        for slot in range(ids.shape[1]):
            place = places[row, slot]
            if place >= 0:
                for i in range(x.shape[1]):
                    total[row, i] += weights[row, slot] * outputs[place, i]
    return total
