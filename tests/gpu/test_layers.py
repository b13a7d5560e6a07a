"""The kernels at the sizes of published models, compiled: numbers, what is never read, one captured graph."""

from __future__ import annotations

import pytest
import torch

from kernels import reference
from kernels.experts import moe_experts, unsupported_reason
from kernels.select import Settings, select
from kernels.shapes import FORMATS, LAYERS
from tests.kernels.cases import DEVICE, Case, check, check_nan_is_not_read, inputs, random

# Plain decoding; the smallest trees; a full block of 16; the first of 64; the most.
REAL = [
    Case(f"{name}, {num_rows} rows", num_rows, layer)
    for name, layer in LAYERS.items()
    for num_rows in (1, 2, 16, 33, 64)
]
# fp8 comes with Ada: `unsupported_reason` has a test of its own.
FORMATS_HERE = [name for name in FORMATS if "fp8" not in name or torch.cuda.get_device_capability() >= (8, 9)]
LAYERS_BY_FORMAT = [
    (case, name)
    for case in REAL
    for name in FORMATS_HERE
    if case.layer.has_format(name) and (name == "bf16" or case.num_rows in (1, 33))
]
each = pytest.mark.parametrize(
    ("case", "number_format"), LAYERS_BY_FORMAT, ids=lambda part: getattr(part, "reason", part)
)


@each
def test_as_good_as_torch(case, number_format):
    check(case, number_format, torch.bfloat16)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("num_rows", [1, 64])
def test_nan_outside_the_plan_changes_no_bit(name, num_rows):
    check_nan_is_not_read(Case(name, num_rows, LAYERS[name], "few"), "bf16")


@pytest.mark.parametrize("case", REAL, ids=lambda case: case.reason)
def test_the_same_input_gives_the_same_bits(case):
    arguments = inputs(case, "bf16", torch.bfloat16)
    assert torch.equal(moe_experts(*arguments), moe_experts(*arguments))


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("num_rows", [2, 64])
def test_the_plan_is_the_references(name, num_rows):
    layer = LAYERS[name]
    logits_TE = random(num_rows, layer.num_experts, seed=num_rows) * 2
    row_weights_T = torch.ones(num_rows, device=DEVICE)
    budget = (layer.top_k + layer.num_experts) // 2
    settings = Settings.on(DEVICE, num_rows, budget)
    plan = select(logits_TE, row_weights_T, settings, layer.top_k, layer.rule, torch.float32)
    *_, ids_TK, weights_TK, kept_E = reference.select(
        logits_TE.double(), row_weights_T.double(), layer.top_k, layer.rule, budget=budget
    )
    assert torch.equal(plan.ids_TK, ids_TK) and torch.equal(plan.kept_E, kept_E)
    torch.testing.assert_close(plan.weights_TK.double(), weights_TK, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", LAYERS)
def test_a_captured_layer_follows_the_settings(name):
    """One graph, replayed at budgets and policies that it was not captured with."""
    case = Case(name, 32, LAYERS[name])
    x_TD, _, _, weights = inputs(case, "bf16", torch.bfloat16)
    logits_TE = random(case.num_rows, case.layer.num_experts, seed=5) * 2
    row_weights_T = torch.ones(case.num_rows, device=DEVICE)
    settings = Settings.on(DEVICE, case.num_rows, case.layer.num_experts)

    def layer(moved: Settings) -> torch.Tensor:
        plan = select(logits_TE, row_weights_T, moved, case.layer.top_k, case.layer.rule, torch.bfloat16)
        return moe_experts(x_TD, plan.ids_TK, plan.weights_TK, weights, plan.lists)

    layer(settings)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out_TD = layer(settings)
    for num_valid, budget, truncates in [(32, case.layer.top_k, True), (20, case.layer.top_k + 1, False)]:
        wanted = Settings.on(DEVICE, num_valid, budget, truncates=truncates)
        settings.numbers_5.copy_(wanted.numbers_5)
        graph.replay()
        assert torch.equal(out_TD, layer(wanted))


def test_this_card_runs_floats():
    weights = LAYERS["OLMoE-1B-7B"].random_weights("bf16", DEVICE)
    assert unsupported_reason(weights, DEVICE) is None
