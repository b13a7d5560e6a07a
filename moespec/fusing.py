"""Which of a target's modules run with fewer launches in a step on a GPU, kept as long as they stay as they are.

Owns the replacement of their `forward` and its removal. What replaces it is `fused.py`'s and `fused_attention.py`'s.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from moespec.backends import rule_of
from moespec.fused import Forward, fused_norm, logits_alone
from moespec.fused_attention import Attend, FusedAttention
from moespec.moe_layers import MoeLayer


class FusedModules:
    """Norms, routers and attention of a model. `close` makes them run their own code again."""

    @torch.inference_mode()
    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[Any],
        moe_layers: Sequence[MoeLayer],
        attend: Attend,
        is_stepping: Callable[[], bool],
        plans_from_logits: Callable[[], bool],
    ) -> None:
        self._layers, self._attend = layers, attend
        norms = [module for module in model.modules() if type(module).__name__.endswith("RMSNorm")]
        forwards: dict[nn.Module, Forward | None] = {
            norm: fused_norm(norm, is_stepping) for norm in norms if _runs_its_own_code(norm)
        }
        known = [moe for moe in moe_layers if rule_of(moe.family) is not None]
        for moe in known:
            if _runs_its_own_code(moe.router):
                forwards[moe.router] = logits_alone(moe.router, plans_from_logits)
        if len(known) == len(moe_layers):  # others have no steps of fixed shape
            own = [module for module in self._attentions() if _runs_its_own_code(module)]
            forwards |= {module: FusedAttention.of(module, attend) for module in own}
        fused = {module: forward for module, forward in forwards.items() if forward is not None}
        for module, forward in fused.items():
            module.forward = forward  # type: ignore[method-assign]
        self._modules = list(fused)

    def _attentions(self) -> Iterator[nn.Module]:
        found = (getattr(layer, "self_attn", None) for layer in self._layers)
        return (module for module in found if module is not None)

    @torch.inference_mode()
    def refresh(self) -> bool:
        """Join anew what was replaced in attention, where another engine of the model has not; whether anything was."""
        is_changed = False
        for module in self._attentions():
            forward = vars(module).get("forward")
            if isinstance(forward, FusedAttention) and not forward.is_current():
                is_changed = True
                del module.forward
                again = FusedAttention.of(module, self._attend)
                if again is not None:
                    module.forward = again  # type: ignore[method-assign]
        return is_changed

    def close(self) -> None:
        for module in self._modules:
            vars(module).pop("forward", None)
        self._modules = []


def _runs_its_own_code(module: nn.Module) -> bool:
    return "forward" not in vars(module)
