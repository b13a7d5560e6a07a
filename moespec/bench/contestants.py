"""Runs one arm on one prompt and says what it wrote and what it cost. Owns the clock's place: after the first token.

The prompt's own forward is in no figure, for no arm. Knows nothing of statistics.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moespec.bench.arms import Arm
from moespec.bench.governed import Governors
from moespec.config import GenerationConfig
from moespec.engine import Engine
from moespec.models import load_model
from moespec.trace import RunSummary

# transformers' own ways to run experts; the fastest on this machine stands for it.
EXPERTS_IMPLEMENTATIONS = ("eager", "grouped_mm", "batched_mm")


@dataclass(frozen=True)
class Written:
    """One arm's text for one prompt. `seconds` covers the tokens after the first."""

    token_ids: list[int]
    seconds: float
    summary: RunSummary | None = None

    @property
    def tokens_per_s(self) -> float:
        return (len(self.token_ids) - 1) / self.seconds


class Contestants:
    """The engine and, beside it, the same weights in an untouched transformers model."""

    def __init__(self, engine: Engine, target: str | Path, num_tokens: int) -> None:
        self.engine, self.num_tokens, self.governors = engine, num_tokens, Governors(engine)
        self._reference, _ = load_model(target, engine.target.device.type, engine.target.dtype)
        self._reference.generation_config.eos_token_id = None  # every arm writes the same number of tokens
        self.experts_implementation = ""

    def choose_experts(self, prompt_ids: list[int]) -> dict[str, float]:
        """tokens/s of transformers' generate by experts implementation; the fastest stays chosen."""
        speeds: dict[str, list[float]] = {name: [] for name in EXPERTS_IMPLEMENTATIONS}
        for round_number in range(4):
            for name in EXPERTS_IMPLEMENTATIONS:
                self._reference.set_experts_implementation(name)
                speed = self._transformers(prompt_ids).tokens_per_s
                if round_number:
                    speeds[name].append(speed)
        medians = {name: sorted(values)[len(values) // 2] for name, values in speeds.items()}
        self.experts_implementation = max(medians, key=lambda name: medians[name])
        self._reference.set_experts_implementation(self.experts_implementation)
        return medians

    def write(self, arm: Arm, prompt_ids: list[int]) -> Written:
        """The arm's greedy text of `num_tokens` tokens; the end of sequence does not end it."""
        if arm.budget is None:
            return self._transformers(prompt_ids)
        generation = GenerationConfig(max_new_tokens=self.num_tokens, ignore_eos=True)
        steps = self.engine.generate(prompt_ids, generation, arm.budget, arm.tree, governor=self.governors.of(arm))
        next(steps)
        began = time.perf_counter()
        summary = [step.summary for step in steps][-1]
        seconds = time.perf_counter() - began
        assert summary is not None
        return Written(summary.token_ids, seconds, summary)

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
        return Written(output[0, len(prompt_ids) :].tolist(), time.perf_counter() - clock.first_token_at)


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
