"""Runs of tiny models that tests compare: transformers' own, and with a drafter that plants right and wrong tokens."""

from __future__ import annotations

import torch

from moespec import (
    BudgetConfig,
    Engine,
    ExpertPlan,
    GenerationConfig,
    RouterScores,
    StepTrace,
    TreeContext,
)
from moespec.budget import MoESpec
from tests.conftest import VOCAB, tiny_model
from tests.drafters import PlantingDrafter

NEW_TOKENS = 48


class OwnPolicy:
    """MoE-Spec as a policy object of one's own: asked layer by layer, wherever steps run."""

    def __init__(self, config: BudgetConfig) -> None:
        self._method, self.num_calls = MoESpec(config), 0

    def plan(self, scores: RouterScores, context: TreeContext) -> ExpertPlan:
        self.num_calls += 1
        return self._method.plan(scores, context)


def reference_ids(model, prompt_ids, num_tokens: int = NEW_TOKENS) -> list[int]:
    output = model.generate(prompt_ids[None], do_sample=False, max_new_tokens=num_tokens)
    return output[0].tolist()


def prompt() -> torch.Tensor:
    return torch.randint(0, VOCAB, (11,), generator=torch.Generator().manual_seed(1))


def planted_engine(family: str, known: float = 1.0) -> tuple[Engine, list[int]]:
    reference = reference_ids(tiny_model(family), prompt())
    drafter = PlantingDrafter(reference, VOCAB, known=known)
    return Engine.from_model(tiny_model(family), drafter=drafter), reference


def run(engine: Engine, **kwargs) -> list[StepTrace]:
    generation = kwargs.pop("generation", GenerationConfig(max_new_tokens=NEW_TOKENS))
    return list(engine.generate(kwargs.pop("prompt", prompt()), generation, **kwargs))
