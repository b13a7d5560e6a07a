"""One request as a thing that can be handed over. Knows nothing of how it is answered."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from moespec.config import BudgetConfig, GenerationConfig, TreeConfig
from moespec.control import Control
from moespec.drafters.base import Drafter
from moespec.governors.base import Governor


@dataclass(frozen=True)
class Request:
    """What `Engine.generate` is asked. `control` moves this request's settings and stops it, and no other's."""

    prompt: str | list | Tensor
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    budget: BudgetConfig = field(default_factory=BudgetConfig)
    tree: TreeConfig = field(default_factory=TreeConfig)
    control: Control = field(default_factory=Control)
    governor: Governor | None = None  # of its own: it learns from this request's steps
    drafter: Drafter | None = None  # of its own, without taps: proposes in place of the engine's

    def __post_init__(self) -> None:
        if self.drafter is not None and self.drafter.tap_layers:
            name = self.drafter.name
            raise ValueError(f"drafter={name} reads the target's features: load it with the engine, not for a request.")
