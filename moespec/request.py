"""One request as a thing that can be handed over. Knows nothing of how it is answered."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from moespec.config import BudgetConfig, GenerationConfig, TreeConfig
from moespec.control import Control
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
