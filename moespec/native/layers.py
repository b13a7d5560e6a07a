"""CPU kernels, compiled by numba when first called and kept on disk: products and norms.

On a small model a step through tensor operations is mostly the cost of calling them: these take few calls. Knows
nothing of models, trees or budgets: arrays in, arrays out, C order, fp32; a weight may be bf16, as its bits in uint16.
Letters as in `types.py`; O outputs.

| kernel       | reads                                          | writes                           |
|--------------|------------------------------------------------|----------------------------------|
| `linear`     | x [T, D], weight [O, D]                        | [T, O]                           |
| `products`   | the same, some rows of weight, on one thread   | their columns of y [T, O]        |
| `mixes`      | x [T, S], weight [S, O], on one thread         | y [T, O]                         |
| `unit_rows`  | x [T, D], weight [D]                           | [T, D], RMS-normalised           |

Each weight row is read once for all rows of x; threads split weight rows, and every sum has a fixed order, so the same
input gives the same bits.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit, prange, types
from numba.extending import overload

from moespec.native.tiles import DEPTH, LANES, dots_1, dots_2, dots_3, dots_4, mix_1, mix_2, mix_3, mix_4

F = np.float32
CHUNK = 32  # weight rows per task
ALONE = 150_000  # products that one thread has done before a second has begun

FAST: Any = {"fastmath": True, "cache": True}


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


def widen(value):
    """A weight in fp32: itself, or what the bits of a bf16 in uint16 stand for."""
    raise NotImplementedError("for kernels alone")


@overload(widen, inline="always")
def _widen(value):
    if value == types.uint16:
        return lambda value: np.uint32(np.uint32(value) << np.uint32(16)).view(np.float32)
    return lambda value: value


@njit(**FAST)
def dot(a, b):
    total = F(0)
    for i in range(a.shape[0]):
        total += a[i] * widen(b[i])
    return total


@njit(**FAST)
def products(x, weight, first, end, y):
    """y[:, first:end] = x weight[first:end]^T, for the rows [T, D] of x; y [T, O].

    Rows of weights are taken in pairs half the matrix apart: the processor fetches ahead of two streams that are in
    different pages; neighbours come from memory a third slower.
    """
    num_rows, depth = x.shape
    if depth % DEPTH:
        for o in range(first, end):
            for row in range(num_rows):
                y[row, o] = dot(x[row], weight[o])
        return
    half = (end - first + 1) // 2
    for o in range(first, first + half):
        columns = (o, min(half, end - 1 - o))  # of an odd number one pair is met again, or is one row twice
        row = 0
        while row + 4 <= num_rows:
            dots_4(x, row, weight, y, columns)
            row += 4
        if num_rows - row == 3:
            dots_3(x, row, weight, y, columns)
        elif num_rows - row == 2:
            dots_2(x, row, weight, y, columns)
        elif num_rows - row == 1:
            dots_1(x, row, weight, y, columns)


@njit(**FAST)
def mixes(x, weight, y):
    """y [T, O] = x [T, S] weight [S, O]."""
    (num_rows, num_inner), num_out = x.shape, y.shape[1]
    width = 2 * LANES
    if num_out < width:
        y[:] = F(0)
        for row in range(num_rows):
            for s in range(num_inner):
                for o in range(num_out):
                    y[row, o] += x[row, s] * weight[s, o]
        return
    for first in range(0, num_out, width):
        columns = (min(first, num_out - width),)  # the last tile may repeat some of the one before
        row = 0
        while row + 4 <= num_rows:
            mix_4(x, row, weight, y, columns)
            row += 4
        if num_rows - row == 3:
            mix_3(x, row, weight, y, columns)
        elif num_rows - row == 2:
            mix_2(x, row, weight, y, columns)
        elif num_rows - row == 1:
            mix_1(x, row, weight, y, columns)


@njit(parallel=True, **FAST)
def linear(x, weight):
    """y [T, O] = x [T, D] weight^T [D, O]."""
    num_out = weight.shape[0]
    y = np.empty((x.shape[0], num_out), np.float32)
    if x.size * num_out < ALONE:
        products(x, weight, 0, num_out, y)
        return y
    for chunk in prange((num_out + CHUNK - 1) // CHUNK):
        products(x, weight, chunk * CHUNK, min(num_out, (chunk + 1) * CHUNK), y)
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
