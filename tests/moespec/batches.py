"""Requests for an engine whose drafter often knows how they go on, and ways to ask them side by side or alone."""

from __future__ import annotations

import torch

from moespec import Batch, DraftContext, DraftTree, Engine, GenerationConfig, Request, StepTrace
from tests.conftest import VOCAB, tiny_model
from tests.drafters import PlantingDrafter
from tests.moespec.runs import reference_ids

NEW_TOKENS = 16
LENGTHS = (11, 3, 30, 1)  # of the prompts
NUMBERS = range(len(LENGTHS))


class SteadyDrafter(PlantingDrafter):
    """Proposes the same tree whenever it is asked the same: a budget's text depends on the trees."""

    def propose(self, context: DraftContext) -> DraftTree:
        self._rng.seed(str(context.token_ids))
        return super().propose(context)

    def fork(self) -> SteadyDrafter:
        reference, *further = self._references
        return SteadyDrafter(reference, self._vocab_size, known=self._known, further=further)


def prompt(number: int) -> torch.Tensor:
    return torch.randint(0, VOCAB, (LENGTHS[number],), generator=torch.Generator().manual_seed(10 + number))


def planted_engine(family: str) -> tuple[Engine, list[list[int]]]:
    """An engine whose drafter often knows how a prompt goes on, and how each does."""
    model = tiny_model(family)
    first, *further = (reference_ids(model, prompt(number), NEW_TOKENS) for number in NUMBERS)
    engine = Engine.from_model(tiny_model(family), drafter=SteadyDrafter(first, VOCAB, known=0.8, further=further))
    return engine, [text[length:] for text, length in zip((first, *further), LENGTHS, strict=True)]


def requests(num_tokens: int = NEW_TOKENS, **settings) -> list[Request]:
    return [Request(prompt(number), GenerationConfig(max_new_tokens=num_tokens), **settings) for number in NUMBERS]


def answers(engine: Engine, asked: list[Request], max_requests: int = 8) -> list[list[StepTrace]]:
    """The steps of each request."""
    found: list[list[StepTrace]] = [[] for _ in asked]
    for number, step in engine.generate_batch(asked, max_requests):
        found[number].append(step)
    return found


def alone(engine: Engine, asked: list[Request]) -> list[list[StepTrace]]:
    return [list(engine.generate(one.prompt, one.generation, one.budget, one.tree)) for one in asked]


def texts_of(found: list[list[StepTrace]]) -> list[list[int]]:
    return [steps[-1].summary.token_ids for steps in found]


class Rounds:
    """A batch that is driven call by call: who got what in each."""

    def __init__(self, engine: Engine, max_requests: int) -> None:
        self.batch = Batch(engine, max_requests)
        self.outcomes: dict[int, list[StepTrace | Exception]] = {}
        self._handed: list[tuple[int, StepTrace]] = []

    def join(self, number: int, request: Request) -> None:
        self.outcomes[number] = []
        self.batch.join(request, lambda outcome: self._hand(number, outcome))

    def _hand(self, number: int, outcome: StepTrace | Exception) -> None:
        self.outcomes[number].append(outcome)
        if isinstance(outcome, StepTrace) and outcome.kind != "prefill":
            self._handed.append((number, outcome))

    def step(self) -> list[tuple[int, StepTrace]]:
        """The steps of one call, the prompts' left out; the last call gives none."""
        while not self._handed and self.batch.step():
            pass
        handed, self._handed = self._handed, []
        return handed

    def rest(self) -> list[list[tuple[int, StepTrace]]]:
        return list(iter(self.step, []))
