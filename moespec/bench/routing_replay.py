"""Real routing for a model with random weights: router logits recorded from the embedded model, scaled to its shape.

Owns the recording and the scaling. A layer takes the logits of the recorded layer at the same share of the depth, an
expert those of the recorded one at the same share of the row of experts, and a little noise of its own tells experts of
one origin apart. Knows nothing of clocks.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from moespec.config import TreeConfig
from moespec.drafters.base import DraftContext
from moespec.engine import Engine
from moespec.kv_cache import TreeCache
from moespec.routing import RouterOutput
from moespec.step_router import NaturalRouter, StepRouting
from moespec.target import Target
from moespec.types import ExpertPlan

NOISE = 0.5  # standard deviation, in logits; a row's logits spread over several


@torch.inference_mode()
def record_logits(engine: Engine, texts: Sequence[list[int]], tree: TreeConfig) -> Tensor:
    """fp32 [N, L, T, E]: unbudgeted router logits of the tree drafted at the middle of each text."""
    target, drafter, found = engine.target, engine.drafter, []
    assert drafter is not None and tree.min_path_p == 0, "trees of one size are wanted"
    for token_ids in texts:
        prefix, cache = len(token_ids) // 2, TreeCache(len(target.layers))
        ids_N = torch.tensor(token_ids[:prefix])
        with target.stepping(NaturalRouter(prefix)):
            target.forward(ids_N, torch.arange(prefix), None, cache, keep=1)
        engine.forget()
        drafter.observe(target.features())
        drafted = drafter.propose(DraftContext(token_ids[: prefix + 1], tree))
        router = _LogitsRouter(drafted.num_rows)
        with target.stepping(router):
            positions_T = drafted.depths_T + prefix
            target.forward(drafted.tokens_T, positions_T, drafted.mask_TT, cache, keep=drafted.num_rows)
        found.append(torch.stack(router.logits))
    engine.forget()
    return torch.stack(found)


class _LogitsRouter(NaturalRouter):
    """The routers' own choice, and what they made it of."""

    def __init__(self, num_rows: int) -> None:
        super().__init__(num_rows)
        self.logits: list[Tensor] = []

    def route(self, number: int, output: RouterOutput) -> ExpertPlan:
        self.logits.append(output.logits_TE.float())
        return super().route(number, output)

    def record(self, routings: list[StepRouting]) -> None:
        (routing,) = routings
        assert routing.logits_LTE is not None
        self.logits = list(routing.logits_LTE)


def scale_logits(recorded_NLTE: Tensor, num_layers: int, num_experts: int) -> Tensor:
    """[N, L', T, E'] for another number of layers and experts."""
    _, recorded_layers, _, recorded_experts = recorded_NLTE.shape
    layers = torch.arange(num_layers) * recorded_layers // num_layers
    experts = torch.arange(num_experts) * recorded_experts // num_experts
    generator = torch.Generator().manual_seed(0)
    noise_LE = NOISE * torch.randn(num_layers, num_experts, generator=generator)
    return recorded_NLTE[:, layers][..., experts] + noise_LE[:, None]


class RoutingReplay:
    """Replaces what a target's routers say in steps of as many rows as were recorded, one recording after the other."""

    def __init__(self, target: Target, logits_NLTE: Tensor) -> None:
        self._target = target
        self._all_NLTE = logits_NLTE.to(target.device, target.dtype)
        self._now_LTE = self._all_NLTE[0].clone()  # captured steps read it where it lies
        self._number = 0

    def advance(self) -> None:
        """The next recording."""
        self._number = (self._number + 1) % len(self._all_NLTE)
        self._now_LTE.copy_(self._all_NLTE[self._number])

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Inside, the target is routed so. Steps that were captured outside know nothing of it, and the reverse."""
        handles = [
            # Before the target's own hook, which takes what comes for the router's output.
            moe.router.register_forward_hook(self._hook(number), prepend=True)
            for number, moe in enumerate(self._target.moe_layers)
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, number: int) -> Callable:
        family = self._target.moe_layers[number].family

        def hook(module: object, args: tuple, output: tuple[Tensor, Tensor, Tensor]) -> tuple | None:
            _, weights_TK, ids_TK = output
            logits_TE = self._now_LTE[number]
            if len(logits_TE) != len(ids_TK):
                return None
            if self._target.plans_from_logits():
                return logits_TE, weights_TK, ids_TK
            probs_TE = logits_TE.softmax(dim=-1, dtype=torch.float32)
            ids_TK = family.selection(logits_TE, probs_TE).topk(ids_TK.shape[1], dim=-1).indices
            return logits_TE, family.weights(logits_TE, probs_TE, ids_TK, None).to(weights_TK.dtype), ids_TK

        return hook
