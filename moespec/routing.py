"""The router tap: from a router module's output to RouterScores, through a policy, to what the experts see.

Owns the table of router families: how each turns logits into weights. A family is recognised by what the router
computes on a probe, not by its class name. Knows nothing of budgets or trees.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from moespec.types import RouterScores

NUM_PROBE_ROWS = 16


class RouterOutput(NamedTuple):
    """What a router returns: logits [T, E], weights [T, K], ids [T, K]; and its probabilities where they are known."""

    logits_TE: Tensor
    weights_TK: Tensor
    ids_TK: Tensor
    probs_TE: Tensor | None = None


@dataclass(frozen=True)
class RouterFamily:
    """How one family makes routing weights of the experts selected.

    selection(logits_TE, probs_TE) ranks experts; weights(logits_TE, probs_TE, ids_TK, survives_TK) -> [T, K] fp32
    gives the family's own weights of the selected, 0 where `survives_TK` is False, normalised over the survivors where
    the family normalises.
    """

    name: str
    selection: Callable[[Tensor, Tensor], Tensor]
    weights: Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


def _softmax_weights(logits_TE: Tensor, probs_TE: Tensor, ids_TK: Tensor, survives_TK: Tensor | None) -> Tensor:
    weights_TK = probs_TE.gather(1, ids_TK)
    return weights_TK if survives_TK is None else weights_TK * survives_TK


def _normalised_softmax_weights(
    logits_TE: Tensor, probs_TE: Tensor, ids_TK: Tensor, survives_TK: Tensor | None
) -> Tensor:
    weights_TK = _softmax_weights(logits_TE, probs_TE, ids_TK, survives_TK)
    # The clamp makes a row whose every expert was dropped an exact zero, not NaN.
    return weights_TK / weights_TK.sum(dim=-1, keepdim=True).clamp(min=1e-9)


def _softmax_of_selected_weights(
    logits_TE: Tensor, probs_TE: Tensor, ids_TK: Tensor, survives_TK: Tensor | None
) -> Tensor:
    selected_TK = logits_TE.gather(1, ids_TK).float()
    if survives_TK is None:
        return selected_TK.softmax(dim=-1)
    return selected_TK.masked_fill(~survives_TK, -torch.inf).softmax(dim=-1).nan_to_num(0.0)


FAMILIES = (
    RouterFamily("softmax, top-k, renormalised", lambda logits, probs: probs, _normalised_softmax_weights),
    RouterFamily("softmax, top-k", lambda logits, probs: probs, _softmax_weights),
    RouterFamily("top-k, softmax", lambda logits, probs: logits.float(), _softmax_of_selected_weights),
)


def identify_family(router: nn.Module, hidden_size: int) -> RouterFamily | str:
    """The family whose formula reproduces the router on random rows, or the reason why there is none."""
    parameter = next(router.parameters(), None)
    if parameter is None:
        return "its router has no weights"
    generator = torch.Generator().manual_seed(0)
    rows_TD = torch.randn(NUM_PROBE_ROWS, hidden_size, generator=generator).to(parameter.device, parameter.dtype)
    with torch.inference_mode():
        output = router(rows_TD)
    if not (isinstance(output, tuple) and len(output) == 3 and all(isinstance(part, Tensor) for part in output)):
        return "its router does not return (logits, weights, expert ids)"
    logits_TE, weights_TK, ids_TK = output
    if weights_TK.shape != ids_TK.shape or logits_TE.shape[0] != NUM_PROBE_ROWS:
        return f"its router returns weights {tuple(weights_TK.shape)} for experts {tuple(ids_TK.shape)}"
    tolerance = 1e-5 if weights_TK.dtype == torch.float32 else 2e-2
    probs_TE = logits_TE.float().softmax(dim=-1)
    for family in FAMILIES:
        best_TK = family.selection(logits_TE, probs_TE).topk(ids_TK.shape[-1], dim=-1).indices
        same_choice = torch.equal(best_TK.sort(dim=-1).values, ids_TK.sort(dim=-1).values)
        expected_TK = family.weights(logits_TE, probs_TE, ids_TK, None)
        if same_choice and torch.allclose(expected_TK, weights_TK.float(), atol=tolerance):
            return family
    known = "; ".join(family.name for family in FAMILIES)
    return f"its router {type(router).__name__} is of an unknown family (known: {known})"


def router_scores(family: RouterFamily, output: RouterOutput) -> RouterScores:
    """RouterScores of a router's output."""
    probs_TE = output.probs_TE
    return RouterScores(
        logits_TE=output.logits_TE,
        probs_TE=output.logits_TE.softmax(dim=-1, dtype=torch.float32) if probs_TE is None else probs_TE,
        natural_ids_TK=output.ids_TK,
        natural_weights_TK=output.weights_TK,
        family=family,
    )
