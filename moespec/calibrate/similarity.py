"""How alike two experts of a layer are, by their outputs on the same rows: the measures of SERE (arXiv 2602.07616).

All experts run on all rows, whatever the router says; rows are the layer's inputs in the unmodified forward. Sums over
rows are taken block by block, so that no more than two blocks of outputs [E, T, D] are in memory. Knows nothing of
texts or files. Letters: N rows in all, T rows of a block, E experts, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moespec.target import Target

BLOCK_ROWS = 128

AllExperts = Callable[[Tensor], Tensor]  # x [T, D] -> outputs [E, T, D]


@torch.inference_mode()
def similarities(run: AllExperts, x_ND: Tensor) -> dict[str, Tensor]:
    """Each of `profiles.MEASURES`, fp64 [E, E], of the experts' outputs A_e [N, D].

    frobenius   1 - ||A_i - A_j|| / max_pq ||A_p - A_q||
    cosine      (mean over rows of cos(A_i[t], A_j[t]) + 1) / 2
    cka         ||X_j^T X_i||^2 / (||X_i^T X_i|| ||X_j^T X_j||), X centred over rows: linear CKA

    ||X_j^T X_i||^2 is <K_i, K_j> with K_i = X_i X_i^T [N, N], which needs no D x D matrix per pair of experts; its
    blocks are made as they are needed, which takes time quadratic in N.
    """
    blocks = x_ND.split(BLOCK_ROWS)
    mean_E1D = torch.stack([run(x_TD).sum(dim=1, keepdim=True) for x_TD in blocks]).sum(dim=0) / len(x_ND)
    gram_EE, cosine_EE, kernel_EE = torch.zeros(3, len(mean_E1D), len(mean_E1D), dtype=torch.float64)
    for number, x_TD in enumerate(blocks):
        outputs_ETD = run(x_TD)
        gram_EE += _inner_products(outputs_ETD)
        cosine_EE += _inner_products(F.normalize(outputs_ETD, dim=-1))
        for other_SD in blocks[number:]:
            kernel_ETS = (outputs_ETD - mean_E1D) @ (run(other_SD) - mean_E1D).transpose(1, 2)
            # Blocks below the diagonal mirror those above.
            kernel_EE += _inner_products(kernel_ETS) * (1 if other_SD is x_TD else 2)
    squares_E, norms_E = gram_EE.diagonal(), kernel_EE.diagonal().sqrt()
    distance_EE = (squares_E[:, None] + squares_E - 2 * gram_EE).clamp(min=0).sqrt().fill_diagonal_(0)
    measures = {
        "frobenius": 1 - distance_EE / distance_EE.max(),
        "cosine": (cosine_EE / len(x_ND) + 1) / 2,
        "cka": (kernel_EE / (norms_E[:, None] * norms_E)).clamp(0, 1),
    }
    return {name: measure_EE.fill_diagonal_(1) for name, measure_EE in measures.items()}


def _inner_products(parts_EXX: Tensor) -> Tensor:
    """<part_i, part_j> summed over all entries, fp64 [E, E] on the host."""
    flat_EX = parts_EXX.flatten(1)
    return (flat_EX @ flat_EX.T).double().cpu()


def all_experts(target: Target, experts: Any) -> AllExperts:
    """One module's experts as one call of the target's backend: every row once for each of them."""

    def run(x_TD: Tensor) -> Tensor:
        num_experts, num_rows = target.num_experts, len(x_TD)
        ids_N1 = torch.arange(num_experts, device=x_TD.device).repeat_interleave(num_rows)[:, None]
        weights_N1 = torch.ones_like(ids_N1, dtype=x_TD.dtype)
        outputs_ND = target.backend(experts, x_TD.repeat(num_experts, 1), ids_N1, weights_N1)
        return outputs_ND.view(num_experts, num_rows, -1).float()

    return run


@torch.inference_mode()
def expert_inputs(target: Target, texts: list[list[int]]) -> list[Tensor]:
    """What the experts of each MoE layer are given, [N, D], while transformers' own forward reads the texts."""
    inputs: list[list[Tensor]] = [[] for _ in target.moe_layers]

    def keep(number: int) -> Callable:
        return lambda module, args: inputs[number].append(args[0].flatten(0, -2))

    handles = [moe.experts.register_forward_pre_hook(keep(n)) for n, moe in enumerate(target.moe_layers)]
    try:
        for token_ids in texts:
            target.model(torch.tensor([token_ids], device=target.device), use_cache=False, logits_to_keep=1)
    finally:
        for handle in handles:
            handle.remove()
    return [torch.cat(rows) for rows in inputs]
