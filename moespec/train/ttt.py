"""The training-time test of EAGLE-3: what a head learns from, and its loss over several unrolled steps.

Owns the loss and the frozen target. The head's unrolled forward is `drafters/head.py`'s, the loop `train/drafter.py`'s.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moespec.drafters.head import Eagle3Head
from moespec.train.precision import autocast

STEP_DECAY = 0.8  # weight of unrolled step i: 0.8 ** i


class FrozenTarget:
    """The target in training: features of the tapped layers and logits of a batch of token ids."""

    def __init__(self, model: Any, tap_layers: tuple[int, ...]) -> None:
        self.model = model.requires_grad_(False).eval()
        self._features: dict[int, Tensor] = {}
        self._taps = tap_layers
        for layer in tap_layers:
            model.model.layers[layer].register_forward_pre_hook(self._hook(layer), with_kwargs=True)

    def _hook(self, layer: int) -> Any:
        def hook(module: Any, args: tuple, kwargs: dict) -> None:
            self._features[layer] = args[0] if args else kwargs["hidden_states"]

        return hook

    @torch.no_grad()
    def __call__(self, ids_BS: Tensor) -> tuple[Tensor, Tensor]:
        """(features [B, S, taps * D], logits [B, S, V])"""
        with autocast(ids_BS.device.type):
            logits_BSV = self.model(ids_BS, use_cache=False).logits
        return torch.cat([self._features[layer] for layer in self._taps], dim=-1).float(), logits_BSV.float()


def unrolled_loss(
    head: Eagle3Head, ids_BS: Tensor, features_BSF: Tensor, logits_BSV: Tensor, weights_BS: Tensor, num_steps: int
) -> tuple[Tensor, Tensor]:
    """(loss, top-1 agreement with the target per unrolled step, fp32 [num_steps]), which nobody has waited for yet.

    At step i row t predicts the target's distribution after token t + 1 + i, within the draft vocabulary; `weights_BS`
    weighs the token predicted. Where the target's best token cannot be drafted there is no loss, but a miss.
    """
    best_BS = logits_BSV.argmax(dim=-1)
    ids_V = head.draft_ids()
    targets_BSV = (logits_BSV if ids_V is None else logits_BSV[..., ids_V]).softmax(dim=-1)
    can_draft_BS = torch.ones_like(best_BS, dtype=torch.bool) if head.t2d is None else head.t2d[best_BS]
    total = torch.zeros((), device=ids_BS.device)
    agreement: list[Tensor] = []
    # The pair of row t is (features of t, token t + 1): the last row has no next token.
    for step, draft_BSV in enumerate(head.unrolled(ids_BS[:, 1:], features_BSF[:, :-1], num_steps)):
        num_rows = ids_BS.shape[1] - 2 - step
        log_q = draft_BSV[:, :num_rows].float().log_softmax(dim=-1)
        p = targets_BSV[:, 1 + step : 1 + step + num_rows]
        predicted = slice(1 + step, 1 + step + num_rows)
        counts = weights_BS[:, 2 + step : 2 + step + num_rows]
        weights = counts * can_draft_BS[:, predicted]
        loss = -((p * log_q).sum(dim=-1) * weights).sum() / weights.sum().clamp(min=1)
        total = total + STEP_DECAY**step * loss
        drafted = log_q.argmax(dim=-1) if ids_V is None else ids_V[log_q.argmax(dim=-1)]
        hits = (drafted == best_BS[:, predicted]) & (counts == 1)
        agreement.append(hits.sum() / (counts == 1).sum().clamp(min=1))
    return total, torch.stack(agreement)
