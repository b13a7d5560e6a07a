"""Keeping a path in the caches: every cache of the table, nothing before the tree, nothing that is not kept."""

from __future__ import annotations

import pytest
import torch

from kernels.keep_rows import address_table, keep_rows
from tests.kernels.cases import DEVICE, random

HEADS, CAPACITY = 2, 20
# Rows behind the start, with the reason why they are tried.
PATHS = {
    "a chain: nothing moves": [0, 1, 2],
    "the root alone": [0],
    "a row at a distance": [0, 5],
    "each row onto one that was read just before": [1, 2, 3, 4],
    "to the last place": [0, 3, 13],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", PATHS.values(), ids=PATHS.keys())
@pytest.mark.parametrize("num_features", [16, 24], ids=["a power of two", "none"])
def test_rows_move_up_in_every_cache(rows, dtype, num_features):
    start = 6
    caches = [random(1, HEADS, CAPACITY, num_features, seed=seed).to(dtype) for seed in range(3)]
    before = [cache.clone() for cache in caches]
    keep_rows(address_table(caches), caches[0], start, rows)
    for cache, old in zip(caches, before, strict=True):
        expected = old.clone()
        expected[:, :, start : start + len(rows)] = old[:, :, [start + row for row in rows]]
        assert torch.equal(cache, expected)


def test_a_table_is_of_contiguous_caches():
    turned = torch.zeros(1, CAPACITY, HEADS, 16, device=DEVICE).transpose(1, 2)
    with pytest.raises(ValueError, match="have no common table"):
        address_table([turned])
