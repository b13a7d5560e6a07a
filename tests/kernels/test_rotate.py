"""Norms, rotation and the cache in one launch: against fp64, and nothing of the cache is written but the rows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels.rotate import HeadNorms, rotate
from tests.kernels.cases import DEVICE, random

CAPACITY = 40
EPS = 1e-3  # large enough to be seen
# Query heads, key heads and features of a head, with the reason why they are tried.
SHAPES = {
    "one head of each": (1, 1, 4),
    "groups of heads, as many as a program takes": (12, 2, 16),
    "two programs for a row, the second half full": (16, 4, 8),
    "no power of two": (6, 2, 12),
}


def rms(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * weight


def expected_of(
    qkv_TX: Tensor, angles_Td: Tensor, norms: HeadNorms | None, num_q: int, num_kv: int, head_dim: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values [H, T, d] by complex numbers, in fp64."""
    query, key, value = qkv_TX.double().split([num_q * head_dim, num_kv * head_dim, num_kv * head_dim], dim=1)
    turned = []
    for part, num_heads, weight in ((query, num_q, norms and norms.query), (key, num_kv, norms and norms.key)):
        if weight is not None and len(weight) == len(part[0]):
            part = rms(part, weight.double())
        heads = part.reshape(len(part), num_heads, head_dim)
        if weight is not None and len(weight) != num_heads * head_dim:
            heads = rms(heads, weight.double())
        as_complex = torch.complex(*heads.chunk(2, dim=-1))
        half = angles_Td.double()[:, None, : head_dim // 2]
        spun = as_complex * torch.polar(torch.ones_like(half), half)
        turned.append(torch.cat([spun.real, spun.imag], dim=-1).transpose(0, 1))
    return turned[0], turned[1], value.reshape(len(value), num_kv, head_dim).transpose(0, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("norm", [None, "head", "row"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_queries_are_turned_and_keys_and_values_kept(shape, norm, dtype):
    num_q, num_kv, head_dim = shape
    rows = [7, 30, 8, 39, 0]  # in no order, the first and last places among them
    qkv_TX = random(len(rows), (num_q + 2 * num_kv) * head_dim, seed=1).to(dtype)
    angles_Td = random(len(rows), head_dim // 2, seed=2).repeat(1, 2)
    sizes = {"head": (head_dim, head_dim), "row": (num_q * head_dim, num_kv * head_dim)}.get(norm or "")
    norms = None if sizes is None else HeadNorms(*(random(size, seed=size).to(dtype) for size in sizes), EPS)
    keys, values = (random(num_kv, CAPACITY, head_dim, seed=seed).to(dtype) for seed in (3, 4))
    before = keys.clone(), values.clone()
    turns = angles_Td.cos(), angles_Td.sin()  # of a type of their own
    queries = rotate(qkv_TX, turns, norms, torch.tensor(rows, device=DEVICE), keys, values)
    expected = expected_of(qkv_TX, angles_Td, norms, num_q, num_kv, head_dim)
    tolerance = 1e-6 if dtype == torch.float32 else 0.01
    for actual, wanted in zip((queries, keys[:, rows], values[:, rows]), expected, strict=True):
        assert (actual.double() - wanted).norm() <= tolerance * wanted.norm()
    others = [place for place in range(CAPACITY) if place not in rows]
    for now, old in zip((keys, values), before, strict=True):
        assert torch.equal(now[:, others], old[:, others])


def test_what_does_not_fit_is_refused_in_a_sentence():
    qkv_TX, cos_Td, cache = (torch.zeros(*shape, device=DEVICE) for shape in ((3, 32), (3, 8), (1, 9, 8)))
    rows_T, turns = torch.arange(3, device=DEVICE), (cos_Td, cos_Td)
    cases = {
        "32 columns are not queries": lambda: rotate(qkv_TX, turns, None, rows_T, cache.repeat(2, 1, 1), cache),
        "do not fit 3 rows of heads of 8": lambda: rotate(qkv_TX, (cos_Td[:2], cos_Td), None, rows_T, cache, cache),
        "rows (3,) of torch.int32": lambda: rotate(qkv_TX, turns, None, rows_T.int(), cache, cache),
        "norms of (8, 5) are neither": lambda: rotate(
            qkv_TX, turns, HeadNorms(cos_Td[0], cos_Td[0, :5], EPS), rows_T, cache, cache
        ),
        "not of one type": lambda: rotate(qkv_TX, turns, None, rows_T, cache, cache.bfloat16()),
        "or cos and sin are not": lambda: rotate(qkv_TX, (cos_Td, cos_Td.bfloat16()), None, rows_T, cache, cache),
        "cos and sin of torch.int64": lambda: rotate(qkv_TX, (cos_Td.long(), cos_Td), None, rows_T, cache, cache),
        "not in one piece": lambda: rotate(qkv_TX, turns, None, rows_T.repeat(2)[::2], cache, cache),
        "of torch.float64 are not one of": lambda: rotate(qkv_TX.double(), turns, None, rows_T, cache, cache),
    }
    for sentence, call in cases.items():
        with pytest.raises(ValueError) as refused:
            call()
        assert sentence in str(refused.value)
