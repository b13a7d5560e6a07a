"""Measures what steps cost here (`cost_table.py`): real steps of real trees, of all sizes and budgets in turn.

Owns which steps are run and how they are timed; `kept_costs.py` keeps the table. A turn is a few steps of one kind, the
first of which is not counted: it finds the caches as the kind before left them. Plain steps have a turn in every few,
so that what else the machine does meets them as it meets the others.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import random
import statistics
import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from moespec.config import BudgetConfig, GenerationConfig, TreeConfig
from moespec.control import Control
from moespec.cost import budget_ladder
from moespec.cost_table import SCHEMA, CostTable, DraftPoint, Spread, StepPoint
from moespec.engine import Engine
from moespec.trace import StepTrace

ROWS = (2, 4, 6, 8, 12, 16, 24, 32, 48, 64)
DEPTH, BRANCHING = 8, 8  # of all trees whose rows are compared: each is the most likely part of the next larger one
DRAFTS = (
    (4, 1),
    (8, 1),
    (2, 3),
    (4, 3),
    (8, 3),
    (2, 8),
    (4, 8),
)  # further (levels, nodes expanded), for what drafting costs
NUM_TIMED = 2  # steps of a turn that count
PLAIN_EVERY = 8  # turns
LEAST_ROUNDS = 2
NUM_TOKENS = 96  # of a conversation; then the next begins
PROMPTS = (
    "Tell me a short story about a river and a stone.",
    "Explain in a few sentences how a bridge carries weight.",
    "What does the word river mean?",
    "Write down three things that a baker does in the morning.",
)


def costs_key(engine: Engine) -> dict[str, Any]:
    """What a table is true of, JSON-safe: the machine, the software, and both models by shapes and some weights.

    ValueError where there is no drafter.
    """
    if engine.drafter is None:
        raise ValueError("drafter none drafts no trees to measure: give a draft head, or ngram.")
    card = engine.card()
    modules = [value for value in vars(engine.drafter).values() if isinstance(value, nn.Module)]
    return {
        "schema": SCHEMA,
        **{name: card[name] for name in ("device", "name", "threads", "dtype", "backend", "torch", "transformers")},
        "kernels": engine.info.kernels,
        "graphs": engine.info.graphs,
        "model": _fingerprint([engine.target.model]),
        "drafter": engine.info.drafter_name,
        "head": _fingerprint(modules),
    }


@dataclass(frozen=True)
class Kind:
    """Steps that are timed alike."""

    tree: TreeConfig
    budget: int | None

    @property
    def is_compared(self) -> bool:
        """Whether it is in the table of rows and budgets; the others only say what drafting costs."""
        return (self.tree.depth, self.tree.top_k) == (DEPTH, BRANCHING)


PLAIN = Kind(TreeConfig(1), None)
Found = dict[Kind, list[StepTrace]]


def measure_costs(engine: Engine, seconds: float = 10.0) -> CostTable:
    """Rounds over all kinds until the time is over, at least two. The conversation is forgotten.

    ValueError where there is no drafter, or none that drafts anything.
    """
    about = costs_key(engine)
    kinds = kinds_of(engine.target.top_k, engine.target.num_experts)
    found, prefix = run_rounds(engine, kinds, LEAST_ROUNDS, seconds)
    return _table(engine, about, found, (min(prefix), max(prefix)))


def kinds_of(top_k: int, num_experts: int) -> list[Kind]:
    """All sizes of trees without a budget and with those of a ladder; and the trees of `DRAFTS`."""
    budgets = [None, *budget_ladder(top_k, num_experts)]
    kinds = [Kind(TreeConfig(rows, DEPTH, BRANCHING, 0), budget) for rows in ROWS for budget in budgets]
    return kinds + [Kind(TreeConfig(16, depth, top_k, 0), None) for depth, top_k in DRAFTS]


def run_rounds(engine: Engine, kinds: Sequence[Kind], least: int, seconds: float = 0.0) -> tuple[Found, list[int]]:
    """(steps by kind, positions before each), of rounds until the time is over, `least` at the least.

    One more before them compiles and captures. The conversation is forgotten. ValueError where nothing is drafted.
    """
    control, found, prefix = Control(), dict[Kind, list[StepTrace]](), list[int]()
    with contextlib.closing(_steps(engine, control, prefix)) as steps:
        _round(kinds, 0, control, steps, {})
        began = time.perf_counter()
        for number in itertools.count(1):
            _round(kinds, number, control, steps, found)
            if number >= least and time.perf_counter() - began >= seconds:
                break
    engine.forget()
    return found, prefix


def _round(kinds: Sequence[Kind], number: int, control: Control, steps: Iterator[StepTrace], found: Found) -> None:
    """A turn of every kind, in an order of the round's own, and of the plain step in between."""
    order = random.Random(number).sample(kinds, len(kinds))
    for place in range(0, len(order), PLAIN_EVERY):
        for kind in (PLAIN, *order[place : place + PLAIN_EVERY]):
            control.update(budget=BudgetConfig(budget=kind.budget), tree=kind.tree)
            turn = list(itertools.islice(steps, 1 + NUM_TIMED))
            found.setdefault(kind, []).extend(turn[1:])


