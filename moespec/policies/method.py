"""What the rivals of MoE-Spec have in common: a name that tells all parameters, their check, and steps of their plans.

A method is a frozen dataclass whose fields are its parameters, under the letters that its paper and `parse_policy`
use. Knows no method. Letters as in `types.py`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import Field, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from moespec.config import BudgetConfig
from moespec.types import ExpertPlan, RouterScores, TreeContext


@dataclass(frozen=True)
class RoutedModel:
    """What a budget must fit: a model's MoE layers' numbers among the decoder layers, their experts, their top-k."""

    layers: tuple[int, ...]
    num_experts: int
    top_k: int

    def check_budget(self, budget: BudgetConfig) -> None:
        """See `Engine.check_budget`."""
        if isinstance(budget.policy, Method):
            budget.policy.check(self)
        low, high = self.top_k, self.num_experts
        if budget.budget is not None and not low <= budget.budget <= high:
            raise ValueError(f"budget={budget.budget} is outside {low} to {high}, this model's top-k and experts.")


@dataclass(frozen=True)
class Spelled:
    """Something that `parse_policy` reads: a name and, as fields, parameters.

    Fields that are not compared were measured on a model or a step: they are no parameters.
    """

    method: ClassVar[str]

    @classmethod
    def parameters(cls) -> list[Field[Any]]:
        return [field for field in fields(cls) if field.compare]

    @property
    def name(self) -> str:
        """Method and parameters, as `parse_policy` reads them."""
        values = ((field.name.replace("_", "-"), getattr(self, field.name)) for field in self.parameters())
        spelled = [_spelled(key, value) for key, value in values if value is not None and value is not False]
        return ":".join([self.method, ",".join(spelled)]) if spelled else self.method

    def require(self, ok: bool, key: str, allowed: str) -> None:
        """ValueError in a sentence unless this parameter's value is allowed."""
        if not ok:
            raise ValueError(f"{self.method}: {key}={getattr(self, key)!r} is not allowed: use {allowed}.")


class Method(Spelled, ABC):
    """An expert policy under its paper's name."""

    @classmethod
    def read(cls, values: dict[str, Any], profiles: Path | None) -> Self:
        """From parameters and, for methods that were calibrated, files of the folder. ValueError in a sentence."""
        return cls(**values)

    @abstractmethod
    def check(self, model: RoutedModel) -> None:
        """ValueError if the parameters or what was measured do not fit this model."""

    @abstractmethod
    def plan(self, scores: RouterScores, context: TreeContext) -> ExpertPlan:
        """See `ExpertPolicy.plan`."""

    def require_slots(self, key: str, model: RoutedModel) -> None:
        """ValueError unless a row of this model has so many slots."""
        self.require(getattr(self, key) <= model.top_k, key, f"1 to {model.top_k}, this model's top-k")

    def require_experts(self, key: str, model: RoutedModel) -> None:
        """ValueError unless this is a budget of this model."""
        low, high = model.top_k, model.num_experts
        self.require(low <= getattr(self, key) <= high, key, f"{low} to {high}, this model's top-k and experts")


def natural_plan(scores: RouterScores) -> ExpertPlan:
    """What the router chose, bit for bit."""
    return ExpertPlan(ids_TK=scores.natural_ids_TK, weights_TK=scores.natural_weights_TK)


def best_slots(scores: RouterScores, num_slots: int) -> Tensor:
    """bool [T, K]: each row's `num_slots` slots of the highest routing weight, ties to the earlier slot."""
    order_TK = scores.natural_weights_TK.argsort(dim=-1, descending=True, stable=True)
    return torch.zeros_like(order_TK, dtype=torch.bool).scatter_(1, order_TK[:, :num_slots], True)


def experts_in(scores: RouterScores, slots_TK: Tensor) -> Tensor:
    """bool [E]: the experts that the routers named in these slots, whatever the row."""
    counts_E = torch.zeros(scores.num_experts, dtype=torch.float32, device=slots_TK.device)
    return counts_E.index_add_(0, scores.natural_ids_TK.flatten(), slots_TK.flatten().float()) > 0


def _spelled(key: str, value: Any) -> str:
    if value is True:
        return key
    return f"{key}={value:.12g}" if isinstance(value, float) else f"{key}={value}"
