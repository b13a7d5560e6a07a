"""Keep the accepted path of a tree in every layer's key-value cache, in one launch.

| array   | shape                         | role                                                                |
|---------|-------------------------------|---------------------------------------------------------------------|
| table   | [P]                           | int64; addresses of P equal caches, each [heads, capacity, features] |
| rows    | [N]                           | int64, increasing: which rows behind `start` are kept, in that order |

Grid (P, heads): a program moves its head's rows up, first to last. Row n goes to place n, and n is never above the row
that it comes from nor equal to one that is still to be read, so nothing is overwritten too early.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.checks import check_device

_TYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


@triton.jit(do_not_specialize=["start", "num_rows", "capacity"])  # they change from step to step: compiled once
def keep_rows_kernel(
    table_ptr, rows_ptr, start, num_rows, capacity, FEATURES: tl.constexpr, BLOCK: tl.constexpr, TYPE: tl.constexpr
):
    """See the head of this file."""
    feature = tl.arange(0, BLOCK)
    cache_ptr = tl.load(table_ptr + tl.program_id(0)).to(tl.pointer_type(TYPE))
    cache_ptr += (tl.program_id(1) * capacity + start).to(tl.int64) * FEATURES
    for n in range(0, num_rows):
        row = tl.load(rows_ptr + n)
        kept = tl.load(cache_ptr + row * FEATURES + feature, mask=feature < FEATURES, other=0.0)
        tl.store(cache_ptr + n * FEATURES + feature, kept, mask=feature < FEATURES)


def are_alike(caches: Sequence[Tensor]) -> bool:
    """Whether caches can have a common table: equal shapes and types, contiguous."""
    first = caches[0]
    return all(c.shape == first.shape and c.dtype == first.dtype and c.is_contiguous() for c in caches)


def address_table(caches: Sequence[Tensor]) -> Tensor:
    """The table of caches [1, heads, capacity, features] that are alike; good as long as they live where they are."""
    if not are_alike(caches):
        raise ValueError("caches of different shapes, types or strides have no common table.")
    check_device(cache=caches[0])
    return torch.tensor([cache.data_ptr() for cache in caches], device=caches[0].device)


def keep_rows(table_P: Tensor, like: Tensor, start: int, rows: Sequence[int]) -> None:
    """Rows `start + rows[n]` to `start + n`, in every cache of the table; `like` is one of them."""
    _, num_heads, capacity, num_features = like.shape
    if sorted(set(rows)) != list(rows) or not rows or rows[0] < 0 or start + rows[-1] >= capacity:
        raise ValueError(f"rows {list(rows)} behind {start} are not increasing within a capacity of {capacity}.")
    keep_rows_kernel[len(table_P), num_heads](
        table_P,
        torch.tensor(rows, device=like.device),
        start,
        len(rows),
        capacity,
        FEATURES=num_features,
        BLOCK=triton.next_power_of_2(num_features),
        TYPE=_TYPES[like.dtype],
    )