def _steps(engine: Engine, control: Control, prefix: list[int]) -> Generator[StepTrace]:
    """Steps of one conversation after the other, without end; `prefix` collects how many positions lay behind each."""
    while True:
        num_before = len(prefix)
        for prompt in built_in_prompts(engine):
            for length, step in conversation(engine, prompt, control):
                prefix.append(length)
                yield step
        if len(prefix) == num_before:
            raise ValueError(f"{engine.name} ends every answer at once: there are no steps to measure.")


def built_in_prompts(engine: Engine) -> list[list[int]]:
    """Token ids of `PROMPTS`; ids that are no text where there is no tokenizer."""
    if engine.target.tokenizer is not None:
        return [engine.encode(text) for text in PROMPTS]
    return [[ord(letter) % engine.target.vocab_size for letter in text] for text in PROMPTS]


def conversation(engine: Engine, prompt: list[int], control: Control) -> Generator[tuple[int, StepTrace]]:
    """(positions before it, step) of a greedy answer of about `NUM_TOKENS`; no step that an end may have cut short."""
    engine.forget()
    length = len(prompt)
    for step in engine.generate(prompt, GenerationConfig(max_new_tokens=engine.target.max_context), control=control):
        if step.kind != "prefill" and step.summary is None:
            yield length, step
        length += len(step.token_ids)
        if length > len(prompt) + NUM_TOKENS:
            return


def _table(engine: Engine, about: dict[str, Any], found: Found, prefix: tuple[int, int]) -> CostTable:
    """By the rows that were drafted, which may be fewer than were asked for."""
    by_rows: dict[tuple[int, int | None], list[StepTrace]] = {}
    by_levels: dict[tuple[int, int], list[StepTrace]] = {}
    for kind, step in ((kind, step) for kind, steps in found.items() for step in steps):
        num_rows = len(step.tree.parents) if step.tree else 1
        if kind == PLAIN or (kind.is_compared and num_rows > 1):
            by_rows.setdefault((num_rows, kind.budget), []).append(step)
        if num_rows > 1:
            by_levels.setdefault((kind.tree.depth, kind.tree.top_k), []).append(step)
    in_order = sorted(by_rows, key=lambda pair: (pair[0], pair[1] or engine.target.num_experts))
    return CostTable.of(
        about,
        (engine.target.num_experts, engine.target.top_k),
        prefix,
        [_step_point(*pair, by_rows[pair]) for pair in in_order],
        [
            DraftPoint(*shape, len(steps), Spread.of(step.draft_ms for step in steps))
            for shape, steps in sorted(by_levels.items())
        ],
    )


def _step_point(num_rows: int, budget: int | None, steps: list[StepTrace]) -> StepPoint:
    return StepPoint(
        num_rows=num_rows,
        budget=budget,
        num_steps=len(steps),
        verify_ms=Spread.of(step.verify_ms for step in steps),
        other_ms=Spread.of(step.other_ms for step in steps),
        total_ms=Spread.of(step.draft_ms + step.verify_ms + step.other_ms for step in steps),
        experts_natural=statistics.fmean(statistics.fmean(step.experts_natural) for step in steps),
        experts_read=statistics.fmean(statistics.fmean(step.experts_active) for step in steps),
        mass_kept=statistics.fmean(step.mass_kept for step in steps),
        num_accepted=statistics.fmean(len(step.token_ids) - 1 for step in steps),
    )


def _fingerprint(modules: Sequence[nn.Module]) -> str:
    """Of all parameters' names, shapes, types and first few values."""
    hashed = hashlib.sha256()
    with torch.inference_mode():
        for name, parameter in itertools.chain.from_iterable(module.named_parameters() for module in modules):
            first = parameter.flatten()[:16].float().cpu().numpy().tobytes()
            hashed.update(f"{name} {tuple(parameter.shape)} {parameter.dtype} ".encode() + first)
    return hashed.hexdigest()[:16]
