"""The experts of one MoE layer as a compiled CPU kernel, expert-major.

| kernel    | reads                                                               | writes |
|-----------|---------------------------------------------------------------------|--------|
| `experts` | x [T, D], ids, weights [T, K], gate_up [E, 2 I, D], down [E, D, I]  | [T, D] |

An expert with no surviving (row, slot) is not touched; the others' weights come from memory once for all their rows.
Knows nothing of routers or budgets: a weight of 0 is all that it sees of them.
"""

from __future__ import annotations

import numpy as np
from numba import njit, prange

from moespec.native.layers import FAST, products, silu, two_by_four, two_by_one, two_by_two


@njit(**FAST)
def _by_expert(ids, weights, num_experts):
    """Surviving (row, slot) pairs by expert: first pair of each expert [E + 1], their rows [N], places [T, K]."""
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
    return starts, rows, places


@njit(**FAST)
def _gate_up(x, rows, first, last, weight, hidden):
    """hidden[pair] = silu(gate) up for the pairs of one expert. weight [2 I, D], gates before ups."""
    width = hidden.shape[1]
    for o in range(width):
        gate, up = weight[o], weight[width + o]
        pair = first
        while pair + 4 <= last:
            sums = two_by_four(x, rows[pair], rows[pair + 1], rows[pair + 2], rows[pair + 3], gate, up)
            for j in range(4):
                hidden[pair + j, o] = silu(sums[j]) * sums[4 + j]
            pair += 4
        if pair + 2 <= last:
            g0, g1, u0, u1 = two_by_two(x, rows[pair], rows[pair + 1], gate, up)
            hidden[pair, o], hidden[pair + 1, o] = silu(g0) * u0, silu(g1) * u1
            pair += 2
        if pair < last:
            g0, u0 = two_by_one(x, rows[pair], gate, up)
            hidden[pair, o] = silu(g0) * u0


@njit(parallel=True, **FAST)
def experts(x, ids, weights, gate_up, down):
    """out_t = sum_k weights[t, k] FFN_{ids[t, k]}(x_t), [T, D]; a pair of weight 0 reads nothing.

    gate_up [E, 2 I, D], down [E, D, I]: each expert's weights come from memory once for all its rows.
    """
    num_experts = gate_up.shape[0]
    starts, rows, places = _by_expert(ids, weights, num_experts)
    active = np.nonzero(starts[1:] - starts[:-1])[0]
    hidden = np.empty((rows.shape[0], down.shape[2]), np.float32)
    outputs = np.empty((rows.shape[0], x.shape[1]), np.float32)
    for number in prange(active.shape[0]):
        expert = active[number]
        first, last = starts[expert], starts[expert + 1]
        _gate_up(x, rows, first, last, gate_up[expert], hidden)
        products(hidden[first:last], down[expert], 0, down.shape[1], outputs[first:last])
    total = np.zeros_like(x)
    for row in range(x.shape[0]):
        for slot in range(ids.shape[1]):
            place = places[row, slot]
            if place >= 0:
                for i in range(x.shape[1]):
                    total[row, i] += weights[row, slot] * outputs[place, i]
    return total
