"""The experts function that transformers calls inside a step: only experts with a surviving (row, slot) are read.

Owns the backends "reference" and "cpu" and the choice between them. Knows nothing of routers, budgets or trees: what
it sees is ids and weights, and a weight of 0 means that this (row, slot) touches no expert.

Measured on 2 cores, fp32, 64 experts of 256 x 64, 8 and 16 rows: the loop below and `torch.nn.functional.grouped_mm`
are within 5 % of each other; for one row the loop is 10 % faster, so it is used throughout.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

# The first argument is a transformers experts module; `unsupported_reason` says which of its attributes are used.
ExpertsFunction = Callable[[Any, Tensor, Tensor, Tensor], Tensor]


def unsupported_reason(experts: Any) -> str | None:
    """Why this module cannot be run by our experts function, in words; None if it can."""
    for name in ("gate_up_proj", "down_proj", "num_experts", "is_transposed", "has_bias", "has_gate"):
        if not hasattr(experts, name):
            return f"its experts module {type(experts).__name__} has no {name}"
    if getattr(experts, "has_post_expert_norm", False):
        return f"its experts module {type(experts).__name__} normalises each expert's output"
    if not experts.has_gate:
        return f"its experts module {type(experts).__name__} has no gate projection"
    return None


def reference_experts(experts: Any, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """out_t = sum_k weights[t, k] * FFN_{ids[t, k]}(x_t), one row and slot at a time. [T, D]. For tests and doubts."""
    weights = _ExpertWeights(experts)
    out_TD = torch.zeros_like(x_TD)
    for row, (ids_K, weights_K) in enumerate(zip(ids_TK.tolist(), weights_TK, strict=True)):
        for expert, weight in zip(ids_K, weights_K, strict=True):
            if weight != 0:
                hidden_1I = weights.up(x_TD[row : row + 1], expert)
                out_TD[row] += weight * weights.down(experts._apply_gate(hidden_1I), expert)[0]
    return out_TD


class CpuExperts:
    """Expert-major: each expert's weights are read once for all its rows; weights are never gathered or copied."""

    def __init__(self) -> None:
        # Views of each expert's matrices, made once per module: slicing 64 times per layer and step would cost more
        # than the products themselves on a small model.
        self._weights: weakref.WeakKeyDictionary[nn.Module, _ExpertWeights] = weakref.WeakKeyDictionary()

    def __call__(self, experts: Any, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """[T, D] from x [T, D], ids and weights [T, K]. A NaN in an expert with no surviving row stays there."""
        weights = self._weights.get(experts)
        if weights is None or not weights.is_current(experts):
            weights = self._weights[experts] = _ExpertWeights(experts)
        if x_TD.shape[0] == 1:
            return _one_row(experts, weights, x_TD, ids_TK[0], weights_TK[0])
        return _many_rows(experts, weights, x_TD, ids_TK, weights_TK)


class _ExpertWeights:
    """One module's expert matrices as lists of [in, out] views, and their biases where it has them."""

    def __init__(self, experts: Any) -> None:
        up, down = experts.gate_up_proj.detach(), experts.down_proj.detach()
        self._storage = (up.data_ptr(), down.data_ptr())
        if not experts.is_transposed:
            up, down = up.transpose(1, 2), down.transpose(1, 2)
        self.up_DI, self.down_ID = up.unbind(0), down.unbind(0)
        self.up_bias = experts.gate_up_proj_bias.detach().unbind(0) if experts.has_bias else None
        self.down_bias = experts.down_proj_bias.detach().unbind(0) if experts.has_bias else None

    def is_current(self, experts: Any) -> bool:
        return self._storage == (experts.gate_up_proj.data_ptr(), experts.down_proj.data_ptr())

    def up(self, x_ND: Tensor, expert: int) -> Tensor:
        if self.up_bias is not None:
            return torch.addmm(self.up_bias[expert], x_ND, self.up_DI[expert])
        return torch.mm(x_ND, self.up_DI[expert])

    def down(self, hidden_NI: Tensor, expert: int) -> Tensor:
        if self.down_bias is not None:
            return torch.addmm(self.down_bias[expert], hidden_NI, self.down_ID[expert])
        return torch.mm(hidden_NI, self.down_ID[expert])


def _one_row(experts: Any, weights: _ExpertWeights, x_1D: Tensor, ids_K: Tensor, weights_K: Tensor) -> Tensor:
    """Single-row steps: K matrix-vector products, no sorting. [1, D]"""
    ids = ids_K.tolist()
    hidden_KI = experts._apply_gate(torch.cat([weights.up(x_1D, expert) for expert in ids]))
    out_KD = torch.cat([weights.down(row, expert) for row, expert in zip(hidden_KI.split(1), ids, strict=True)])
    return (weights_K.to(out_KD.dtype) @ out_KD)[None]


def _many_rows(experts: Any, weights: _ExpertWeights, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """Sort the surviving (row, slot) pairs by expert, run one product per expert, add the pairs back to their rows."""
    num_experts, top_k = experts.num_experts, ids_TK.shape[1]
    # Dropped pairs sort behind the last expert and are cut off.
    pair_ids_N = torch.where(weights_TK == 0, num_experts, ids_TK).flatten()
    sorted_ids_N, order_N = pair_ids_N.sort(stable=True)
    counts = torch.bincount(sorted_ids_N, minlength=num_experts + 1).tolist()
    active = [expert for expert in range(num_experts) if counts[expert]]
    sizes = [counts[expert] for expert in active]
    order_N = order_N[: sum(sizes)]
    if not active:
        return torch.zeros_like(x_TD)
    rows_N = order_N // top_k
    x_parts = x_TD.index_select(0, rows_N).split(sizes)
    hidden_NI = torch.cat([weights.up(x_nD, expert) for x_nD, expert in zip(x_parts, active, strict=True)])
    # The routing weight is applied before the narrower product: fewer numbers to scale, the same sum.
    scaled_NI = experts._apply_gate(hidden_NI)
    pair_weights_N1 = weights_TK.flatten()[order_N, None].to(scaled_NI.dtype)
    if weights.down_bias is None:
        scaled_NI = scaled_NI * pair_weights_N1
    parts = zip(scaled_NI.split(sizes), active, strict=True)
    out_ND = torch.cat([weights.down(hidden_nI, expert) for hidden_nI, expert in parts])
    if weights.down_bias is not None:
        out_ND = out_ND * pair_weights_N1
    return torch.zeros_like(x_TD).index_add_(0, rows_N, out_ND)


def choose_backend(device: torch.device) -> tuple[str, ExpertsFunction, str]:
    """(name, function, reason) of the backend for a device."""
    if device.type == "cpu":
        return "cpu", CpuExperts(), "the model is on the CPU"
    return "grouped-loop", CpuExperts(), f"no kernel for {device.type} yet: one product per kept expert"
