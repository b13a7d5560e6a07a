"""Runs one arm on one prompt and says what it wrote and what it cost. Owns the clock's place: after the first token.

The prompt's own forward is in no figure, for no arm. Knows nothing of statistics.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from moespec.bench.arms import Arm
from moespec.bench.governed import Governors
from moespec.bench.timed import Timed, overall
from moespec.config import GenerationConfig
from moespec.engine import Engine
from moespec.models import load_model
from moespec.prompts import end_ids
from moespec.trace import RunSummary

# transformers' own ways to run experts; the fastest on this machine stands for it.
EXPERTS_IMPLEMENTATIONS = ("eager", "grouped_mm", "batched_mm")


@dataclass(frozen=True)
class Written:
    """One arm's text for one prompt. `timed` covers the tokens after the first."""

    token_ids: list[int]
    timed: Timed
    summary: RunSummary | None = None


class Contestants:
    """The engine and, beside it, the same weights in an untouched transformers model."""

    def __init__(self, engine: Engine, target: str | Path, num_tokens: int, revision: str | None = None) -> None:
        self.engine, self.num_tokens, self.governors = engine, num_tokens, Governors(engine)
        self._target, self._revision = target, revision
        self.experts_implementation = ""

    @cached_property
    def _reference(self) -> Any:
        """Loaded where an arm asks for it: it takes as much memory as the engine's."""
        target = self.engine.target
        model, _ = load_model(self._target, target.device.type, target.dtype, self._revision)
        model.generation_config.eos_token_id = sorted(end_ids(target.model, target.tokenizer)) or None
        return model

    def choose_experts(self, prompts: Sequence[list[int]]) -> dict[str, float]:
        """tokens/s of transformers' generate by experts implementation; the fastest stays chosen."""
        found: dict[str, list[Timed]] = {name: [] for name in EXPERTS_IMPLEMENTATIONS}
        for number, prompt_ids in enumerate([prompts[0], *prompts]):  # the first time prepares, and counts for nothing
            for name in EXPERTS_IMPLEMENTATIONS:
                self._reference.set_experts_implementation(name)
                timed = self._transformers(prompt_ids).timed
                if number:
                    found[name].append(timed)
        speeds = {name: overall(timed) for name, timed in found.items()}
        self.experts_implementation = max(speeds, key=lambda name: speeds[name])
        self._reference.set_experts_implementation(self.experts_implementation)
        return speeds

    def write(self, arm: Arm, prompt_ids: list[int]) -> Written:
        """The arm's greedy answer, to its end; at most `num_tokens` tokens."""
        if arm.budget is None:
            return self._transformers(prompt_ids)
        generation = GenerationConfig(max_new_tokens=self.num_tokens)
        steps = self.engine.generate(prompt_ids, generation, arm.budget, arm.tree, governor=self.governors.of(arm))
        first = next(steps).summary
        began = time.perf_counter()
        summary = [first, *(step.summary for step in steps)][-1]
        seconds = time.perf_counter() - began
        assert summary is not None
        return Written(summary.token_ids, Timed(len(summary.token_ids) - 1, seconds), summary)

    @torch.inference_mode()
    def _transformers(self, prompt_ids: list[int]) -> Written:
        clock = _FirstTokenClock()
        ids_1N = torch.tensor([prompt_ids], device=self._reference.device)
        output = self._reference.generate(
            ids_1N,
            attention_mask=torch.ones_like(ids_1N),
            do_sample=False,
            max_new_tokens=self.num_tokens,
            streamer=clock,
        )
        seconds, token_ids = time.perf_counter() - clock.first_token_at, output[0, len(prompt_ids) :].tolist()
        return Written(token_ids, Timed(len(token_ids) - 1, seconds))


class _FirstTokenClock:
    """A transformers streamer that only looks at the clock: it is given the prompt first, then every token."""

    def __init__(self) -> None:
        self._num_seen, self.first_token_at = 0, 0.0

    def put(self, value: Any) -> None:
        self._num_seen += 1
        if self._num_seen == 2:
            self.first_token_at = time.perf_counter()

    def end(self) -> None:
        pass
