"""What each kernel computes, written plainly in torch: for tests and benchmarks. Any device, any float type.

Called with fp64 tensors these are the golden values; with the model's type, what plain torch would make of it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.select import Rule
from kernels.weights import ExpertWeights, dequantized


def experts(x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, weights: ExpertWeights) -> Tensor:
    """out_t = sum_k weights[t, k] FFN_{ids[t, k]}(x_t), [T, D], one expert at a time, in x's dtype."""
    out_TD = torch.zeros_like(x_TD)
    for expert in ids_TK[weights_TK != 0].unique().tolist():
        rows_N, slots_N = ((ids_TK == expert) & (weights_TK != 0)).nonzero(as_tuple=True)
        gate_up, down = (
            dequantized(matrix.of_expert(expert), x_TD.dtype)[0] for matrix in (weights.gate_up, weights.down)
        )
        hidden_NX = x_TD[rows_N] @ gate_up.T
        if weights.gate_up.bias is not None:
            hidden_NX = hidden_NX + weights.gate_up.bias[expert].to(x_TD.dtype)
        parts = (hidden_NX[:, ::2], hidden_NX[:, 1::2]) if weights.interleaved else hidden_NX.chunk(2, dim=1)
        out_ND = weights.gate(*parts) @ down.T
        if weights.down.bias is not None:
            out_ND = out_ND + weights.down.bias[expert].to(x_TD.dtype)
        out_TD.index_add_(0, rows_N, out_ND * weights_TK[rows_N, slots_N, None].to(x_TD.dtype))
    return out_TD


def lists(ids_TK: Tensor, weights_TK: Tensor) -> dict[int, list[int]]:
    """Expert to its surviving pairs row * K + slot, both increasing."""
    found: dict[int, list[int]] = {}
    for pair, (expert, weight) in enumerate(zip(ids_TK.flatten().tolist(), weights_TK.flatten().tolist(), strict=True)):
        if weight != 0:
            found.setdefault(expert, []).append(pair)
    return dict(sorted(found.items()))


def select(
    logits_TE: Tensor,
    row_weights_T: Tensor,
    top_k: int,
    rule: Rule,
    *,
    budget: int | None = None,
    coverage: float = 0.0,
    truncates: bool = False,
    natural: bool = False,
    protect_root: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(natural ids, natural weights, ids, weights [T, K], kept bool [E]) of the rows of a tree, all of them valid."""
    num_experts = logits_TE.shape[1]
    probs_TE = logits_TE.softmax(dim=-1)
    natural_ids_TK = _best(logits_TE, top_k)
    natural_weights_TK = _weights(
        logits_TE, probs_TE, natural_ids_TK, torch.ones_like(natural_ids_TK, dtype=torch.bool), rule
    )
    mass_TE = probs_TE
    if natural:
        mass_TE = torch.zeros_like(probs_TE).scatter(1, natural_ids_TK, natural_weights_TK)
    score_E = row_weights_T.to(mass_TE.dtype) @ mass_TE
    is_root_E = torch.zeros(num_experts, dtype=torch.bool, device=logits_TE.device)
    if protect_root:
        is_root_E[natural_ids_TK[0]] = True
    if coverage:
        order = _best(score_E[None], num_experts)[0]
        before = score_E[order].cumsum(0) - score_E[order]
        kept_E = is_root_E.clone()
        kept_E[
            order[(before < coverage * score_E.sum()) | (torch.arange(num_experts, device=order.device) < top_k)]
        ] = True
    elif budget is None or budget >= num_experts:
        return natural_ids_TK, natural_weights_TK, natural_ids_TK, natural_weights_TK, torch.ones_like(is_root_E)
    else:
        ranked_E = score_E.masked_fill(is_root_E, torch.inf)
        kept_E = torch.zeros_like(is_root_E)
        kept_E[_best(ranked_E[None], max(budget, top_k))[0]] = True
    if truncates:
        ids_TK, survives_TK = natural_ids_TK, kept_E[natural_ids_TK]
    else:
        ids_TK = _best(logits_TE.masked_fill(~kept_E, -torch.inf), top_k)
        survives_TK = torch.ones_like(ids_TK, dtype=torch.bool)
    return natural_ids_TK, natural_weights_TK, ids_TK, _weights(logits_TE, probs_TE, ids_TK, survives_TK, rule), kept_E


def _best(values_TE: Tensor, num_best: int) -> Tensor:
    """Where each row's largest values lie, best first, ties to the lower id."""
    return values_TE.sort(dim=-1, descending=True, stable=True).indices[:, :num_best]


def _weights(logits_TE: Tensor, probs_TE: Tensor, ids_TK: Tensor, survives_TK: Tensor, rule: Rule) -> Tensor:
    if rule is Rule.SOFTMAX_OF_CHOSEN:
        return logits_TE.gather(1, ids_TK).masked_fill(~survives_TK, -torch.inf).softmax(dim=-1).nan_to_num(0.0)
    weights_TK = probs_TE.gather(1, ids_TK) * survives_TK
    return weights_TK if rule is Rule.SOFTMAX else weights_TK / weights_TK.sum(dim=-1, keepdim=True).clamp(min=1e-9)
