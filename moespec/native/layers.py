"""CPU kernels, compiled by numba when first called and kept on disk: products and norms.

On a small model a step through tensor operations is mostly the cost of calling them: these take few calls. Knows
nothing of models, trees or budgets: arrays in, arrays out, C order, fp32. Letters as in `types.py`; O outputs.

| kernel       | reads                                              | writes                           |
|--------------|----------------------------------------------------|----------------------------------|
| `linear`     | x [T, D], weight (panels [P, D, 16], scales [O])   | [T, O]                           |
| `products`   | x [T, D], some of a weight's panels, on one thread | their columns of y [T, O]        |
| `dot_products` | x [T, D], keys [O, D], on one thread               | y [T, O]                         |
| `mixes`      | x [T, S], values [S, O], on one thread             | y [T, O]                         |
| `unit_rows`  | x [T, D], weight [D]                               | [T, D], RMS-normalised           |

A weight [O, D] is kept in panels (`native/weights.py`): 16 of its rows side by side. A product reads it from beginning
to end, which memory is fastest at, and adds up 16 outputs without ever folding a vector. Panels are read once for all
rows of x and may be int8; threads split them, and every sum has a fixed order, so the same input gives the same bits.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit, prange

from moespec.native.tiles import DEPTH, LANES, dots_1, dots_2, dots_3, dots_4, mix_1, mix_2, mix_3, mix_4
from moespec.native.weights import PANEL

assert PANEL == 2 * LANES, "a tile writes two vectors"
F = np.float32
CHUNK = 2  # panels per task
ALONE = 150_000  # products that one thread has done before a second has begun

# A division by zero gives what fp32 gives, and raises nothing.
FAST: Any = {"fastmath": True, "cache": True, "error_model": "numpy"}


@njit(inline="always", **FAST)
def exp(x):
    """e^x for x in [-87, 88], vectorised by the compiler where `np.exp` is a call: 2^n times a polynomial."""
    t = x * F(1.44269504088896341)
    n = np.floor(t + F(0.5))
    r = (t - n) * F(0.69314718055994531)
    p = F(1) + r * (F(1) + r * (F(0.5) + r * (F(1 / 6) + r * (F(1 / 24) + r * (F(1 / 120) + r * F(1 / 720))))))
    return p * np.int32((np.int32(n) + np.int32(127)) << np.int32(23)).view(np.float32)


@njit(inline="always", **FAST)
def silu(x):
    return x / (F(1) + exp(min(max(-x, F(-87)), F(87))))


@njit(**FAST)
def gated(gates):
    """silu(gate) * up [T, I] of [T, 2 I], gates before ups."""
    num_rows, width = gates.shape[0], gates.shape[1] // 2
    hidden = np.empty((num_rows, width), np.float32)
    for row in range(num_rows):
        for i in range(width):
            hidden[row, i] = silu(gates[row, i]) * gates[row, width + i]
    return hidden


@njit(**FAST)
def dot(a, b):
    total = F(0)
    for i in range(a.shape[0]):
        total += a[i] * b[i]
    return total


@njit(**FAST)
def dot_products(x, keys, y):
    """y [T, O] = x [T, D] keys^T [D, O].

    Keys are taken in pairs half of them apart: the processor fetches ahead of two streams that are in different pages;
    neighbours come from memory a third slower.
    """
    (num_rows, depth), num_keys = x.shape, keys.shape[0]
    if depth % DEPTH:
        for o in range(num_keys):
            for row in range(num_rows):
                y[row, o] = dot(x[row], keys[o])
        return
    half = (num_keys + 1) // 2
    for o in range(half):
        columns = (o, min(half, num_keys - 1 - o))  # of an odd number one pair is met again, or is one key twice
        row = 0
        while row + 4 <= num_rows:
            dots_4(x, row, keys, y, columns)
            row += 4
        if num_rows - row == 3:
            dots_3(x, row, keys, y, columns)
        elif num_rows - row == 2:
            dots_2(x, row, keys, y, columns)
        elif num_rows - row == 1:
            dots_1(x, row, keys, y, columns)


@njit(**FAST)
def _mix_rows(x, weight, y, columns):
    """y[:, o : o + 16] = x weight[:, i : i + 16] for columns (i, o)."""
    num_rows, row = x.shape[0], 0
    while row + 4 <= num_rows:
        mix_4(x, row, weight, y, columns)
        row += 4
    if num_rows - row == 3:
        mix_3(x, row, weight, y, columns)
    elif num_rows - row == 2:
        mix_2(x, row, weight, y, columns)
    elif num_rows - row == 1:
        mix_1(x, row, weight, y, columns)


@njit(**FAST)
def mixes(x, values, y):
    """y [T, O] = x [T, S] values [S, O]."""
    num_out = y.shape[1]
    if num_out < PANEL:
        y[:] = F(0)
        for row in range(x.shape[0]):
            for s in range(x.shape[1]):
                for o in range(num_out):
                    y[row, o] += x[row, s] * values[s, o]
        return
    for first in range(0, num_out, PANEL):
        column = min(first, num_out - PANEL)  # the last tile may repeat some of the one before
        _mix_rows(x, values, y, (column, column))


@njit(**FAST)
def products(x, panels, first, end, y):
    """The columns of y [T, O] = x [T, D] weight^T [D, O] that panels first to end - 1 of the weight make."""
    num_out = y.shape[1]
    for number in range(first, end):
        o = number * PANEL
        if o + PANEL <= num_out:
            _mix_rows(x, panels[number], y, (0, o))
        else:
            part = np.empty((x.shape[0], PANEL), np.float32)
            _mix_rows(x, panels[number], part, (0, 0))
            y[:, o:] = part[:, : num_out - o]


@njit(**FAST)
def _scaled_products(x, weight, first, end, y):
    panels, scales = weight
    products(x, panels, first, end, y)
    for row in range(y.shape[0]):
        for o in range(first * PANEL, min(end * PANEL, y.shape[1])):
            y[row, o] *= scales[o]


@njit(parallel=True, **FAST)
def linear(x, weight):
    """y [T, O] = x [T, D] weight^T [D, O]; weight: (panels, the factor of each output)."""
    num_panels, num_out = weight[0].shape[0], weight[1].shape[0]
    y = np.empty((x.shape[0], num_out), np.float32)
    if x.size * num_out < ALONE:
        _scaled_products(x, weight, 0, num_panels, y)
        return y
    for chunk in prange((num_panels + CHUNK - 1) // CHUNK):
        _scaled_products(x, weight, chunk * CHUNK, min(num_panels, (chunk + 1) * CHUNK), y)
    return y


@njit(**FAST)
def unit_rows(x, weight, eps):
    """x / sqrt(mean x^2 + eps) * weight, row by row. [T, D]"""
    y = np.empty_like(x)
    size = x.shape[1]
    for row in range(x.shape[0]):
        scale = F(1) / np.sqrt(dot(x[row], x[row]) / F(size) + F(eps))
        for i in range(size):
            y[row, i] = x[row, i] * scale * weight[i]
    return y
