"""Calls of the expert kernels, each with the reason why it is tried, and the rule for how far they may be off."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kernels import reference
from kernels.checks import FLOATS, IS_INTERPRETED
from kernels.experts import moe_experts
from kernels.shapes import Layer
from kernels.weights import ExpertMatrix, ExpertWeights, Gate

DEVICE = torch.device("cpu" if IS_INTERPRETED else "cuda")
CUTTING = Gate(1.702, 0.7, 1.0)  # gpt-oss', with a limit that these numbers reach


@dataclass(frozen=True)
class Case:
    """`plan`: how ids and weights are drawn, a function below; `num_draws`: few numbers need more than one."""

    reason: str
    num_rows: int
    layer: Layer
    plan: str = "random"
    num_draws: int = 1


# D = 48 and F = 40 fill no turn of a loop (32) and no tile of columns (64): both are masked.
RAGGED = Layer(48, 40, 6, 2)
CASES = [
    Case("one row", 1, RAGGED, num_draws=4),
    Case("one row, an expert dropped", 1, Layer(48, 40, 6, 3), "first dropped", num_draws=4),
    Case("one row, one expert", 1, Layer(48, 40, 6, 1), num_draws=4),
    Case("two rows: the fewest with lists, more experts than pairs", 2, Layer(32, 16, 9, 2), num_draws=4),
    Case("five rows: no power of two, nor are the experts", 5, RAGGED, num_draws=2),
    Case("17 rows: the first of the blocks of 32", 17, Layer(32, 32, 3, 1)),
    Case("64 rows: all there is room for", 64, Layer(32, 16, 8, 2)),
    Case("blocks of 16, 32 and 64 side by side, each full or one more", 64, Layer(32, 16, 5, 2), "boundaries"),
    Case("an expert with every row, one with none", 64, Layer(32, 16, 4, 2), "crowded"),
    Case("k = 1", 5, Layer(32, 48, 4, 1), num_draws=4),
    Case("k = E: every row uses every expert", 3, Layer(32, 16, 5, 5), num_draws=2),
    Case("padded rows, a row that lost every expert", 9, RAGGED, "padded"),
    Case("biases", 5, replace(RAGGED, has_bias=True)),
    Case("biases, one row", 1, replace(RAGGED, has_bias=True), num_draws=4),
    Case("transposed, in turns, biases, gpt-oss' gate", 5, Layer(48, 40, 6, 2, 2, True, True, CUTTING)),
    Case("the same, one row", 1, Layer(48, 40, 6, 2, 2, True, True, CUTTING), num_draws=4),
    Case("rows that name an expert twice: more pairs than rows", 17, Layer(32, 16, 3, 2), "twice"),
    Case("one row that names an expert twice", 1, Layer(32, 16, 3, 3), "twice", num_draws=4),
]


def random(*shape: int, seed: int) -> Tensor:
    """Normal fp32, the same on every device."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def plan(case: Case, seed: int) -> tuple[Tensor, Tensor]:
    """ids int64 and weights fp32 [T, K]."""
    (num_rows, top_k), num_experts = (case.num_rows, case.layer.top_k), case.layer.num_experts
    ids_TK = random(num_rows, num_experts, seed=seed).topk(top_k).indices
    weights_TK = random(num_rows, top_k, seed=seed + 1).abs() + 0.1
    rows_T = torch.arange(num_rows, device=DEVICE)
    if case.plan == "first dropped":
        weights_TK[:, 0] = 0
    elif case.plan == "boundaries":  # 16, 17, 31, 64 pairs and none
        ids_TK[:, 0] = torch.bucketize(rows_T, torch.tensor([16, 33], device=DEVICE), right=True)
        ids_TK[:, 1] = 3
    elif case.plan == "crowded":
        ids_TK[:, 0], ids_TK[:, 1] = 2, torch.where(rows_T % 2 == 0, 0, 3)
    elif case.plan == "few":  # a budget of half the experts
        ids_TK = random(num_rows, max(top_k, num_experts // 2), seed=seed).topk(top_k).indices
    elif case.plan == "padded":
        weights_TK[0], weights_TK[6:] = 0, 0
        weights_TK[1, 1] = 0
    elif case.plan == "twice":
        ids_TK[:, 1] = ids_TK[:, 0]
        weights_TK[::3, 0] = 0
    return ids_TK, weights_TK


def inputs(
    case: Case, number_format: str, dtype: torch.dtype, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, ExpertWeights]:
    """x, ids, weights and experts: the arguments of `moe_experts`."""
    x_TD = random(case.num_rows, case.layer.hidden_size, seed=1000 + seed).to(dtype)
    ids_TK, weights_TK = plan(case, 2000 + seed)
    return x_TD, ids_TK, weights_TK.to(dtype), case.layer.random_weights(number_format, DEVICE, 3000 + seed)


def in_type(weights: ExpertWeights, dtype: torch.dtype) -> ExpertWeights:
    """Experts of floats in this type."""

    def converted(matrix):
        bias = None if matrix.bias is None else matrix.bias.to(dtype)
        return replace(matrix, values=matrix.values.to(dtype), bias=bias)

    return replace(weights, gate_up=converted(weights.gate_up), down=converted(weights.down))


def check(case: Case, number_format: str, dtype: torch.dtype) -> None:
    """The kernels on this case: as good as torch. "bf16" is whatever float `dtype` is."""
    arguments = [inputs(case, number_format, dtype, seed) for seed in range(case.num_draws)]
    if number_format == "bf16":
        arguments = [(*rest, in_type(weights, dtype)) for *rest, weights in arguments]
    assert_as_good_as_torch([moe_experts(*each) for each in arguments], arguments)


def assert_as_good_as_torch(outputs: list[Tensor], arguments: list[tuple]) -> None:
    """Against fp64, at most twice as far off as plain torch in the type of x, all draws taken together.

    Where torch is off by less than one rounding of its result, twice a rounding. The interpreter's stores cut bf16 off
    instead of rounding it, which doubles that part of the error: measured, 0.9 to 2.1 times torch's in all, by case and
    seed, where fp16's is 0.5. There, three times is allowed. Compiled products of fp32 add up one by one, torch's in
    parts: four times.
    """
    kernels_off, torchs_off, size = 0.0, 0.0, 0.0
    for out_TD, (x_TD, ids_TK, weights_TK, weights) in zip(outputs, arguments, strict=True):
        assert out_TD.dtype == x_TD.dtype and out_TD.shape == x_TD.shape
        golden_TD = reference.experts(x_TD.double(), ids_TK, weights_TK.double(), weights)
        plain_TD = reference.experts(x_TD, ids_TK, weights_TK, weights)
        kernels_off += float((out_TD.double() - golden_TD).square().sum())
        torchs_off += float((plain_TD.double() - golden_TD).square().sum())
        size += float(golden_TD.square().sum())
    dtype = arguments[0][0].dtype
    factor = {torch.bfloat16: 3 if IS_INTERPRETED else 2, torch.float32: 2 if IS_INTERPRETED else 4}.get(dtype, 2)
    kernels_share, torchs_share = (kernels_off / size) ** 0.5, (torchs_off / size) ** 0.5
    assert kernels_share <= factor * max(torchs_share, rounding(dtype)), (kernels_share, torchs_share)


def rounding(dtype: torch.dtype) -> float:
    """What one rounding may cost, relatively. A GPU's exp and division are good to two units of fp32's last place."""
    is_approximate = dtype == torch.float32 and not IS_INTERPRETED
    return torch.finfo(dtype).eps * (2 if is_approximate else 0.5)


def check_nan_is_not_read(case: Case, number_format: str) -> None:
    """NaN in every expert outside the plan, and in rows that lost all theirs: the output keeps every bit."""
    x_TD, ids_TK, weights_TK, weights = inputs(case, number_format, torch.bfloat16)
    weights_TK[ids_TK == 0] = 0  # an expert that rows name, and none uses
    used_E = torch.zeros(weights.num_experts, dtype=torch.bool, device=DEVICE)
    used_E[ids_TK[weights_TK != 0]] = True
    assert not used_E.all()
    expected_TD = moe_experts(x_TD, ids_TK, weights_TK, weights)
    dropped_T = (weights_TK == 0).all(dim=1)
    x_TD[dropped_T] = torch.nan
    out_TD = moe_experts(x_TD, ids_TK, weights_TK, _poisoned(weights, ~used_E))
    assert out_TD.isfinite().all() and torch.equal(out_TD, expected_TD)
    assert torch.equal(out_TD[dropped_T], torch.zeros_like(out_TD[dropped_T]))


def _poisoned(weights: ExpertWeights, unused_E: Tensor) -> ExpertWeights:
    """NaN in all that knows it: values, the scales of values that do not, biases."""

    def part(tensor: Tensor | None) -> Tensor | None:
        if tensor is None or tensor.dtype not in FLOATS:
            return tensor
        return torch.where(unused_E.view(-1, *[1] * (tensor.dim() - 1)), torch.nan, tensor)

    def matrix(whole: ExpertMatrix) -> ExpertMatrix:
        return replace(whole, values=part(whole.values), scale=part(whole.scale), bias=part(whole.bias))

    return replace(weights, gate_up=matrix(weights.gate_up), down=matrix(weights.down))
