"""What a layer's attention needs of its projections, in one launch: norms, rotation, keys and values stored.

| array          | shape                  | role                                                                       |
|----------------|------------------------|----------------------------------------------------------------------------|
| qkv            | [T, (Hq + 2 Hkv) d]    | a row's queries, keys and values, head by head                             |
| cos, sin       | [T, d]                 | of the rows' positions, halves repeated (the Llama convention)             |
| norms          | [d] or [H d] each      | weights of RMS norms over a head of d, or over all heads of a kind         |
| rows           | [T]                    | int64: where in the cache each row's key and value go                      |
| queries        | [Hq, T, d]             | written: normalised and rotated                                            |
| keys, values   | [Hkv, capacity, d]     | written at `rows` alone: keys normalised and rotated, values as they are   |

Grid (T, blocks of heads). Everything is computed in fp32 and rounded once, where stock modules round at every step.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.checks import check_device, check_float

HEADS_PER_PROGRAM = 16


@dataclass(frozen=True)
class HeadNorms:
    """RMS norms of queries and keys: weights [d] (of each head) or [H * d] (of all heads together), both alike."""

    query: Tensor
    key: Tensor
    eps: float


@triton.jit
def load_halves(pointer_HF, mask_HF, HALF: tl.constexpr):
    """Both halves of heads, in fp32; 0 where nothing is to be read."""
    first_HF = tl.load(pointer_HF, mask=mask_HF, other=0.0).to(tl.float32)
    return first_HF, tl.load(pointer_HF + HALF, mask=mask_HF, other=0.0).to(tl.float32)


@triton.jit
def store_halves(pointer_HF, first_HF, second_HF, mask_HF, HALF: tl.constexpr):
    """Rounded to what the pointer points to."""
    kind = pointer_HF.dtype.element_ty
    tl.store(pointer_HF, first_HF.to(kind), mask=mask_HF)
    tl.store(pointer_HF + HALF, second_HF.to(kind), mask=mask_HF)


@triton.jit
def inverse_rms(row_ptr, eps, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Of SIZE values in a row."""
    place = tl.arange(0, BLOCK)
    values = tl.load(row_ptr + place, mask=place < SIZE, other=0.0).to(tl.float32)
    return tl.rsqrt(tl.sum(values * values, axis=0) / SIZE + eps)


@triton.jit(do_not_specialize=["num_rows", "capacity"])  # they change with trees and texts: compiled once
def rotate_kernel(
    qkv_ptr,
    cos_ptr,
    sin_ptr,
    query_norm_ptr,
    key_norm_ptr,
    eps,
    rows_ptr,
    queries_ptr,
    keys_ptr,
    values_ptr,
    num_rows,
    capacity,
    NUM_Q: tl.constexpr,
    NUM_KV: tl.constexpr,
    HALF: tl.constexpr,
    NORM: tl.constexpr,  # of a "head", of the whole "row", or ""
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_ROW: tl.constexpr,
):
    """See the head of this file. Letters: H the program's heads, queries' before keys' before values'; F features of a
    half."""
    D: tl.constexpr = 2 * HALF
    t, head_H, half_F = tl.program_id(0), tl.program_id(1) * HEADS + tl.arange(0, HEADS), tl.arange(0, BLOCK)
    head_H1, half_1F = head_H[:, None], half_F[None, :]
    is_query_HF = (head_H1 < NUM_Q) & (half_1F < HALF)
    is_key_HF = (head_H1 >= NUM_Q) & (head_H1 < NUM_Q + NUM_KV) & (half_1F < HALF)
    is_value_HF = (head_H1 >= NUM_Q + NUM_KV) & (head_H1 < NUM_Q + 2 * NUM_KV) & (half_1F < HALF)
    qkv_ptr += t * (NUM_Q + 2 * NUM_KV) * D
    place_HF = head_H1 * D + half_1F
    first_HF, second_HF = load_halves(qkv_ptr + place_HF, is_query_HF | is_key_HF | is_value_HF, HALF)
    if NORM != "":
        if NORM == "head":
            scale_H1 = tl.rsqrt(tl.sum(first_HF * first_HF + second_HF * second_HF, axis=1) / D + eps)[:, None]
            weight_HF, key_weight_HF = half_1F + 0 * head_H1, half_1F + 0 * head_H1
        else:
            query_scale = inverse_rms(qkv_ptr, eps, NUM_Q * D, BLOCK_ROW)
            key_scale = inverse_rms(qkv_ptr + NUM_Q * D, eps, NUM_KV * D, BLOCK_ROW)
            scale_H1 = tl.where(head_H1 < NUM_Q, query_scale, key_scale)
            weight_HF, key_weight_HF = place_HF, place_HF - NUM_Q * D
        query_one_HF, query_two_HF = load_halves(query_norm_ptr + weight_HF, is_query_HF, HALF)
        key_one_HF, key_two_HF = load_halves(key_norm_ptr + key_weight_HF, is_key_HF, HALF)
        first_HF *= tl.where(is_value_HF, 1.0, scale_H1 * (query_one_HF + key_one_HF))
        second_HF *= tl.where(is_value_HF, 1.0, scale_H1 * (query_two_HF + key_two_HF))
    cos_1F, other_cos_1F = load_halves(cos_ptr + t * D + half_1F, half_1F < HALF, HALF)
    sin_1F, other_sin_1F = load_halves(sin_ptr + t * D + half_1F, half_1F < HALF, HALF)
    one_HF = tl.where(is_value_HF, first_HF, first_HF * cos_1F - second_HF * sin_1F)
    two_HF = tl.where(is_value_HF, second_HF, second_HF * other_cos_1F + first_HF * other_sin_1F)
    row = tl.load(rows_ptr + t)
    store_halves(queries_ptr + (head_H1 * num_rows + t) * D + half_1F, one_HF, two_HF, is_query_HF, HALF)
    key_ptr_HF = keys_ptr + ((head_H1 - NUM_Q) * capacity + row) * D + half_1F
    value_ptr_HF = values_ptr + ((head_H1 - NUM_Q - NUM_KV) * capacity + row) * D + half_1F
    store_halves(key_ptr_HF, one_HF, two_HF, is_key_HF, HALF)
    store_halves(value_ptr_HF, one_HF, two_HF, is_value_HF, HALF)


