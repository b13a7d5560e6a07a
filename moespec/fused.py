"""Modules that a step on a GPU runs with fewer launches: norms in one, routers without a choice that is made anew;
attention is `fused_attention.py`'s.

Owns the replacements of their `forward`, each only where it reproduces the module on a probe, and only inside a step.
Knows nothing of what a step is: it is told whether one is under way.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NUM_PROBE_ROWS = 8

Forward = Callable[..., Any]


def fused_norm(norm: Any, is_stepping: Callable[[], bool]) -> Forward | None:
    """A `forward` for an RMS norm, or None for a module that is none. Stock ones take seven launches.

    The same up to rounding: once at the end, where stock norms in half precision round before the weight, too.
    """
    weight, eps = getattr(norm, "weight", None), eps_of(norm)
    if (
        not isinstance(weight, Tensor)
        or weight.dim() != 1
        or not isinstance(eps, float)
        or isinstance(norm, nn.LayerNorm)
    ):
        return None
    probe_ND = probe(len(weight), weight)
    if not are_alike(norm(probe_ND), F.rms_norm(probe_ND, weight.shape, weight, eps)):
        return None

    def forward(x: Tensor) -> Tensor:
        return F.rms_norm(x, norm.weight.shape, norm.weight, eps) if is_stepping() else type(norm).forward(norm, x)

    return forward


def eps_of(norm: Any) -> Any:
    """What a norm adds to its mean square, under the names that transformers gives it; None if under none of them."""
    return getattr(norm, "variance_epsilon", getattr(norm, "eps", None))


def logits_alone(router: Any, wants_logits: Callable[[], bool]) -> Forward | None:
    """A `forward` for a router that makes its logits alone and leaves weights and ids unwritten.

    For steps that plan from logits. None for a router that is more than a linear layer and a choice.
    """
    weight, bias = getattr(router, "weight", None), getattr(router, "bias", None)
    if not isinstance(weight, Tensor) or weight.dim() != 2:
        return None
    hidden_size = weight.shape[1]
    probe_TD = probe(hidden_size, weight)
    logits_TE, weights_TK, ids_TK = router(probe_TD)
    if not are_alike(logits_TE, F.linear(probe_TD, weight, bias)):
        return None
    top_k, dtype = ids_TK.shape[1], weights_TK.dtype

    def forward(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if not wants_logits():
            return type(router).forward(router, x)
        made_TE = F.linear(x.reshape(-1, hidden_size), router.weight, getattr(router, "bias", None))
        return made_TE, made_TE.new_empty(len(made_TE), top_k, dtype=dtype), ids_TK.new_empty(len(made_TE), top_k)

    return forward


def probe(size: int, like: Tensor) -> Tensor:
    """Normal numbers [NUM_PROBE_ROWS, size] of the type and device of `like`, the same each time."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(NUM_PROBE_ROWS, size, generator=generator).to(like.device, like.dtype)


def are_alike(ours: Tensor, theirs: Tensor) -> bool:
    """Whether two tensors are equal up to the rounding of their type."""
    if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
        return False
    tolerance = 8 * torch.finfo(ours.dtype).eps
    return bool((ours - theirs).abs().max() <= tolerance * theirs.abs().max())
