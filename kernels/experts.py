"""A whole layer's experts on the kernels: from rows and a plan to their sum. Owns the choice of kernels and tiles.

Up to 64 rows go through lists to `gate_up.py` and `down.py`, a single one too: kernels of its own, without the matrix
unit, took 2.5 to 3.2 times as long (H200, bf16, a layer of Qwen3-30B and of OLMoE). Knows nothing of routers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.checks import IS_INTERPRETED, MAX_EXPERTS, check_device, check_float, check_rows
from kernels.down import down
from kernels.gate_up import gate_up
from kernels.lists import ExpertLists, group
from kernels.tiles import Card, Tile, Work, choose_tile
from kernels.weights import ExpertMatrix, ExpertWeights


def unsupported_reason(weights: ExpertWeights, device: torch.device) -> str | None:
    """Why these weights cannot be run on this device, in words; None if they can."""
    if weights.num_experts > MAX_EXPERTS:
        return f"{weights.num_experts} experts are more than the {MAX_EXPERTS} that a program holds"
    if IS_INTERPRETED:
        return None
    if device.type != "cuda":
        return f"{device.type} has no Triton kernels"
    capability = torch.cuda.get_device_capability(device)
    formats = {weights.gate_up.values.dtype, weights.down.values.dtype}
    if capability < (8, 0):
        return f"compute capability {capability[0]}.{capability[1]} is below 8.0"
    if torch.float8_e4m3fn in formats and capability < (8, 9):
        return f"compute capability {capability[0]}.{capability[1]} has no fp8: it comes with 8.9"
    return None


def moe_experts(
    x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, weights: ExpertWeights, lists: ExpertLists | None = None
) -> Tensor:
    """out_t = sum_k weights[t, k] FFN_{ids[t, k]}(x_t), [T, D] in x's dtype; a weight of 0 touches no expert.

    x [T, D], ids int64 and weights [T, K]; T at most 64. `lists`: those of the plan, where they are made already.
    ValueError for anything else, before a launch.
    """
    check_rows(ids_TK, weights_TK, weights.num_experts)
    _check_x(x_TD, ids_TK, weights)
    x_TD = x_TD.contiguous()
    gate_tile, down_tile = tiles_for(x_TD, ids_TK.shape[1], weights, Card.of(x_TD.device))
    lists = lists or group(ids_TK, weights_TK, weights.num_experts)
    return down(gate_up(x_TD, lists, weights, gate_tile), lists, weights, down_tile)


def tiles_for(x_TD: Tensor, top_k: int, weights: ExpertWeights, card: Card) -> tuple[Tile, Tile]:
    """The tiles of gate_up and of down."""
    gate_up_work, down_work = works_for(x_TD, top_k, weights)
    return choose_tile(gate_up_work, card), choose_tile(down_work, card)


def works_for(x_TD: Tensor, top_k: int, weights: ExpertWeights) -> tuple[Work, Work]:
    """What decides the tiles of gate_up and of down."""

    def work(kernel: str, matrix: ExpertMatrix) -> Work:
        return Work(
            kernel=kernel,
            num_outputs=matrix.values.shape[1],
            num_inputs=matrix.num_inputs,
            num_lists=min(weights.num_experts, len(x_TD) * top_k),
            rows=len(x_TD),
            element_bytes=0.5 if matrix.is_int4 else matrix.values.element_size(),
            input_bytes=x_TD.element_size(),
            scale_columns=matrix.block[1],
        )

    return work("gate_up", weights.gate_up), work("down", weights.down)


def _check_x(x_TD: Tensor, ids_TK: Tensor, weights: ExpertWeights) -> None:
    if x_TD.shape != (len(ids_TK), weights.hidden_size):
        raise ValueError(f"x {tuple(x_TD.shape)} is not [{len(ids_TK)}, {weights.hidden_size}], rows by hidden size.")
    check_float("x", x_TD.dtype)
    for name, matrix in (("gate_up", weights.gate_up), ("down", weights.down)):
        if matrix.scale is None and matrix.values.dtype != x_TD.dtype:
            raise ValueError(f"{name} of {matrix.values.dtype} is not of x's type, {x_TD.dtype}.")
    check_device(ids=ids_TK, x=x_TD, **weights.tensors)
