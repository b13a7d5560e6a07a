"""CPU kernels, compiled by numba when first called and kept on disk: products, norms, attention.

On a small model a step through tensor operations is mostly the cost of calling them: these take few calls. Knows
nothing of models, trees or budgets: arrays in, arrays out, fp32, C order. Letters as in `types.py`; H heads, d head
size, I expert width, O outputs, S keys.

| kernel       | reads                                          | writes                           |
|--------------|------------------------------------------------|----------------------------------|
| `linear`     | x [T, D], weight [O, D]                        | [T, O]                           |
| `unit_rows`  | x [T, D], weight [D]                           | [T, D], RMS-normalised           |
| `attention`  | x [T, D], weights, mask [T, T]                 | [T, D]; keys and values in place |

Each weight row is read once for all rows of x, four at a time; threads split weight rows, heads or experts, and every
sum has a fixed order, so the same input gives the same bits.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit, prange

F = np.float32
CHUNK = 32  # weight rows per task
LEAST = F(-1e30)  # instead of an infinity, which fast arithmetic may assume away

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


@njit(**FAST)
def _dot(a, b):
    total = F(0)
    for i in range(a.shape[0]):
        total += a[i] * b[i]
    return total


@njit(**FAST)
def two_rows(x, row, w0, w1):
    """(x[row] . w0, x[row] . w1)"""
    x0 = x[row]
    a = F(0)
    b = F(0)
    for i in range(w0.shape[0]):
        a += w0[i] * x0[i]
        b += w1[i] * x0[i]
    return a, b


@njit(**FAST)
def two_by_four(x, r0, r1, r2, r3, w0, w1):
    """The products of four rows of x with two weight rows: eight sums that stay in registers."""
    x0, x1, x2, x3 = x[r0], x[r1], x[r2], x[r3]
    a0 = a1 = a2 = a3 = F(0)
    b0 = b1 = b2 = b3 = F(0)
    for i in range(w0.shape[0]):
        u = w0[i]
        v = w1[i]
        a0 += u * x0[i]
        a1 += u * x1[i]
        a2 += u * x2[i]
        a3 += u * x3[i]
        b0 += v * x0[i]
        b1 += v * x1[i]
        b2 += v * x2[i]
        b3 += v * x3[i]
    return a0, a1, a2, a3, b0, b1, b2, b3


@njit(parallel=True, **FAST)
def linear(x, weight):
    """y [T, O] = x [T, D] weight^T [D, O]."""
    num_rows, num_out = x.shape[0], weight.shape[0]
    y = np.empty((num_rows, num_out), np.float32)
    for chunk in prange((num_out + CHUNK - 1) // CHUNK):
        end = min(num_out, (chunk + 1) * CHUNK)
        for o in range(chunk * CHUNK, end - 1, 2):
            w0, w1 = weight[o], weight[o + 1]
            row = 0
            while row + 4 <= num_rows:
                sums = two_by_four(x, row, row + 1, row + 2, row + 3, w0, w1)
                for j in range(4):
                    y[row + j, o] = sums[j]
                    y[row + j, o + 1] = sums[4 + j]
                row += 4
            while row < num_rows:
                y[row, o], y[row, o + 1] = two_rows(x, row, w0, w1)
                row += 1
        if (end - chunk * CHUNK) % 2:
            for row in range(num_rows):
                y[row, end - 1] = _dot(x[row], weight[end - 1])
    return y


@njit(**FAST)
def unit_rows(x, weight, eps):
    """x / sqrt(mean x^2 + eps) * weight, row by row. [T, D]"""
    y = np.empty_like(x)
    size = x.shape[1]
    for row in range(x.shape[0]):
        scale = F(1) / np.sqrt(_dot(x[row], x[row]) / F(size) + F(eps))
        for i in range(size):
            y[row, i] = x[row, i] * scale * weight[i]
    return y


@njit(inline="always", **FAST)
def _rotate(head, weight, eps, cos, sin, out):
    """One head's vector: RMS-normalised where it has a weight, then turned by its position."""
    size = head.shape[0]
    scale = F(1)
    if weight.shape[0]:
        scale = F(1) / np.sqrt(_dot(head, head) / F(size) + F(eps))
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
def _attend_row(query, keys, values, num_free, seen, scale, out):
    """out [d] = softmax(query keys^T) values over the first `num_free` keys and those of the rest that are `seen`."""
    num_keys = num_free + seen.shape[0]
    shares = np.empty(num_keys, np.float32)
    best = LEAST
    for s in range(num_keys):
        shares[s] = _dot(query, keys[s]) * scale
        if s >= num_free and not seen[s - num_free]:
            shares[s] = LEAST
        best = max(best, shares[s])
    total = F(0)
    for s in range(num_keys):
        shares[s] = exp(max(shares[s] - best, F(-87)))
        total += shares[s]
    out[:] = F(0)
    for s in range(num_keys):
        share = shares[s] / total
        for i in range(out.shape[0]):
            out[i] += share * values[s, i]


@njit(parallel=True, **FAST)
def attention(x, qkv, norms, eps, out, cos, sin, keys, values, start, num_free, seen, scale):
    """[T, D] of normalised rows x [T, D]; their keys and values go to positions `start` on.

    qkv [(Hq + 2 Hkv) d, D]; norms [Hq + Hkv, d] of queries and keys, or [Hq + Hkv, 0]; out [D, Hq d]; cos, sin [T, d];
    keys, values [Hkv, capacity, d]. Every row sees the first `num_free` keys, and of those behind them what its row of
    `seen` [T, M] says; without columns, what lies before it and itself.
    """
    num_rows, size, num_kv = x.shape[0], cos.shape[1], keys.shape[0]
    num_q = norms.shape[0] - num_kv
    projected = linear(x, qkv)
    queries = np.empty((num_rows, num_q, size), np.float32)
    for row in range(num_rows):
        heads = projected[row].reshape(num_q + 2 * num_kv, size)
        for head in range(num_q):
            _rotate(heads[head], norms[head], eps, cos[row], sin[row], queries[row, head])
        for head in range(num_kv):
            place = keys[head, start + row]
            _rotate(heads[num_q + head], norms[num_q + head], eps, cos[row], sin[row], place)
            values[head, start + row] = heads[num_q + num_kv + head]
    attended = np.empty((num_rows, num_q * size), np.float32)
    nothing = np.empty(0, np.bool_)
    for task in prange(num_rows * num_q):
        row, head = task // num_q, task % num_q
        group = head // (num_q // num_kv)
        is_causal = seen.shape[1] == 0
        free = start + row + 1 if is_causal else num_free
        place = attended[row, head * size : (head + 1) * size]
        rest = nothing if is_causal else seen[row]
        _attend_row(queries[row, head], keys[group], values[group], free, rest, F(scale), place)
    return linear(attended, out)
