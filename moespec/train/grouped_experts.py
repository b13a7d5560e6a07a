"""The experts of a layer for training on a GPU: products grouped by expert over sorted rows, and nothing waits.

Owns that one differentiable function. Knows nothing of routers, of losses, or of when it is used.

As in `experts.py` the weight is applied to the narrow hidden row and a row's K results are summed in one pass. A row's
gradient is such a sum too, and a sum's gradient is such a gather: autograd would sort and add atomically instead. The
host learns no count, so that it queues whole steps ahead.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def sum_of_slots(values_ND: Tensor, places_TK: Tensor) -> Tensor:
    """[T, D]: for each token the sum of its K rows, in one pass and without a copy of them in token order."""
    return F.embedding_bag(places_TK, values_ND, mode="sum")


class _Gather(torch.autograd.Function):
    """The tokens' rows in the order of the experts, [N, D]."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, rows_N: Tensor, places_TK: Tensor) -> Tensor:
        ctx.save_for_backward(places_TK)
        return x_TD[rows_N]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dx_ND: Tensor) -> tuple[Tensor, None, None]:
        (places_TK,) = ctx.saved_tensors
        return sum_of_slots(dx_ND, places_TK), None, None


class _Sum(torch.autograd.Function):
    """The sum of each token's results, [T, D]."""

    @staticmethod
    def forward(ctx: Any, out_ND: Tensor, rows_N: Tensor, places_TK: Tensor) -> Tensor:
        ctx.save_for_backward(rows_N)
        return sum_of_slots(out_ND, places_TK)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout_TD: Tensor) -> tuple[Tensor, None, None]:
        (rows_N,) = ctx.saved_tensors
        return dout_TD[rows_N], None, None


def grouped_experts(experts: Any, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """out_t = sum_k w_tk * Down_e (silu(Gate_e x_t) * Up_e x_t), e = ids[t, k]; in autocast's dtype where it is on."""
    kind = x_TD.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x_TD.dtype
    up_EXD, down_EDI = experts.gate_up_proj.to(dtype), experts.down_proj.to(dtype)
    sorted_N, order_N = ids_TK.flatten().sort(stable=True)  # N = T * K (token, slot) pairs, sorted by expert
    rows_N = order_N // ids_TK.shape[1]
    numbers_N = torch.arange(len(order_N), device=order_N.device)
    places_TK = torch.empty_like(order_N).scatter_(0, order_N, numbers_N).view_as(ids_TK)
    ends_E = torch.searchsorted(sorted_N, torch.arange(len(up_EXD), device=order_N.device), right=True).int()
    x_ND = _Gather.apply(x_TD.to(dtype), rows_N, places_TK)
    gate_NI, value_NI = F.grouped_mm(x_ND, up_EXD.transpose(-2, -1), offs=ends_E).chunk(2, dim=-1)
    weights_N1 = weights_TK.to(dtype).flatten().gather(0, order_N)[:, None]
    middle_NI = F.silu(gate_NI) * value_NI * weights_N1
    out_ND = F.grouped_mm(middle_NI, down_EDI.transpose(-2, -1), offs=ends_E)
    return _Sum.apply(out_ND, rows_N, places_TK).to(x_TD.dtype)
