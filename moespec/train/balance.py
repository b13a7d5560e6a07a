"""Router statistics in training: the balance loss, and how concentrated routing is. Knows nothing of optimizers.

Balance is asked for per layer over a whole batch that mixes all domains, with a small coefficient: experts stay
specialised within a sequence, which is what a budget lives on.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn


class RouterTap:
    """Keeps the logits [N, E] that every router produced in the last forward."""

    def __init__(self, model: Any) -> None:
        self.logits: list[Tensor] = []
        self._handles = [layer.mlp.gate.register_forward_hook(self._hook) for layer in model.model.layers]

    def _hook(self, module: nn.Module, args: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
        self.logits.append(output[0])

    def take(self) -> list[Tensor]:
        logits, self.logits = self.logits, []
        return logits

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()


def balance_loss(logits_by_layer: list[Tensor], top_k: int) -> Tensor:
    """Mean over layers of E * sum_e f_e * P_e: f the share of selections, P the mean probability; 1 if uniform."""
    losses = []
    for logits_NE in logits_by_layer:
        probs_NE = logits_NE.float().softmax(dim=-1)
        chosen_NK = probs_NE.topk(top_k, dim=-1).indices
        num_experts = logits_NE.shape[-1]
        # Not bincount, which waits for a GPU to learn the largest number.
        counts_E = torch.zeros(num_experts, device=logits_NE.device)
        counts_E.scatter_add_(0, chosen_NK.flatten(), torch.ones_like(probs_NE).view(-1)[: chosen_NK.numel()])
        share_E = counts_E / chosen_NK.numel()
        losses.append(num_experts * (share_E * probs_NE.mean(dim=0)).sum())
    return torch.stack(losses).mean()


def concentration(logits_by_layer: list[Tensor], top_k: int, window: int = 32) -> dict[str, float]:
    """How unevenly experts are used.

    Medians over layers of the share of natural top-k weight inside the top 16 / 24 / 32 experts of `window` tokens,
    and of the entropy of all the weight as a share of its maximum; dead experts are counted over all layers.
    """
    figures: dict[str, float] = {}
    dead, entropies = 0, []
    shares: dict[int, list[Tensor]] = {16: [], 24: [], 32: []}
    for logits_NE in logits_by_layer:
        top = logits_NE.float().softmax(dim=-1).topk(top_k, dim=-1)
        weights_NK = top.values / top.values.sum(dim=-1, keepdim=True)
        dense_NE = torch.zeros_like(logits_NE, dtype=torch.float32).scatter_(1, top.indices, weights_NK)
        usage_E = dense_NE.sum(dim=0) / len(dense_NE)
        dead += int((usage_E == 0).sum())
        entropies.append(torch.special.entr(usage_E).sum() / math.log(len(usage_E)))
        windows_WE = dense_NE[: len(dense_NE) // window * window].view(-1, window, dense_NE.shape[1]).sum(dim=1)
        ordered_WE = windows_WE.sort(dim=-1, descending=True).values
        for size, values in shares.items():
            values.append((ordered_WE[:, :size].sum(dim=-1) / window).mean())
    for size, values in shares.items():
        figures[f"natural_weight_top{size}"] = round(float(torch.stack(values).median()), 4)
    figures["usage_entropy"] = round(float(torch.stack(entropies).median()), 4)
    figures["dead_experts"] = dead
    return figures
