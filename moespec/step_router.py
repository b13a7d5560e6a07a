"""What decides a step's routing, and what is kept of it. Owns the seam between a target's forward and a policy.

A policy is asked layer by layer, or, where it is MoE-Spec on compiled kernels, handed over whole. Letters as in
`types.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from moespec.routing import RouterOutput
from moespec.types import ExpertPlan


class StepRouter(Protocol):
    """What decides a step's routing. `plans_from_logits`: the routers' own weights and ids are not looked at."""

    plans_from_logits: bool

    def route(self, number: int, output: RouterOutput) -> ExpertPlan:
        """What the experts of MoE layer `number` will see."""
        ...

    def compiled_budget(self) -> CompiledBudget | None:
        """The policy in the form of `native.routing.plan`, or None if `route` must be asked layer by layer."""
        ...

    def record(self, routings: list[StepRouting]) -> None:
        """Take note of all layers at once, request by request, where `route` was not asked."""
        ...


@dataclass(frozen=True)
class CompiledBudget:
    """Settings of `native.routing.plan_requests`; `size` -1 is the router's own routing."""

    row_weights_T: Tensor
    is_shared: bool = False
    natural: bool = False
    protect_root: bool = False
    size: int = -1
    coverage: float = 0.0
    truncates: bool = False


@dataclass(frozen=True)
class StepRouting:
    """Routing of a request's rows in one step, all L MoE layers: what the routers chose, and what ran. kept_LE: the
    shortlists.

    Of logits_LTE, whose softmax is router probability, and score_LE, that summed over the rows, one is enough.
    """

    logits_LTE: Tensor | None
    natural_ids_LTK: Tensor
    natural_weights_LTK: Tensor
    ids_LTK: Tensor
    weights_LTK: Tensor
    kept_LE: Tensor
    score_LE: Tensor | None = None

    @classmethod
    def by_request(cls, parts: Sequence[Tensor], kept: Sequence[Tensor], sizes: list[int]) -> list[StepRouting]:
        """Of the rows of several requests, so many each. parts: the first five fields; kept: each request's kept_LE."""
        split = [part.split(sizes, dim=1) for part in parts]
        return [cls(*fields) for fields in zip(*split, kept, strict=True)]

    def scores(self) -> Tensor:
        """fp32 [L, E]: router probability summed over the rows."""
        if self.score_LE is not None:
            return self.score_LE
        assert self.logits_LTE is not None
        return self.logits_LTE.softmax(dim=-1, dtype=torch.float32).sum(dim=1)


class NaturalRouter:
    """The routers' own choice, for prefill: nothing is recorded."""

    plans_from_logits = False

    def __init__(self, num_rows: int) -> None:
        self._num_rows = num_rows

    def route(self, number: int, output: RouterOutput) -> ExpertPlan:
        return ExpertPlan(ids_TK=output.ids_TK, weights_TK=output.weights_TK)

    def compiled_budget(self) -> CompiledBudget:
        return CompiledBudget(torch.ones(self._num_rows, dtype=torch.float32))

    def record(self, routings: list[StepRouting]) -> None:
        pass
