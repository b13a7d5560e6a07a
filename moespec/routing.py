"""The router tap: from a router module's output to RouterScores, through a policy, to what the experts see.

Owns what a router family is: how logits become scores, how experts are chosen by them, how the chosen are weighed.
Which family a router is of is found by `router_families.py`. Knows nothing of budgets or trees.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from moespec.types import RouterScores


class RouterOutput(NamedTuple):
    """What a router returns: logits [T, E], weights [T, K], ids [T, K]; and its probabilities where they are known."""

    logits_TE: Tensor
    weights_TK: Tensor
    ids_TK: Tensor
    probs_TE: Tensor | None = None


# What routers make of their logits, fp32 [T, E] to [T, E]. "given": what the router returns are its probabilities.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "given": lambda logits_TE: logits_TE,
    "softmax": lambda logits_TE: logits_TE.softmax(dim=-1),
    "sigmoid": torch.sigmoid,
    "sqrt-softplus": lambda logits_TE: F.softplus(logits_TE).sqrt(),
}


class Weighing(Enum):
    """How the scores of the chosen become their routing weights."""

    AS_THEY_ARE = "top-k"
    RENORMALISED = "top-k, renormalised"
    SOFTMAX_OF_CHOSEN = "top-k, softmax"
    SPARSE_MIXER = "sparse mixer"  # arXiv 2409.12136: each softmax leaves out what lies far below its chosen expert


@dataclass(frozen=True)
class Groups:
    """Experts in equal groups, of which each row may use a few: those whose best `num_best` scores add up to most.

    Experts of the other groups are ranked as `excluded`: minus infinity, or 0 in some families.
    """

    num_groups: int
    num_kept: int
    num_best: int
    excluded: float

    def confine(self, ranked_TE: Tensor) -> Tensor:
        """Ranks [T, E] inside the groups of each row. Experts at minus infinity are none: they add nothing to a group
        and stay where they are."""
        grouped_TGN = ranked_TE.unflatten(-1, (self.num_groups, -1))
        best_TGN = grouped_TGN.topk(min(self.num_best, grouped_TGN.shape[-1]), dim=-1).values
        score_TG = best_TGN.where(best_TGN > -torch.inf, 0.0).sum(dim=-1)
        score_TG = score_TG.masked_fill(best_TGN[..., 0] == -torch.inf, -torch.inf)
        kept_TG = torch.zeros_like(score_TG, dtype=torch.bool)
        kept_TG.scatter_(1, score_TG.topk(self.num_kept, dim=-1).indices, True)
        outside_TE = ~kept_TG.repeat_interleave(grouped_TGN.shape[-1], dim=-1) & (ranked_TE > -torch.inf)
        return ranked_TE.masked_fill(outside_TE, self.excluded)


@dataclass(frozen=True, eq=False)
class RouterFamily:
    """How one router ranks experts and makes routing weights of the chosen.

    bias_E        added to the scores (to the logits if `biases_logits`) where experts are ranked, not where weighed
    scale         what every routing weight is multiplied by; `scale_E` by expert
    threshold     of the sparse mixer: how far below the chosen, relative to the larger of the two, still counts
    """

    name: str
    activation: str
    weighing: Weighing
    bias_E: Tensor | None = None
    biases_logits: bool = False
    groups: Groups | None = None
    scale: float = 1.0
    scale_E: Tensor | None = None
    threshold: float = 0.0

    def scores(self, logits_TE: Tensor) -> Tensor:
        """fp32 [T, E], what the router makes of its logits; its rows need not sum to 1."""
        return ACTIVATIONS[self.activation](logits_TE.float())

    def probabilities(self, logits_TE: Tensor) -> Tensor:
        """fp32 [T, E]: the scores, each row normalised to 1; without any bias."""
        scores_TE = self.scores(logits_TE)
        return scores_TE if self.activation == "softmax" else scores_TE / scores_TE.sum(dim=-1, keepdim=True)

    def softmax_logits(self, logits_TE: Tensor) -> Tensor:
        """[T, E], of which the softmax is `probabilities`: of most routers their logits."""
        return logits_TE if self.activation == "softmax" else self.probabilities(logits_TE).log()

    def selection(self, logits_TE: Tensor, probs_TE: Tensor, kept_E: Tensor | None = None) -> Tensor:
        """What each row's top-k is taken of, [T, E]; minus infinity outside the shortlist and the row's groups."""
        ranks_logits = self.biases_logits or self.weighing in (Weighing.SOFTMAX_OF_CHOSEN, Weighing.SPARSE_MIXER)
        ranked_TE = logits_TE.float() if ranks_logits else self._scores(logits_TE, probs_TE)
        if self.bias_E is not None:
            ranked_TE = ranked_TE + self.bias_E.float()
        if kept_E is not None:
            ranked_TE = ranked_TE.masked_fill(~kept_E, -torch.inf)
        return ranked_TE if self.groups is None else self.groups.confine(ranked_TE)

    def weights(self, logits_TE: Tensor, probs_TE: Tensor, ids_TK: Tensor, survives_TK: Tensor | None) -> Tensor:
        """Routing weights fp32 [T, K] of the chosen: 0 where `survives_TK` is False, normalised over the survivors
        where the family normalises."""
        if self.weighing is Weighing.SPARSE_MIXER:
            weights_TK = _sparse_mixer_weights(logits_TE.float(), ids_TK, self.threshold)
        elif self.weighing is Weighing.SOFTMAX_OF_CHOSEN:
            chosen_TK = logits_TE.gather(1, ids_TK).float()
            if survives_TK is not None:
                chosen_TK = chosen_TK.masked_fill(~survives_TK, -torch.inf)
            weights_TK = chosen_TK.softmax(dim=-1).nan_to_num(0.0)  # a row without survivors
        else:
            weights_TK = self._scores(logits_TE, probs_TE).gather(1, ids_TK)
        if survives_TK is not None:
            weights_TK = weights_TK * survives_TK
        if self.weighing is Weighing.RENORMALISED:
            # The clamp makes a row whose every expert was dropped an exact zero, not NaN.
            weights_TK = weights_TK / weights_TK.sum(dim=-1, keepdim=True).clamp(min=1e-9)
        if self.scale_E is not None:
            weights_TK = weights_TK * self.scale_E.float()[ids_TK]
        return weights_TK if self.scale == 1 else weights_TK * self.scale

    def _scores(self, logits_TE: Tensor, probs_TE: Tensor) -> Tensor:
        return probs_TE if self.activation == "softmax" else self.scores(logits_TE)


def _sparse_mixer_weights(logits_TE: Tensor, ids_TK: Tensor, threshold: float) -> Tensor:
    """Each chosen expert's share of a softmax over those that no earlier slot took, none above it, none far below."""
    left_TE, weights = torch.ones_like(logits_TE, dtype=torch.bool), []
    for ids_T1 in ids_TK.split(1, dim=1):
        own_T1 = logits_TE.gather(1, ids_T1)
        far_TE = (own_T1 - logits_TE) / logits_TE.abs().maximum(own_T1) > threshold
        counted_TE = left_TE & (logits_TE <= own_T1) & ~far_TE
        shares_TE = logits_TE.masked_fill(~counted_TE, -torch.inf).softmax(dim=-1)
        weights.append(shares_TE.gather(1, ids_T1))
        left_TE = left_TE.scatter(1, ids_T1, False)
    return torch.cat(weights, dim=1)


# The families without bias, groups or scale: those that the compiled kernels know, in their order.
FAMILIES = (
    RouterFamily("softmax, top-k, renormalised", "softmax", Weighing.RENORMALISED),
    RouterFamily("softmax, top-k", "softmax", Weighing.AS_THEY_ARE),
    RouterFamily("top-k, softmax", "softmax", Weighing.SOFTMAX_OF_CHOSEN),
)


def router_scores(family: RouterFamily, output: RouterOutput) -> RouterScores:
    """RouterScores of a router's output."""
    return RouterScores(
        logits_TE=output.logits_TE,
        probs_TE=family.probabilities(output.logits_TE) if output.probs_TE is None else output.probs_TE,
        natural_ids_TK=output.ids_TK,
        natural_weights_TK=output.weights_TK,
        family=family,
    )
