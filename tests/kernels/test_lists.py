"""Lists apart from numbers: sorted, complete, each pair once; the same rows in whatever form a plan comes."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from kernels import reference
from kernels.lists import ExpertLists, group
from tests.kernels.cases import DEVICE, random

# (rows, experts, k), each with its reason.
SIZES = {
    "one pair": (1, 1, 1),
    "one row": (1, 8, 3),
    "more experts than pairs": (2, 12, 3),
    "nothing is a power of two": (5, 6, 3),
    "k = 1": (7, 4, 1),
    "k = E": (3, 5, 5),
    "a budget of k: every row the same experts": (9, 3, 3),
    "the most rows": (64, 8, 2),
    "the most experts": (3, 256, 8),
    "the most of both": (64, 256, 8),
}


def assert_lists_of(lists: ExpertLists, ids_TK: Tensor, weights_TK: Tensor, num_experts: int) -> None:
    """Every surviving pair once, by expert and then by row; -1 behind the last expert."""
    expected = reference.lists(ids_TK, weights_TK)
    num_active = len(expected)
    assert len(lists.experts_A) == min(num_experts, ids_TK.numel()) == len(lists.starts_A) - 1
    assert lists.experts_A.tolist() == [*expected] + [-1] * (len(lists.experts_A) - num_active)
    starts = lists.starts_A.tolist()[: num_active + 1]
    pairs = lists.pairs_P.tolist()
    assert starts[0] == 0
    for expert, (first, last) in zip(expected, itertools.pairwise(starts), strict=True):
        assert pairs[first:last] == expected[expert]


def random_plan(num_rows: int, num_experts: int, top_k: int) -> tuple[Tensor, Tensor]:
    """Distinct experts in each row; a third of the pairs dropped, the last row whole."""
    ids_TK = random(num_rows, num_experts, seed=1).topk(top_k).indices
    weights_TK = random(num_rows, top_k, seed=2)
    weights_TK[random(num_rows, top_k, seed=3) < -0.43] = 0
    weights_TK[-1] = 0
    return ids_TK, weights_TK


@pytest.mark.parametrize("dropped", [False, True], ids=["all survive", "some are dropped"])
@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES.keys())
def test_every_surviving_pair_has_one_place(size, dropped):
    ids_TK, weights_TK = random_plan(*size)
    if not dropped:
        weights_TK = torch.ones_like(weights_TK)
    lists = group(ids_TK, weights_TK, size[1])
    assert torch.equal(lists.weights_TK, weights_TK)
    assert_lists_of(lists, ids_TK, weights_TK, size[1])


def test_a_plan_of_nothing_has_no_experts():
    ids_TK = torch.zeros(3, 2, dtype=torch.int64, device=DEVICE)
    lists = group(ids_TK, torch.zeros(3, 2, device=DEVICE), 4)
    assert lists.experts_A.tolist() == [-1] * 4 and lists.starts_A[0] == 0


def test_pairs_of_one_row_and_expert_are_merged():
    ids = [[2, 2, 2], [0, 2, 0], [1, 0, 1], [1, 1, 0]]
    weights = [[0.0, 0.5, 0.25], [1.0, 0.0, 2.0], [0.5, 0.0, -0.5], [0.25, 0.0, 1.0]]
    merged = [[0.75, 0.0, 0.0], [3.0, 0.0, 0.0], [0.0, 0.0, 0.0], [0.25, 0.0, 1.0]]
    ids_TK, weights_TK = torch.tensor(ids, device=DEVICE), torch.tensor(weights, device=DEVICE)
    lists = group(ids_TK, weights_TK, 3)
    assert lists.weights_TK.tolist() == merged
    assert weights_TK.tolist() == weights  # the caller's stay theirs
    assert_lists_of(lists, ids_TK, torch.tensor(merged), 3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_weights_keep_their_bits(dtype):
    ids_TK, weights_TK = random_plan(5, 6, 3)
    lists = group(ids_TK, weights_TK.to(dtype), 6)
    assert lists.weights_TK.dtype == dtype and torch.equal(lists.weights_TK, weights_TK.to(dtype))


def test_the_reference_is_the_formula():
    ids_TK = torch.tensor([[3, 0], [0, 2], [2, 3]])
    assert reference.lists(ids_TK, torch.tensor([[1.0, 0.5], [0.0, 1.0], [1.0, 1.0]])) == {0: [1], 2: [3, 4], 3: [0, 5]}
