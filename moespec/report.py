"""Turns one step's tensors into a StepTrace, and a run's steps into a RunSummary. Knows nothing of how steps are run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from moespec.config import BudgetConfig, TreeConfig
from moespec.recorder import RoutingCounts
from moespec.trace import StepSettings, StepTrace, TreeTrace
from moespec.tree import NUM_ALTERNATIVES
from moespec.types import DraftTree, Verdict


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
        tree=[tree.total_tokens, tree.depth, tree.top_k],
    )


def tree_trace(
    tree: DraftTree, logits_TV: Tensor, verdict: Verdict, missing_T: Tensor, pieces: Pieces
) -> TreeTrace:
    """The tree with both models' opinions of it. Probabilities are unprocessed: no temperature, no top-p."""
    log_total_T = logits_TV.logsumexp(dim=-1)
    top = logits_TV.topk(min(NUM_ALTERNATIVES, logits_TV.shape[-1]), dim=-1)
    top_p_TA = (top.values - log_total_T[:, None]).exp()
    up_T = tree.parents_T.clamp(min=0)
    target_p_T = (logits_TV[up_T, tree.tokens_T] - log_total_T[up_T]).exp()
    path_p_T = tree.draft_logp_T.exp()
    node_p_T = (tree.draft_logp_T - tree.draft_logp_T[up_T]).exp()
    token_ids = tree.tokens_T.tolist()
    accepted = set(verdict.path)
    return TreeTrace(
        token_ids=token_ids,
        pieces=[pieces(token) for token in token_ids],
        parents=tree.parents_T.tolist(),
        depths=tree.depths_T.tolist(),
        draft_p=_rounded(node_p_T),
        path_p=_rounded(path_p_T),
        target_p=[None, *_rounded(target_p_T[1:])],
        accepted=[row in accepted for row in range(tree.num_rows)],
        missing=missing_T.tolist(),
        target_top=_alternatives(top.indices, top_p_TA, pieces),
        draft_top=[[] for _ in token_ids]
        if tree.alt_ids_TA is None or tree.alt_logp_TA is None
        else _alternatives(tree.alt_ids_TA, tree.alt_logp_TA.exp(), pieces),
    )


def _alternatives(ids_TA: Tensor, p_TA: Tensor, pieces: Pieces) -> list[list[list]]:
    rows = zip(ids_TA.tolist(), p_TA.tolist(), strict=True)
    return [
        [[token, pieces(token), round(p, 5)] for token, p in zip(ids, probabilities, strict=True) if token >= 0]
        for ids, probabilities in rows
    ]


def _rounded(values: Tensor) -> list[float]:
    return [round(value, 6) for value in values.tolist()]


@dataclass
class RunTotals:
    """Sums over a run, for its summary. Expert counts and mass are over tree steps alone."""

    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    num_steps: int = 0
    draft_ms: float = 0.0
    verify_ms: float = 0.0
    other_ms: float = 0.0
    first_token_ms: float = 0.0
    num_first_tokens: int = 0
    lossless: bool = True
    natural: list[float] = field(default_factory=list)
    kept: list[float] = field(default_factory=list)
    active: list[float] = field(default_factory=list)
    mass: list[float] = field(default_factory=list)

    def add(self, step: StepTrace) -> None:
        self.token_ids += step.token_ids
        self.text += step.text
        self.draft_ms += step.draft_ms
        self.verify_ms += step.verify_ms
        self.other_ms += step.other_ms
        self.lossless = self.lossless and step.lossless
        if step.kind == "prefill":
            self.first_token_ms, self.num_first_tokens = step.t_ms, len(step.token_ids)
            return
        self.num_steps += 1
        if step.kind == "tree":
            num_layers = len(step.experts_natural)
            self.natural.append(sum(step.experts_natural) / num_layers)
            self.kept.append(sum(step.experts_kept) / num_layers)
            self.active.append(sum(step.experts_active) / num_layers)
            self.mass.append(step.mass_kept)


def mean_or_none(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None


def counts_in_trace(counts: RoutingCounts) -> dict[str, list[int]]:
    """The three per-layer expert counts of a StepTrace."""
    return {
        "experts_natural": counts.natural_LE.sum(dim=1).tolist(),
        "experts_kept": counts.kept_LE.sum(dim=1).tolist(),
        "experts_active": counts.active_LE.sum(dim=1).tolist(),
    }


def device_card(device: torch.device, dtype: torch.dtype, backend: str) -> dict:
    """What a figure was measured on."""
    import platform

    import transformers

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()
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


def _cpu_name() -> str:
    import platform

    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
