"""The experts function that transformers calls inside a step: only experts with a surviving (row, slot) are read.

Owns the functions on torch's operations and on compiled CPU kernels; `backends.py` chooses. Knows nothing of routers,
budgets or trees: what it sees is ids and weights, and a weight of 0 means that this (row, slot) touches no expert.

Measured on 2 cores, fp32, 64 experts of 256 x 64, 8 layers, ms for 8 / 16 / 32 rows: with 32 experts active, one
product per expert takes 10.1 / 11.9 / 12.0 (on another machine `torch.nn.functional.grouped_mm` was within 5 % of it)
and the compiled kernel 2.0 / 2.4 / 2.7; with 16 experts kept, 5.8 / 6.1 / 7.6 against 1.2 / 1.5 / 2.0.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moespec.native import check_ids, load_kernels, use_threads
from moespec.native.weights import panels, version

MAX_COMPILED_BYTES = 2**20  # of one expert; on larger ones a tuned product is as fast

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
    """Expert-major: an expert's weights come from memory once for all its rows and are never gathered.

    Small experts run in one compiled call per layer; large ones, and all without numba, as one product per expert.
    """

    def __init__(self) -> None:
        # Made once per module: slicing 64 times per layer and step would cost more than the products themselves.
        self._weights: weakref.WeakKeyDictionary[nn.Module, tuple[tuple, _ExpertWeights | PackedExperts]]
        self._weights = weakref.WeakKeyDictionary()

    def __call__(self, experts: Any, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """[T, D] from x [T, D], ids and weights [T, K]. A NaN in an expert with no surviving row stays there."""
        versions = version(experts.gate_up_proj), version(experts.down_proj)
        kept = self._weights.get(experts)
        if kept is None or kept[0] != versions:
            make = PackedExperts if can_compile(experts) else _ExpertWeights
            kept = self._weights[experts] = versions, make(experts)
        return kept[1].run(experts, x_TD, ids_TK, weights_TK)


@dataclass(frozen=True)
class _Pairs:
    """The N surviving (row, slot) pairs, sorted by expert."""

    experts_N: Tensor
    rows_N: Tensor
    weights_N1: Tensor

    @classmethod
    def by_expert(cls, ids_TK: Tensor, weights_TK: Tensor, num_experts: int) -> _Pairs:
        # Dropped pairs sort behind the last expert and are cut off.
        sorted_ids_N, order_N = torch.where(weights_TK == 0, num_experts, ids_TK).flatten().sort(stable=True)
        num_pairs = int(weights_TK.count_nonzero())
        order_N = order_N[:num_pairs]
        return cls(sorted_ids_N[:num_pairs], order_N // ids_TK.shape[1], weights_TK.flatten()[order_N, None])


class _ExpertWeights:
    """One module's expert matrices as lists of [in, out] views, and their biases where it has them."""

    def __init__(self, experts: Any) -> None:
        up, down = experts.gate_up_proj.detach(), experts.down_proj.detach()
        if not experts.is_transposed:
            up, down = up.transpose(1, 2), down.transpose(1, 2)
        self.up_DI, self.down_ID = up.unbind(0), down.unbind(0)
        self.up_bias = experts.gate_up_proj_bias.detach().unbind(0) if experts.has_bias else None
        self.down_bias = experts.down_proj_bias.detach().unbind(0) if experts.has_bias else None

    def up(self, x_ND: Tensor, expert: int) -> Tensor:
        if self.up_bias is not None:
            return torch.addmm(self.up_bias[expert], x_ND, self.up_DI[expert])
        return torch.mm(x_ND, self.up_DI[expert])

    def down(self, hidden_NI: Tensor, expert: int) -> Tensor:
        if self.down_bias is not None:
            return torch.addmm(self.down_bias[expert], hidden_NI, self.down_ID[expert])
        return torch.mm(hidden_NI, self.down_ID[expert])

    def run(self, experts: Any, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """One product per active expert."""
        pairs = _Pairs.by_expert(ids_TK, weights_TK, experts.num_experts)
        if not pairs.rows_N.numel():
            return torch.zeros_like(x_TD)
        counts = torch.bincount(pairs.experts_N, minlength=experts.num_experts).tolist()
        active = [expert for expert, count in enumerate(counts) if count]
        sizes = [counts[expert] for expert in active]
        x_parts = zip(x_TD.index_select(0, pairs.rows_N).split(sizes), active, strict=True)
        hidden_NI = experts._apply_gate(torch.cat([self.up(x_nD, expert) for x_nD, expert in x_parts]))
        parts = zip(hidden_NI.split(sizes), active, strict=True)
        out_ND = torch.cat([self.down(hidden_nI, expert) for hidden_nI, expert in parts])
        out_ND = out_ND * pairs.weights_N1.to(out_ND.dtype)
        return torch.zeros_like(x_TD).index_add_(0, pairs.rows_N, out_ND)


class PackedExperts:
    """The same in one call of a compiled kernel, on a copy of the weights in panels."""

    def __init__(self, experts: Any) -> None:
        self._kernels: Any = load_kernels()
        self.gate_up, self.down = panels(experts.gate_up_proj), panels(experts.down_proj)

    def run(self, experts: Any, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        use_threads()
        x, ids, weights = (part.contiguous().numpy() for part in (x_TD, ids_TK, weights_TK))
        if ids.shape != weights.shape or len(ids) != len(x):
            raise ValueError(f"a policy planned ids {ids.shape} with weights {weights.shape} for {len(x)} rows.")
        check_ids(ids, experts.num_experts)
        return torch.from_numpy(self._kernels.experts.experts(x, ids, weights, self.gate_up, self.down))


def can_compile(experts: Any) -> bool:
    """Small fp32 experts on the CPU, in the plain layout, gated by SiLU."""
    up, down = experts.gate_up_proj, experts.down_proj
    num_bytes = (up[0].numel() + down[0].numel()) * up.element_size()
    is_plain = not experts.is_transposed and not experts.has_bias
    if up.device.type != "cpu" or up.dtype != torch.float32 or not is_plain or num_bytes > MAX_COMPILED_BYTES:
        return False
    probe_1X = torch.linspace(-3, 3, up.shape[1])[None]
    gate_1I, up_1I = probe_1X.chunk(2, dim=-1)
    is_silu = torch.allclose(experts._apply_gate(probe_1X), F.silu(gate_1I) * up_1I)
    return is_silu and load_kernels() is not None
