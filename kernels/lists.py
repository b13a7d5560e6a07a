"""From a layer's plan to the lists that the expert kernels walk: which experts, and which (row, slot) pairs of each.

| array   | shape      | role                                                                         |
|---------|------------|------------------------------------------------------------------------------|
| ids     | [T, K]     | experts of each row                                                           |
| weights | [T, K]     | routing weights; 0 is a pair that was dropped: it touches no expert           |
| merged  | [T, K]     | written: weights, those of an expert that a row names again added to the first |
| experts | [A]        | written: experts with a surviving pair, increasing; -1 behind the last        |
| starts  | [A + 1]    | written: where each expert's pairs begin; one more for the end of the last    |
| pairs   | [T * K]    | written: row * K + slot of the surviving pairs, expert by expert, rows in order |

A = min(E, T * K). Merged, an expert has at most one pair of each row: 64, what a block of rows holds. One program;
nothing is asked of the host, and the same plan always gives the same lists.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.checks import check_rows


@dataclass(frozen=True)
class ExpertLists:
    """Merged weights [T, K] and the lists; see the table above. int32 on the device of the weights."""

    weights_TK: Tensor
    experts_A: Tensor
    starts_A: Tensor
    pairs_P: Tensor

    @classmethod
    def empty(cls, weights_TK: Tensor, num_experts: int) -> ExpertLists:
        num_pairs = weights_TK.numel()
        num_lists = min(num_experts, num_pairs)
        experts_A, starts_A, pairs_P = (
            torch.empty(size, dtype=torch.int32, device=weights_TK.device)
            for size in (num_lists, num_lists + 1, num_pairs)
        )
        return cls(weights_TK, experts_A, starts_A, pairs_P)


@triton.jit
def column(values_TK, slots, k):
    """[T]: column k of a tile [T, K]."""
    return tl.sum(tl.where(slots[None, :] == k, values_TK, 0), axis=1)


@triton.jit
def write_lists(
    slots_ET,
    experts_ptr,
    starts_ptr,
    pairs_ptr,
    NUM_LISTS: tl.constexpr,
    K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Lists of the pairs that live. slots: int32 [BLOCK_E, BLOCK_T], counted from 1; 0 where a row has no such pair."""
    rows_T, experts_E = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_E)
    lives_ET = (slots_ET > 0).to(tl.int32)
    count_E = tl.sum(lives_ET, axis=1)
    start_E = tl.cumsum(count_E, axis=0) - count_E
    place_ET = start_E[:, None] + tl.cumsum(lives_ET, axis=1) - 1
    tl.store(pairs_ptr + place_ET, rows_T[None, :] * K + slots_ET - 1, mask=slots_ET > 0)
    is_active_E = (count_E > 0).to(tl.int32)
    list_E = tl.cumsum(is_active_E, axis=0) - is_active_E
    num_active = tl.sum(is_active_E, axis=0)
    tl.store(experts_ptr + list_E, experts_E, mask=is_active_E != 0)
    tl.store(starts_ptr + list_E, start_E, mask=is_active_E != 0)
    tl.store(starts_ptr + num_active, tl.sum(count_E, axis=0))
    tl.store(experts_ptr + experts_E, -1, mask=(experts_E >= num_active) & (experts_E < NUM_LISTS))


@triton.jit
def group_kernel(
    ids_ptr,
    weights_ptr,
    merged_ptr,
    experts_ptr,
    starts_ptr,
    pairs_ptr,
    T,
    NUM_LISTS: tl.constexpr,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Grid (1,): ids int64 [T, K] and weights [T, K], both contiguous, to their lists."""
    rows_T, slots_K = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_K)
    at_TK = rows_T[:, None] * K + slots_K[None, :]
    inside_TK = (rows_T < T)[:, None] & (slots_K < K)[None, :]
    ids_TK = tl.load(ids_ptr + at_TK, mask=inside_TK, other=0).to(tl.int32)
    weights_TK = tl.load(weights_ptr + at_TK, mask=inside_TK, other=0.0).to(tl.float32)
    for k in range(K):
        is_same_TK = (ids_TK == column(ids_TK, slots_K, k)[:, None]) & (slots_K >= k)[None, :]
        total_T = tl.sum(tl.where(is_same_TK, weights_TK, 0.0), axis=1)
        weights_TK = tl.where(is_same_TK, tl.where(slots_K[None, :] == k, total_T[:, None], 0.0), weights_TK)
    weights_TK = weights_TK.to(merged_ptr.dtype.element_ty)
    tl.store(merged_ptr + at_TK, weights_TK, mask=inside_TK)
    experts_E, slots_ET = tl.arange(0, BLOCK_E), tl.zeros((BLOCK_E, BLOCK_T), tl.int32)
    for k in range(K):
        # Where the pair is dropped, an expert that there is not.
        named_T = column(tl.where(weights_TK != 0, ids_TK, -1), slots_K, k)
        slots_ET = tl.where(experts_E[:, None] == named_T[None, :], k + 1, slots_ET)
    write_lists(slots_ET, experts_ptr, starts_ptr, pairs_ptr, NUM_LISTS, K, BLOCK_T, BLOCK_E)


def group(ids_TK: Tensor, weights_TK: Tensor, num_experts: int) -> ExpertLists:
    """Lists of any plan: ids int64 and weights [T, K], T at most 64, up to 256 experts."""
    check_rows(ids_TK, weights_TK, num_experts)
    num_rows, top_k = ids_TK.shape
    lists = ExpertLists.empty(torch.empty_like(weights_TK, memory_format=torch.contiguous_format), num_experts)
    blocks = block_sizes(num_rows, num_experts)
    group_kernel[(1,)](
        ids_TK.contiguous(),
        weights_TK.contiguous(),
        lists.weights_TK,
        lists.experts_A,
        lists.starts_A,
        lists.pairs_P,
        num_rows,
        NUM_LISTS=len(lists.experts_A),
        K=top_k,
        BLOCK_K=triton.next_power_of_2(top_k),
        **blocks,
        num_warps=num_warps(blocks),
    )
    return lists


def block_sizes(num_rows: int, num_experts: int) -> dict[str, int]:
    """Powers of two that hold the rows and experts."""
    sizes = {"BLOCK_T": num_rows, "BLOCK_E": num_experts}
    return {name: triton.next_power_of_2(size) for name, size in sizes.items()}


def num_warps(blocks: dict[str, int]) -> int:
    """At most 32 entries of a [T, E] tile per thread, and of [32, E]: a handful of such tiles lies in registers."""
    return max(1, min(16, max(32, blocks["BLOCK_T"]) * blocks["BLOCK_E"] // 1024))
