"""CPU kernels, compiled by numba when first called and kept on disk: products and norms.

On a small model a step through tensor operations is mostly the cost of calling them: these take few calls. Knows
nothing of models, trees or budgets: arrays in, arrays out, C order, fp32; a weight may be bf16, as its bits in uint16.
Letters as in `types.py`; O outputs.

| kernel       | reads                                          | writes                           |
|--------------|------------------------------------------------|----------------------------------|
| `linear`     | x [T, D], weight [O, D]                        | [T, O]                           |
| `unit_rows`  | x [T, D], weight [D]                           | [T, D], RMS-normalised           |

Each weight row is read once for all rows of x, four at a time; threads split weight rows, and every sum has a fixed
order, so the same input gives the same bits.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit, prange, types
from numba.extending import overload

F = np.float32
CHUNK = 32  # weight rows per task

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
def two_by_one(x, row, w0, w1):
    """(x[row] . w0, x[row] . w1)"""
    x0 = x[row]
    a = F(0)
    b = F(0)
    for i in range(w0.shape[0]):
        a += widen(w0[i]) * x0[i]
        b += widen(w1[i]) * x0[i]
    return a, b


@njit(**FAST)
def two_by_two(x, r0, r1, w0, w1):
    """The products of two rows of x with two weight rows."""
    x0, x1 = x[r0], x[r1]
    a0 = a1 = b0 = b1 = F(0)
    for i in range(w0.shape[0]):
        u = widen(w0[i])
        v = widen(w1[i])
        a0 += u * x0[i]
        a1 += u * x1[i]
        b0 += v * x0[i]
        b1 += v * x1[i]
    return a0, a1, b0, b1


@njit(**FAST)
def two_by_four(x, r0, r1, r2, r3, w0, w1):
    """The products of four rows of x with two weight rows: eight sums that stay in registers."""
    x0, x1, x2, x3 = x[r0], x[r1], x[r2], x[r3]
    a0 = a1 = a2 = a3 = F(0)
    b0 = b1 = b2 = b3 = F(0)
    for i in range(w0.shape[0]):
        u = widen(w0[i])
        v = widen(w1[i])
        a0 += u * x0[i]
        a1 += u * x1[i]
        a2 += u * x2[i]
        a3 += u * x3[i]
        b0 += v * x0[i]
        b1 += v * x1[i]
        b2 += v * x2[i]
        b3 += v * x3[i]
    return a0, a1, a2, a3, b0, b1, b2, b3


@njit(**FAST)
def products(x, weight, first, end, y):
    """y[:, first:end] = x weight[first:end]^T, for the rows [T, D] of x; y [T, O]."""
    num_rows = x.shape[0]
    for o in range(first, end - 1, 2):
        w0, w1 = weight[o], weight[o + 1]
        row = 0
        while row + 4 <= num_rows:
            sums = two_by_four(x, row, row + 1, row + 2, row + 3, w0, w1)
            for j in range(4):
                y[row + j, o] = sums[j]
                y[row + j, o + 1] = sums[4 + j]
            row += 4
        if row + 2 <= num_rows:
            y[row, o], y[row + 1, o], y[row, o + 1], y[row + 1, o + 1] = two_by_two(x, row, row + 1, w0, w1)
            row += 2
        if row < num_rows:
            y[row, o], y[row, o + 1] = two_by_one(x, row, w0, w1)
    if (end - first) % 2:
        for row in range(num_rows):
            y[row, end - 1] = dot(x[row], weight[end - 1])


@njit(parallel=True, **FAST)
def linear(x, weight):
    """y [T, O] = x [T, D] weight^T [D, O]."""
    num_out = weight.shape[0]
    y = np.empty((x.shape[0], num_out), np.float32)
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
