"""The experts function that transformers calls inside a step: only experts with a surviving (row, slot) are read.

Owns the backends "reference" and "cpu" and the choice between them. Knows nothing of routers, budgets or trees: what
it sees is ids and weights, and a weight of 0 means that this (row, slot) touches no expert.

Measured on 2 cores, fp32, 64 experts of 256 x 64, 8 layers, ms for 1 / 8 / 16 rows: one product per expert
2.2 / 7.6 / 10.0 (`torch.nn.functional.grouped_mm` within 5 % of it), weighted row sums 0.9 / 2.6 / 3.7, and with 16
experts kept 5.7 / 5.9 against 2.1 / 2.8 for 8 / 16 rows.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

MAX_CACHED_BYTES = 512 * 1024  # of one expert; half of a small core's second-level cache
MAX_SUMMED_ROWS = 64  # from about 100 rows on (a prefill), one product per expert is faster again

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

    Two ways to multiply: experts that fit a core's cache as weighted row sums, where a step has few rows; one product
    per expert otherwise.
    """

    def __init__(self) -> None:
        # Made once per module: slicing 64 times per layer and step would cost more than the products themselves.
        self._weights: weakref.WeakKeyDictionary[nn.Module, _ExpertWeights] = weakref.WeakKeyDictionary()

    def __call__(self, experts: Any, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """[T, D] from x [T, D], ids and weights [T, K]. A NaN in an expert with no surviving row stays there."""
        weights = self._weights.get(experts)
        if weights is None or not weights.is_current(experts):
            make = _ExpertTables if _fits_cache(experts) else _ExpertWeights
            weights = self._weights[experts] = make(experts)
        pairs = _Pairs.by_expert(ids_TK, weights_TK, experts.num_experts)
        if not pairs.rows_N.numel():
            return torch.zeros_like(x_TD)
        x_ND = x_TD.index_select(0, pairs.rows_N)
        if isinstance(weights, _ExpertTables) and x_TD.shape[0] <= MAX_SUMMED_ROWS:
            out_ND = weights.row_sums(experts, x_ND, pairs)
        else:
            out_ND = weights.products(experts, x_ND, pairs)
        return torch.zeros_like(x_TD).index_add_(0, pairs.rows_N, out_ND)


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

    def products(self, experts: Any, x_ND: Tensor, pairs: _Pairs) -> Tensor:
        """[N, D]: each pair's weighted output, one product per active expert."""
        counts = torch.bincount(pairs.experts_N, minlength=experts.num_experts).tolist()
        active = [expert for expert, count in enumerate(counts) if count]
        sizes = [counts[expert] for expert in active]
        x_parts = zip(x_ND.split(sizes), active, strict=True)
        hidden_NI = experts._apply_gate(torch.cat([self.up(x_nD, expert) for x_nD, expert in x_parts]))
        parts = zip(hidden_NI.split(sizes), active, strict=True)
        out_ND = torch.cat([self.down(hidden_nI, expert) for hidden_nI, expert in parts])
        return out_ND * pairs.weights_N1.to(out_ND.dtype)


class _ExpertTables(_ExpertWeights):
    """A second copy of small experts as tables of [in, out] rows, so that x W is a weighted sum of table rows.

    One `embedding_bag` call takes all pairs of a layer through its threads, where a product of three rows with a small
    matrix is mostly the cost of calling it. Pairs come sorted by expert, so its rows are still cached for the next.
    """

    def __init__(self, experts: Any) -> None:
        super().__init__(experts)
        self._up_XI = torch.cat(self.up_DI).contiguous()
        self._down_XD = torch.cat(self.down_ID).contiguous()
        self._up_rows_ED, self._down_rows_EI = (
            torch.arange(len(table), dtype=torch.int32).view(experts.num_experts, -1)
            for table in (self._up_XI, self._down_XD)
        )

    def row_sums(self, experts: Any, x_ND: Tensor, pairs: _Pairs) -> Tensor:
        """The same as `products`."""
        hidden_NI = experts._apply_gate(_row_sums(self._up_XI, self._up_rows_ED, pairs.experts_N, x_ND))
        # Weighted before the narrower product: fewer numbers to scale, the same sum.
        scaled_NI = hidden_NI * pairs.weights_N1.to(hidden_NI.dtype)
        return _row_sums(self._down_XD, self._down_rows_EI, pairs.experts_N, scaled_NI)


def _row_sums(table_XO: Tensor, rows_EI: Tensor, experts_N: Tensor, weights_NI: Tensor) -> Tensor:
    """[N, O]: sum_i weights[n, i] * table[rows[experts[n], i]]."""
    num_pairs, num_summed = weights_NI.shape
    starts_N = torch.arange(0, num_pairs * num_summed, num_summed, dtype=torch.int32)
    rows = rows_EI.index_select(0, experts_N).view(-1)
    # mode 0 is the sum; without `F.embedding_bag`'s checks, which take as long as the sum for a single row
    return torch.embedding_bag(table_XO, rows, starts_N, False, 0, False, weights_NI.reshape(-1))[0]


def _fits_cache(experts: Any) -> bool:
    """Whether weighted row sums pay: fp32 on x86, where torch has a fast kernel for them, and small experts."""
    up = experts.gate_up_proj
    num_bytes = (up[0].numel() + experts.down_proj[0].numel()) * up.element_size()
    fast = up.dtype == torch.float32 and "fbgemm" in torch.backends.quantized.supported_engines
    return fast and up.device.type == "cpu" and not experts.has_bias and num_bytes <= MAX_CACHED_BYTES


def choose_backend(device: torch.device) -> tuple[str, ExpertsFunction, str]:
    """(name, function, reason) of the backend for a device."""
    if device.type == "cpu":
        return "cpu", CpuExperts(), "the model is on the CPU"
    return "grouped-loop", CpuExperts(), f"no kernel for {device.type} yet: one product per kept expert"
