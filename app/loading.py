"""Engines for the service: how each is loaded, what each is asked, and what a worker process makes of one.

Owns the step from a visitor's settings to an engine's request. Knows nothing of queues or pages.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from app.hosting import HostedModel
from app.settings import Settings
from app.zero import Answers, Begun, ChangeFile, Run, ZeroEngine
from moespec import BudgetConfig, Control, GenerationConfig, Request, StepTrace

if TYPE_CHECKING:
    from moespec import Batch, Engine


@dataclass(frozen=True)
class Serving:
    """A model that answers: an engine with the batch of this process's answers, or one of ZeroGPU's, without."""

    engine: Engine | ZeroEngine
    target: str | Path
    batch: Batch | None


def warm_up(engine: Engine) -> None:
    """The first steps are the slow ones: let them be ours."""
    for _ in engine.generate("Hello", GenerationConfig(max_new_tokens=4), BudgetConfig(budget=16)):
        pass


def request_of(
    engine: Engine, messages: list[dict], settings: Settings, stop: tuple[str, ...], control: Control
) -> Request:
    """What the engine is asked, with a governor of its own: it learns from this answer's steps.

    The first that needs to know what steps cost here measures it.
    """
    from moespec import NgramDrafter, parse_governor, profile_costs

    return Request(
        prompt=messages,
        generation=replace(settings.generation_config, stop=stop),
        budget=settings.budget_config,
        tree=settings.tree_config,
        control=control,
        governor=parse_governor(settings.governor, lambda: profile_costs(engine)),
        drafter=NgramDrafter(device=engine.target.device) if settings.drafter == "ngram" else None,
    )


def load_weights(hosted: HostedModel) -> tuple[Any, Any]:
    """(model, tokenizer), in bf16 on a GPU and in fp32 on a CPU. ValueError says what cannot be loaded."""
    import torch

    from moespec.models import load_model

    dtype = "bfloat16" if torch.cuda.is_available() else "float32"
    return load_model(hosted.hub_id, dtype=dtype, revision=hosted.revision)


def attach(hosted: HostedModel, model: Any, tokenizer: Any) -> Engine:
    """The engine of a model with its draft head, or with look-up where the head cannot be used."""
    from moespec import Engine

    try:
        engine = Engine.from_model(model, tokenizer, hosted.drafter, tap_layers=hosted.tap_layers)
    except ValueError as error:
        engine = Engine.from_model(model, tokenizer, "ngram")
        engine.drafter_reason = f"the head of the list cannot be used: {error}"
    engine.name = hosted.hub_id
    return engine


def load_hosted(hosted: HostedModel) -> Engine:
    """A model of the list, on this machine's GPU if it has one."""
    return attach(hosted, *load_weights(hosted))


def answers_in_worker(hosted: HostedModel | None, lent: list[tuple[Any, Any]]) -> Answers:
    """What ZeroGPU's worker does: an engine of the model that was lent, made for its first answer, and the answer."""

    @functools.cache
    def engine() -> Engine:
        assert hosted is not None
        return attach(hosted, *lent[0])

    return lambda *asked: answer_alone(engine(), *asked)


def lend(hosted: HostedModel, lent: list[tuple[Any, Any]], run: Run) -> Serving:
    """Load for the workers' sake. It is never run in this process."""
    lent.append(load_weights(hosted))
    return Serving(ZeroEngine(hosted, *lent[0], run), hosted.hub_id, None)


def answer_alone(
    engine: Engine, messages: list[dict], settings: Settings, stop: tuple[str, ...], changes: ChangeFile
) -> Iterator[Begun | StepTrace]:
    """What a worker process says of an answer."""
    hears, control = changes.exists, Control()
    yield Begun(engine.info, engine.card(), hears)
    request = request_of(engine, messages, settings, stop, control)
    if hears:
        changes.pass_on(control)
    steps: Any = engine.generate_batch([request])
    with contextlib.closing(steps):
        for _, step in steps:
            yield step
            if hears:
                changes.pass_on(control)
