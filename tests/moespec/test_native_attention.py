"""Compiled attention against a plain fp64 formula, one head and row at a time."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from moespec.native.weights import exact
from tests.moespec.test_native import EPS, KERNELS, call


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def turned(heads_THd, angles_Tc):
    """Rotary positions as complex numbers: entry i and entry i + d / 2 are one number's parts."""
    first, second = heads_THd.chunk(2, dim=-1)
    product = torch.complex(first, second) * torch.polar(torch.ones_like(angles_Tc), angles_Tc)[:, None]
    return torch.cat([product.real, product.imag], dim=-1)


def brute_force_attention(x_TD, qkv, norms, out, angles_Tc, keys, values, start, visible_TS, scale):
    """(output, keys [Hkv, T, d], values): fp64, one head and row at a time."""
    num_kv, _, size = keys.shape
    num_q, num_rows = norms.shape[0] - num_kv, x_TD.shape[0]
    heads_THd = (x_TD @ qkv.T).view(num_rows, -1, size)
    rotated_THd, new_values = heads_THd[:, : num_q + num_kv], heads_THd[:, num_q + num_kv :].transpose(0, 1)
    if norms.shape[1]:
        rotated_THd = rotated_THd * (rotated_THd.square().mean(-1, keepdim=True) + EPS).rsqrt() * norms
    rotated_THd = turned(rotated_THd, angles_Tc)
    new_keys = rotated_THd[:, num_q:].transpose(0, 1)
    all_keys = torch.cat([keys[:, :start], new_keys], dim=1)
    all_values = torch.cat([values[:, :start], new_values], dim=1)
    attended_THd = torch.zeros(num_rows, num_q, size, dtype=torch.float64)
    for row in range(num_rows):
        for head in range(num_q):
            group, seen_S = head * num_kv // num_q, visible_TS[row].nonzero()[:, 0]
            shares = (all_keys[group, seen_S] @ rotated_THd[row, head] * scale).softmax(-1)
            attended_THd[row, head] = shares @ all_values[group, seen_S]
    return attended_THd.flatten(1) @ out.T, new_keys, new_values


# (rows, start, keys that every row sees or None for causal) of each request of a call
PLACES = {
    "prefill": [(5, 0, None)],
    "next turn": [(3, 7, None)],
    "plain step": [(1, 7, None)],
    "tree": [(6, 7, 7)],  # `seen` covers the rows themselves
    "drafter": [(4, 12, 7)],  # `seen` also covers earlier levels: keys between committed ones and rows
    "prompts": [(5, 0, None), (1, 7, None), (3, 2, None)],
    "trees": [(6, 7, 7), (1, 3, 3), (9, 11, 11)],
    "drafters": [(2, 12, 7), (4, 3, 3), (1, 9, 4)],
}


class StoredRequest:
    """Keys and values of one request, what its rows see of them, and its row of a table."""

    def __init__(self, place: tuple, first: int, num_kv: int, size: int) -> None:
        self.num_rows, self.start, num_free = place
        self.end, capacity = self.start + self.num_rows, 20
        self.rows = slice(first, first + self.num_rows)
        self.keys, self.values = torch.randn(2, num_kv, capacity, size)
        self.keys[:, self.end :], self.values[:, self.end :] = torch.nan, torch.nan  # nothing was written there yet
        self.seen, self.visible_TS = None, torch.ones(self.num_rows, self.end).tril(self.start).bool()
        if num_free is not None:
            self.seen = torch.rand(self.num_rows, self.end - num_free) < 0.5
            own = torch.arange(self.num_rows)
            self.seen[own, own + self.start - num_free] = True
            self.visible_TS = torch.cat([torch.ones(self.num_rows, num_free, dtype=torch.bool), self.seen], dim=1)
        free = self.start if num_free is None else num_free
        addresses = self.keys.data_ptr(), self.values.data_ptr()
        self.table_row = [first, self.num_rows, self.start, free, capacity, *addresses]


def joined_seen(requests: list[StoredRequest]) -> torch.Tensor:
    if requests[0].seen is None:
        return torch.zeros(1, 0, dtype=torch.bool)
    width = max(request.seen.shape[1] for request in requests)
    return torch.cat([F.pad(request.seen, (0, width - request.seen.shape[1])) for request in requests])


@pytest.mark.parametrize("places", PLACES.values(), ids=PLACES)
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 1)])  # none shared, groups of two, one for all
@pytest.mark.parametrize("with_norms", [False, True])
@pytest.mark.parametrize("size", [8, 32])  # without and with tiles
def test_attention_is_attention_and_writes_its_own_rows_only(places, heads, with_norms, size):
    (num_q, num_kv), width, requests = heads, 12, []
    for place in places:
        requests.append(StoredRequest(place, sum(request.num_rows for request in requests), num_kv, size))
    num_rows = sum(request.num_rows for request in requests)
    x_TD, out = torch.randn(num_rows, width), torch.randn(width, num_q * size)
    qkv, norms = torch.randn((num_q + 2 * num_kv) * size, width), torch.randn(num_q + num_kv, size * with_norms)
    angles_Tc = torch.rand(num_rows, size // 2, dtype=torch.float64) * 6
    turns = (torch.cat([part, part], dim=-1).float() for part in (angles_Tc.cos(), angles_Tc.sin()))
    weights, table = (exact(qkv), norms, EPS, exact(out)), torch.tensor([request.table_row for request in requests])
    before = [(request.keys.clone(), request.values.clone()) for request in requests]
    out_TD = call(KERNELS.attention.attention, x_TD, *weights, *turns, table, joined_seen(requests), 0.3)
    for request, (wanted_keys, wanted_values) in zip(requests, before, strict=True):
        given = (x_TD[request.rows], qkv, norms, out, angles_Tc[request.rows], wanted_keys, wanted_values)
        doubles = (part.double() for part in given)
        expected_TD, *new = brute_force_attention(*doubles, request.start, request.visible_TS, 0.3)
        torch.testing.assert_close(out_TD[request.rows].double(), expected_TD, atol=1e-3, rtol=1e-4)
        written = slice(request.start, request.end)
        parts = zip((request.keys, request.values), (wanted_keys, wanted_values), new, strict=True)
        for stored, wanted, rows in parts:
            torch.testing.assert_close(stored[:, written].double(), rows, atol=1e-4, rtol=1e-4)
            wanted[:, written] = stored[:, written]
            torch.testing.assert_close(stored, wanted, atol=0, rtol=0, equal_nan=True)


def test_a_key_that_is_not_seen_is_not_felt_however_alike():
    num_rows, size = 4, 8
    x_TD, qkv, out = torch.randn(num_rows, size) * 30, torch.randn(3 * size, size), torch.eye(size)
    request = StoredRequest((num_rows, 0, 0), 0, 1, size)
    turns, own = (torch.ones(num_rows, size), torch.zeros(num_rows, size)), torch.eye(num_rows, dtype=torch.bool)
    weights = exact(qkv), torch.zeros(2, 0), EPS, exact(out)
    out_TD = call(KERNELS.attention.attention, x_TD, *weights, *turns, torch.tensor([request.table_row]), own, 1.0)
    torch.testing.assert_close(out_TD, x_TD @ qkv[-size:].T, atol=1e-3, rtol=1e-4)


# (rows, width, expert width): one pair per expert, then more than four; an odd expert width