def rotate(
    qkv_TX: Tensor, turns: tuple[Tensor, Tensor], norms: HeadNorms | None, rows_T: Tensor, keys: Tensor, values: Tensor
) -> Tensor:
    """Queries [Hq, T, d] of `qkv_TX`; keys and values [Hkv, capacity, d] get the rows that are theirs.

    `turns`: cos and sin [T, d], of a float type of their own; all else but rows is of one type, and everything in one
    piece. That rows are within the capacity is not checked: they are on the device.
    """
    cos_Td, sin_Td = turns
    num_rows, (num_kv, capacity, head_dim) = len(qkv_TX), keys.shape
    num_q = qkv_TX.shape[1] // head_dim - 2 * num_kv
    _check(qkv_TX, turns, norms, rows_T, keys, values, num_q)
    queries = qkv_TX.new_empty(num_q, num_rows, head_dim)
    heads = min(HEADS_PER_PROGRAM, triton.next_power_of_2(num_q + 2 * num_kv))
    rotate_kernel[num_rows, triton.cdiv(num_q + 2 * num_kv, heads)](
        *(qkv_TX, cos_Td, sin_Td),
        # Where there are none, none are read.
        *((qkv_TX, qkv_TX, 0.0) if norms is None else (norms.query, norms.key, norms.eps)),
        *(rows_T, queries, keys, values, num_rows, capacity),
        NUM_Q=num_q,
        NUM_KV=num_kv,
        HALF=head_dim // 2,
        NORM="" if norms is None else "head" if len(norms.query) == head_dim else "row",
        HEADS=heads,
        BLOCK=triton.next_power_of_2(head_dim // 2),
        BLOCK_ROW=triton.next_power_of_2(max(num_q, num_kv) * head_dim),
    )
    return queries


def _check(
    qkv_TX: Tensor,
    turns: tuple[Tensor, Tensor],
    norms: HeadNorms | None,
    rows_T: Tensor,
    keys: Tensor,
    values: Tensor,
    num_q: int,
) -> None:
    (num_rows, width), (num_kv, _, head_dim) = qkv_TX.shape, keys.shape
    if head_dim % 2 or num_q < 1 or width != (num_q + 2 * num_kv) * head_dim:
        raise ValueError(f"{width} columns are not queries beside keys and values of {num_kv} heads of {head_dim}.")
    if keys.shape != values.shape or any(part.shape != (num_rows, head_dim) for part in turns):
        raise ValueError(f"cos, sin, keys and values do not fit {num_rows} rows of heads of {head_dim}.")
    if rows_T.shape != (num_rows,) or rows_T.dtype != torch.int64:
        raise ValueError(f"rows {tuple(rows_T.shape)} of {rows_T.dtype} are not {num_rows} of int64.")
    weights = () if norms is None else (norms.query, norms.key)
    sizes = tuple(len(weight) for weight in weights)
    if sizes not in ((), (head_dim, head_dim), (num_q * head_dim, num_kv * head_dim)):
        raise ValueError(f"norms of {sizes} are neither of a head of {head_dim} nor of all heads.")
    check_float("projections", qkv_TX.dtype)
    check_float("cos and sin", turns[0].dtype)
    arrays = (qkv_TX, keys, values, *weights)
    if any(part.dtype != qkv_TX.dtype for part in arrays) or turns[0].dtype != turns[1].dtype:
        raise ValueError("projections, norms, keys and values are not of one type, or cos and sin are not.")
    if not all(part.is_contiguous() for part in (*arrays, *turns, rows_T)):
        raise ValueError("projections, cos, sin, norms, rows, keys and values are not in one piece each.")
    named = {"projections": qkv_TX, "cos": turns[0], "sin": turns[1], "rows": rows_T, "keys": keys, "values": values}
    check_device(**named, **{f"norm {number}": weight for number, weight in enumerate(weights)})
