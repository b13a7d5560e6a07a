"""Compiled layers against plain fp64 formulas and transformers' modules, and runs with them against runs without."""

from __future__ import annotations

from types import SimpleNamespace

import numba
import pytest
import torch
import torch.nn.functional as F

from moespec import BudgetConfig, Engine
from moespec.budget import MoESpec
from moespec.models import find_moe_layers
from moespec.native import load_kernels
from moespec.native.weights import exact, panels, quantized
from moespec.routing import FAMILIES
from tests.conftest import tiny_model
from tests.moespec.test_engine import OwnPolicy, planted_engine, prompt, reference_ids, run
from tests.moespec.test_layers import brute_force

KERNELS = load_kernels()
EPS = 0.05  # large, so that leaving it out would show


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def packed(experts) -> tuple[torch.Tensor, torch.Tensor]:
    """Both weights' panels."""
    gate_up, down = (torch.from_numpy(panels(weight)) for weight in (experts.gate_up_proj, experts.down_proj))
    return gate_up, down


def call(kernel, *arguments):
    """The kernel's tensor; tensors go in as arrays over the same memory."""
    return torch.from_numpy(kernel(*(a.numpy() if isinstance(a, torch.Tensor) else a for a in arguments)))


@pytest.mark.parametrize("num_rows", [1, 2, 3, 4, 9])  # up to the four rows that are taken at once, and beyond
@pytest.mark.parametrize("num_out", [1, 16, 97])  # a part of a panel, one, six and a part
@pytest.mark.parametrize("depth", [33, 640])  # no whole number of rounds; enough for two threads
def test_a_product_is_the_product(num_rows, num_out, depth):
    x_TD, weight_OD = torch.randn(num_rows, depth), torch.randn(num_out, depth)
    expected_TO = x_TD.double() @ weight_OD.double().T
    half = num_out // 2
    actual_TO = call(KERNELS.layers.linear, x_TD, exact(weight_OD[:half], weight_OD[half:]))
    torch.testing.assert_close(actual_TO.double(), expected_TO, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("num_rows", [1, 2, 3, 4])
def test_a_quantized_weight_is_off_by_half_a_127th_of_its_rows_largest(num_rows):
    x_TD, weight_OD = torch.randn(num_rows, 70), torch.randn(20, 70) * torch.logspace(-3, 3, 20)[:, None]
    weight_OD[7] = 0
    actual_TO = call(KERNELS.layers.linear, x_TD, quantized(weight_OD))
    off_TO = (actual_TO.double() - x_TD.double() @ weight_OD.double().T).abs()
    half_steps_O = weight_OD.abs().amax(dim=1).double() / 254
    assert (off_TO <= 1.001 * x_TD.double().abs().sum(dim=1, keepdim=True) * half_steps_O).all()
    assert (off_TO[:, :7] > 0).all() and (off_TO[:, 7] == 0).all()


@pytest.mark.parametrize("size", [8, 32])  # without and with tiles
@pytest.mark.parametrize("num_rows", [1, 2, 3, 4, 9])
@pytest.mark.parametrize("num_keys", [1, 2, 37])  # a key that is its own pair, a pair, an odd number
def test_dot_products_are_the_product(num_rows, num_keys, size):
    queries_TD, keys_SD, out_TS = (
        torch.randn(num_rows, size),
        torch.randn(num_keys, size),
        torch.empty(num_rows, num_keys),
    )
    KERNELS.layers.dot_products(queries_TD.numpy(), keys_SD.numpy(), out_TS.numpy())
    expected_TS = queries_TD.double() @ keys_SD.double().T
    torch.testing.assert_close(out_TS.double(), expected_TS, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("num_rows", [1, 2, 3, 4, 9])
@pytest.mark.parametrize("num_out", [8, 16, 37])  # below a tile, one, two whole ones and a part
def test_a_mixture_of_rows_is_the_product_and_stays_inside_its_array(num_rows, num_out):
    shares_TS, values_SO = torch.randn(num_rows, 13), torch.randn(13, num_out)
    out_TO = torch.full((num_rows + 1, num_out), 7.0)
    KERNELS.layers.mixes(shares_TS.numpy(), values_SO.numpy(), out_TO[:num_rows].numpy())
    expected_TO = shares_TS.double() @ values_SO.double()
    torch.testing.assert_close(out_TO[:num_rows].double(), expected_TO, atol=1e-4, rtol=1e-4)
    assert (out_TO[num_rows] == 7).all()


def test_rows_are_normalised_as_rms_norm_does():
    x_TD, weight_D = torch.randn(3, 33), torch.randn(33)
    expected_TD = F.rms_norm(x_TD.double(), (33,), weight_D.double(), EPS)
    torch.testing.assert_close(call(KERNELS.layers.unit_rows, x_TD, weight_D, EPS).double(), expected_TD)


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
    "drafter": [
        (4, 12, 7)
    ],  # `seen` also covers earlier levels, whose keys lie between the committed ones and the rows
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
@pytest.mark.parametrize("shape", [(1, 32, 16), (40, 32, 32), (9, 34, 17)])
def test_experts_equal_brute_force_and_read_no_dropped_one(shape):
    num_rows, width, inner = shape
    experts = SimpleNamespace(gate_up_proj=torch.randn(6, 2 * inner, width), down_proj=torch.randn(6, width, inner))
    x_TD, weights_TK = torch.randn(num_rows, width), torch.rand(num_rows, 3) + 0.1
    ids_TK = torch.rand(num_rows, 6).topk(3).indices
    ids_TK[0] = torch.tensor([5, 0, 2])
    weights_TK[(ids_TK == 5) | (ids_TK == 1)] = 0.0
    expected_TD = brute_force(experts, x_TD, ids_TK, weights_TK)
    arguments = x_TD, ids_TK, weights_TK
    before_TD = call(KERNELS.experts.experts, *arguments, *packed(experts))
    torch.testing.assert_close(before_TD.double(), expected_TD, atol=1e-3, rtol=1e-4)
    experts.gate_up_proj[[1, 5]], experts.down_proj[[1, 5]] = torch.nan, torch.nan
    assert torch.equal(call(KERNELS.experts.experts, *arguments, *packed(experts)), before_TD)


def test_a_row_without_experts_is_exactly_zero():
    x_TD, ids_TK = torch.randn(3, 8), torch.tensor([[0, 1], [2, 0], [1, 2]])
    weights_TK = torch.tensor([[0.5, 0.5], [0.0, 0.0], [0.0, 1.0]])
    experts = SimpleNamespace(gate_up_proj=torch.randn(3, 8, 8), down_proj=torch.randn(3, 8, 4))
    out_TD = call(KERNELS.experts.experts, x_TD, ids_TK, weights_TK, *packed(experts))
    assert torch.equal(out_TD[1], torch.zeros(8))
    assert (out_TD[[0, 2]] != 0).any(dim=1).all()
    weights_TK.zero_()
    experts.gate_up_proj[:], experts.down_proj[:] = torch.nan, torch.nan
    assert torch.equal(call(KERNELS.experts.experts, x_TD, ids_TK, weights_TK, *packed(experts)), torch.zeros(3, 8))


def test_the_same_input_gives_the_same_bits_on_any_number_of_threads():
    ids_TK = torch.rand(30, 12).topk(3).indices
    experts = SimpleNamespace(gate_up_proj=torch.randn(12, 64, 64), down_proj=torch.randn(12, 64, 32))
    arguments = torch.randn(30, 64), ids_TK, torch.rand(30, 3), *packed(experts)
    weight = exact(experts.gate_up_proj.flatten(0, 1))
    found = []
    before = numba.get_num_threads()
    try:
        for num_threads in (1, numba.config.NUMBA_NUM_THREADS, numba.config.NUMBA_NUM_THREADS):
            numba.set_num_threads(num_threads)
            found.append(
                (
                    call(KERNELS.experts.experts, *arguments),
                    call(KERNELS.layers.linear, arguments[0], weight),
                )
            )
    finally:
        numba.set_num_threads(before)
    assert all(torch.equal(part, first) for parts in found[1:] for part, first in zip(parts, found[0], strict=True))


@torch.inference_mode()
def test_routing_is_what_the_models_own_router_says(family):
    moe = find_moe_layers(tiny_model(family))[0]
    logits_TE, weights_TK, ids_TK = moe.router(torch.randn(20, 32))
    found = KERNELS.routing.route(logits_TE.numpy(), ids_TK.shape[1], FAMILIES.index(moe.family))
    _, own_ids_TK, own_weights_TK = (torch.from_numpy(part) for part in found)
    assert torch.equal(own_ids_TK, ids_TK)
    torch.testing.assert_close(own_weights_TK, weights_TK)


def test_equal_experts_are_taken_by_number():
    logits_TE = torch.tensor([[1.0, 2.0, 1.0, 2.0, 1.0]])
    _, ids_TK, weights_TK = KERNELS.routing.route(logits_TE.numpy(), 3, 0)
    assert ids_TK.tolist() == [[1, 3, 0]]
    assert weights_TK[0, 0] == weights_TK[0, 1] > weights_TK[0, 2]


def steps_of(family: str, budget: BudgetConfig, is_compiled: bool):
    engine, _ = planted_engine(family)
    assert engine.target.is_compiled == is_compiled
    steps = run(engine, budget=budget)
    routing = [(layer.natural, layer.kept, layer.active) for step in steps for layer in step.layers]
    return steps, routing


BUDGETS = {
    "lossless": {},
    "substitution": {"budget": 3},
    "truncation": {"budget": 3, "policy": "truncation"},
    "every option": {"coverage": 0.6, "score": "natural", "row_weight": "path", "protect_root": True},
}


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])  # with and without query and key norms
@pytest.mark.parametrize("settings", BUDGETS.values(), ids=BUDGETS)
def test_compiled_steps_are_the_modules_steps(family, settings, monkeypatch):
    steps, routing = steps_of(family, BudgetConfig(**settings), is_compiled=True)
    for module in ("lean", "experts"):
        monkeypatch.setattr(f"moespec.{module}.load_kernels", lambda: None)
    expected, expected_routing = steps_of(family, BudgetConfig(**settings), is_compiled=False)
    assert [step.token_ids for step in steps] == [step.token_ids for step in expected]
    assert routing == expected_routing
    kept = [(natural, kept) for natural, kept, _ in routing]
    assert any(kept != natural for natural, kept in kept) == bool(settings)  # so that the budget acted
    assert any(step.kind == "tree" for step in steps)


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
@pytest.mark.parametrize("policy", ["substitution", "truncation"])
def test_a_policy_asked_layer_by_layer_is_the_policy_handed_over(family, policy, monkeypatch):
    config = BudgetConfig(budget=3, policy=policy)
    own = OwnPolicy(config)
    expected, expected_routing = steps_of(family, BudgetConfig(policy=own), is_compiled=True)
    assert own.num_calls == sum(len(step.layers) for step in expected if step.kind == "tree") > 0
    monkeypatch.setattr(MoESpec, "plan", lambda *_: pytest.fail("a compiled step asked layer by layer"))
    steps, routing = steps_of(family, config, is_compiled=True)
    assert [step.token_ids for step in steps] == [step.token_ids for step in expected]
    assert routing == expected_routing


@pytest.mark.parametrize("change", ["in place", "replaced"])
def test_a_model_changed_after_loading_is_followed(change):
    model, other = tiny_model("qwen3_moe"), tiny_model("qwen3_moe", seed=1)
    engine = Engine.from_model(model)
    before = run(engine)[-1].summary.token_ids
    with torch.no_grad():
        for mine, new in zip(model.model.layers, other.model.layers, strict=True):
            if change == "in place":
                mine.self_attn.v_proj.weight.copy_(new.self_attn.v_proj.weight)
            else:
                mine.mlp.experts.down_proj = new.mlp.experts.down_proj
    after = run(engine)[-1].summary.token_ids
    assert engine.target.is_compiled and after != before
    assert after == reference_ids(model, prompt())[11:]
