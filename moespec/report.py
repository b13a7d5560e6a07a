"""Turns one step's tensors into a StepTrace, a run's steps into a RunSummary. Knows nothing of how steps are run."""

from __future__ import annotations

import platform
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from moespec.config import BudgetConfig, GenerationConfig, TreeConfig, settings_dict
from moespec.governors.base import Governor
from moespec.recorder import RoutingCounts
from moespec.sampling import TreeOpinions
from moespec.target import Target
from moespec.trace import RunSummary, StepSettings, StepTrace, TraceHeader, TreeTrace
from moespec.types import Verdict

if TYPE_CHECKING:
    from moespec.engine import EngineInfo
    from moespec.run import Run


class Pieces:
    """Token id to what a reader sees of it, each decoded once."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._pieces: dict[int, str] = {}

    def __call__(self, token_id: int) -> str:
        if token_id not in self._pieces:
            text = "" if self._tokenizer is None else self._tokenizer.decode([token_id])
            self._pieces[token_id] = text
        return self._pieces[token_id]


def step_settings(budget: BudgetConfig, effective: int | None, tree: TreeConfig) -> StepSettings:
    """What was in force, as the trace records it."""
    return StepSettings(
        budget=budget.budget,
        effective_budget=effective,
        coverage=budget.coverage,
        policy=budget.policy_name,
        score=budget.score,
        row_weight=budget.row_weight,
        protect_root=budget.protect_root,
        tree=tree.numbers,
    )


def tree_trace(opinions: TreeOpinions, verdict: Verdict, missing_T: np.ndarray, pieces: Pieces) -> TreeTrace:
    """The tree of a step, as both models and the verdict have it."""
    tree, accepted = opinions.tree, set(verdict.path)
    token_ids = tree.tokens_T.tolist()
    parents_T, logp_T, node_logp_T = map(_host, (tree.parents_T, tree.draft_logp_T, opinions.node_logp_T))
    return TreeTrace(
        token_ids=token_ids,
        pieces=[pieces(token) for token in token_ids],
        parents=parents_T.tolist(),
        depths=tree.depths_T.tolist(),
        draft_p=_probabilities(logp_T - logp_T[parents_T.clip(min=0)]),
        path_p=_probabilities(logp_T),
        target_p=[None, *_probabilities(node_logp_T[1:])],
        accepted=[row in accepted for row in range(tree.num_rows)],
        missing=missing_T.tolist(),
        target_top=_alternatives(opinions.top_ids_TA, opinions.top_logp_TA, pieces),
        draft_top=[[] for _ in token_ids]
        if tree.alt_ids_TA is None or tree.alt_logp_TA is None
        else _alternatives(tree.alt_ids_TA, tree.alt_logp_TA, pieces),
    )


def _alternatives(ids_TA: Tensor, logp_TA: Tensor, pieces: Pieces) -> list[list[list]]:
    rows = zip(ids_TA.tolist(), _probabilities(_host(logp_TA), digits=5), strict=True)
    return [
        [[token, pieces(token), p] for token, p in zip(ids, probabilities, strict=True) if token >= 0]
        for ids, probabilities in rows
    ]


def _probabilities(logp: np.ndarray, digits: int = 6) -> list:
    return np.round(np.exp(logp.astype(float)), digits).tolist()


def _host(values: Tensor) -> np.ndarray:
    """For numpy, which keeps the interpreter: torch lets go of it for each operation, and waits behind a step."""
    return values.numpy(force=True)


@dataclass
class StepFacts:
    """What the loop knows of a step."""

    kind: str
    token_ids: list[int]
    text: str
    origins: list[int]
    settings: StepSettings
    draft_ms: float = 0.0
    verify_ms: float = 0.0
    tree: tuple[TreeOpinions, Verdict] | None = None
    counts: RoutingCounts | None = None
    share_read: float | None = None  # in a batch: see `Verified`


def step_trace(facts: StepFacts, number: int, lossless: bool, target: Target, pieces: Pieces) -> StepTrace:
    """The trace of a step; its times are filled in by the loop."""
    counts = facts.counts
    natural, kept, active = ([], [], []) if counts is None else counts.num_experts_by_layer()
    num_read = sum(active) if facts.share_read is None else facts.share_read
    return StepTrace.deferred(
        *_details(facts, target, pieces),
        step=number,
        kind=facts.kind,
        t_ms=0.0,
        token_ids=facts.token_ids,
        pieces=[pieces(token) for token in facts.token_ids],
        text=facts.text,
        origins=facts.origins,
        settings=facts.settings,
        experts_natural=natural,
        experts_kept=kept,
        experts_active=active,
        mass_kept=1.0 if counts is None else statistics.fmean(counts.mass_kept_L.tolist()),
        expert_bytes=round(num_read * target.bytes_per_expert),
        draft_ms=facts.draft_ms,
        verify_ms=facts.verify_ms,
        other_ms=0.0,
        lossless=lossless,
    )


def _details(facts: StepFacts, target: Target, pieces: Pieces) -> tuple[Callable, Callable]:
    """Make the TreeTrace and the list of LayerTrace from what is kept of a step."""
    counts = facts.counts
    if counts is None or facts.tree is None:
        return lambda: None, list
    opinions, verdict = facts.tree
    layers = [moe.layer for moe in target.moe_layers]
    return (
        lambda: tree_trace(opinions, verdict, _host(counts.missing_LT).sum(axis=0), pieces),
        lambda: counts.layer_traces(layers),
    )


@dataclass
class RunTotals:
    """Sums over a run, for its summary."""

    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    num_steps_seen: int = 0  # prefill included
    num_first_tokens: int = 0
    first_token_ms: float = 0.0
    draft_ms: float = 0.0
    verify_ms: float = 0.0
    other_ms: float = 0.0
    lossless: bool = True
    per_tree_step: dict[str, list[float]] = field(default_factory=dict)

    def add(self, step: StepTrace) -> None:
        self.token_ids += step.token_ids
        self.text += step.text
        self.num_steps_seen += 1
        self.lossless = self.lossless and step.lossless
        if step.kind == "prefill":
            self.first_token_ms, self.num_first_tokens = step.t_ms, len(step.token_ids)
            return
        self.draft_ms += step.draft_ms
        self.verify_ms += step.verify_ms
        self.other_ms += step.other_ms
        if step.kind == "tree":
            for name in ("experts_natural", "experts_kept", "experts_active"):
                by_layer = getattr(step, name)
                self.per_tree_step.setdefault(name, []).append(sum(by_layer) / len(by_layer))
            self.per_tree_step.setdefault("mass_kept", []).append(step.mass_kept)

    def mean(self, name: str) -> float | None:
        """Mean over tree steps; None if there was none."""
        values = self.per_tree_step.get(name)
        return sum(values) / len(values) if values else None


def summarise(run: Run) -> RunSummary:
    """The summary of a finished run."""
    totals = run.totals
    num_steps, num_tokens = totals.num_steps_seen - 1, len(totals.token_ids) - totals.num_first_tokens
    decode_ms = totals.draft_ms + totals.verify_ms + totals.other_ms
    mass_kept = totals.mean("mass_kept")
    return RunSummary(
        text=totals.text,
        prompt_token_ids=run.prompt_ids,
        token_ids=totals.token_ids,
        num_steps=num_steps,
        tokens_per_step=num_tokens / num_steps if num_steps else 0.0,
        tokens_per_s=1e3 * num_tokens / decode_ms if decode_ms else 0.0,
        first_token_ms=totals.first_token_ms,
        total_ms=totals.first_token_ms + decode_ms,
        draft_ms=totals.draft_ms,
        verify_ms=totals.verify_ms,
        other_ms=totals.other_ms,
        experts_natural=totals.mean("experts_natural"),
        experts_kept=totals.mean("experts_kept"),
        experts_active=totals.mean("experts_active"),
        mass_kept=1.0 if mass_kept is None else mass_kept,
        lossless=totals.lossless,
        finish_reason=run.finish_reason or "",
        settings=run_settings(run.generation, run.budget, run.tree, run.governor),
        device=run.card(),
    )


def run_settings(
    generation: GenerationConfig, budget: BudgetConfig, tree: TreeConfig, governor: Governor | None
) -> dict:
    """All of a request's settings, JSON-safe."""
    parts = (("generation", generation), ("budget", budget), ("tree", tree))
    return {name: settings_dict(part) for name, part in parts} | {"governor": governor.name if governor else "fixed"}


def trace_header(
    info: EngineInfo,
    card: dict,
    prompt: Any,
    generation: GenerationConfig,
    budget: BudgetConfig,
    tree: TreeConfig,
    governor: Governor | None = None,
) -> TraceHeader:
    """Line 1 of the trace of an answer by the engine of `info` and `card`."""
    return TraceHeader(
        settings=run_settings(generation, budget, tree, governor),
        seed=generation.seed,
        device=card,
        model={"name": info.model_name, "num_experts": info.num_experts, "top_k": info.top_k},
        drafter={"name": info.drafter_name, "reason": info.drafter_reason, "tap_layers": [*info.tap_layers]},
        prompt=prompt if isinstance(prompt, str | list) else prompt.tolist(),
    )


def device_card(device: torch.device, dtype: torch.dtype, backend: str) -> dict:
    """What a figure was measured on."""
    import transformers

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()
    return {
        "device": device.type,
        "name": name,
        "threads": torch.get_num_threads(),
        "dtype": str(dtype).removeprefix("torch."),
        "backend": backend,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
