"""Compiled layers against plain fp64 formulas and transformers' modules, and runs with them against runs without."""

from __future__ import annotations

from types import SimpleNamespace

import numba
import pytest
import torch
import torch.nn.functional as F

from moespec import BudgetConfig, Engine
from moespec.budget import MoESpec
from moespec.moe_layers import find_moe_layers
from moespec.native import load_kernels
from moespec.native.weights import exact, panels, quantized
from moespec.routing import FAMILIES
from tests.conftest import tiny_model
from tests.moespec.runs import OwnPolicy, planted_engine, prompt, reference_ids, run
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
