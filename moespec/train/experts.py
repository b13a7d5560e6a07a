"""The experts of a layer for training on a CPU: one expert at a time, forward and backward, in the processor's cache.

Owns that one differentiable function, and which of the two a device trains with. Knows nothing of routers or losses.

`grouped_mm` gathers every (token, slot) row at full width, multiplies it by its weight and adds it up again, and its
gradient does all that twice: of a step of 4,096 tokens of the embedded target that was 1.3 s of 4.0 (2 cores, fp32).
Here the weight is applied to the narrow hidden row, rows are gathered per expert, and a row's K results are summed in
one pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from moespec.hf import ALL_EXPERTS_FUNCTIONS
from moespec.train.grouped_experts import grouped_experts, sum_of_slots
from moespec.train.precision import has_fast_bf16

NAME, GROUPED_NAME = "moespec-train-cpu", "moespec-train-grouped"


class _Experts(torch.autograd.Function):
    """out_t = sum_k w_tk * Down_e (silu(Gate_e x_t) * Up_e x_t), e = ids[t, k]."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, up_EXD: Tensor, down_EDI: Tensor) -> Tensor:
        order_N = ids_TK.flatten().argsort(stable=True)  # N = T * K (token, slot) pairs, sorted by expert
        rows_N = order_N // ids_TK.shape[1]
        weights_N = weights_TK.flatten()[order_N]
        counts = torch.bincount(ids_TK.flatten(), minlength=len(up_EXD)).tolist()
        hidden_NX = x_TD.new_empty(len(order_N), up_EXD.shape[1])
        out_ND = x_TD.new_empty(len(order_N), x_TD.shape[1])
        for expert, span in _spans(counts):
            torch.mm(x_TD.index_select(0, rows_N[span]), up_EXD[expert].T, out=hidden_NX[span])
            gate_nI, value_nI = hidden_NX[span].chunk(2, dim=-1)
            torch.mm(F.silu(gate_nI) * value_nI * weights_N[span, None], down_EDI[expert].T, out=out_ND[span])
        places_TK = torch.empty_like(order_N).scatter_(0, order_N, torch.arange(len(order_N))).view_as(ids_TK)
        ctx.save_for_backward(x_TD, rows_N, weights_N, hidden_NX, places_TK, up_EXD, down_EDI)
        ctx.counts = counts
        return sum_of_slots(out_ND, places_TK)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout_TD: Tensor) -> tuple[Tensor, None, Tensor, Tensor, Tensor]:
        x_TD, rows_N, weights_N, hidden_NX, places_TK, up_EXD, down_EDI = ctx.saved_tensors
        dx_ND = x_TD.new_empty(len(rows_N), x_TD.shape[1])
        dweights_N = torch.empty_like(weights_N)
        dup_EXD, ddown_EDI = torch.zeros_like(up_EXD), torch.zeros_like(down_EDI)
        for expert, span in _spans(ctx.counts):
            gate_nI, value_nI = hidden_NX[span].chunk(2, dim=-1)
            dout_nD, weights_n1 = dout_TD.index_select(0, rows_N[span]), weights_N[span, None]
            silu_nI = F.silu(gate_nI)
            middle_nI = silu_nI * value_nI
            torch.mm(dout_nD.T, middle_nI * weights_n1, out=ddown_EDI[expert])
            dscaled_nI = dout_nD @ down_EDI[expert]
            torch.sum(dscaled_nI * middle_nI, dim=-1, out=dweights_N[span])
            dmiddle_nI = dscaled_nI * weights_n1
            dgate_nI = torch.ops.aten.silu_backward(dmiddle_nI * value_nI, gate_nI)
            dhidden_nX = torch.cat([dgate_nI, dmiddle_nI * silu_nI], dim=-1)
            torch.mm(dhidden_nX.T, x_TD.index_select(0, rows_N[span]), out=dup_EXD[expert])
            torch.mm(dhidden_nX, up_EXD[expert], out=dx_ND[span])
        return sum_of_slots(dx_ND, places_TK), None, dweights_N[places_TK], dup_EXD, ddown_EDI


def _spans(counts: list[int]) -> Iterator[tuple[int, slice]]:
    """Each used expert and where its pairs lie among the sorted ones."""
    start = 0
    for expert, count in enumerate(counts):
        if count:
            yield expert, slice(start, start + count)
        start += count


def _train_cpu_experts(experts: Any, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
    return _Experts.apply(x_TD, ids_TK, weights_TK, experts.gate_up_proj, experts.down_proj)


def use_training_experts(model: Any, device: str) -> None:
    """The fastest differentiable experts: one by one for fp32 on a CPU, else grouped products."""
    one_by_one = torch.device(device).type == "cpu" and not has_fast_bf16(device)
    ALL_EXPERTS_FUNCTIONS.register(NAME, _train_cpu_experts)
    ALL_EXPERTS_FUNCTIONS.register(GROUPED_NAME, grouped_experts)
    model.set_experts_implementation(NAME if one_by_one else GROUPED_NAME)
