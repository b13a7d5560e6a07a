"""What other programs ask and are told, whatever the protocol: defaults, stop texts, steps and counters.

Pure. Owns the names that programs read; knows nothing of Gradio or HTTP.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from app.limits import Limits
from app.settings import DRAFTERS, GOVERNORS, MAX_SYSTEM_CHARACTERS, Settings, presets
from moespec import RunSummary, StepTrace
from moespec.config import MAX_TREE_TOKENS, POLICIES, ROW_WEIGHTS, SCORES

if TYPE_CHECKING:
    from moespec import EngineInfo

MAX_STOPS = 4
DEFAULT_PRESET = "Balanced"


@dataclass
class Counters:
    """What an answer has cost so far. Steps are those after the prompt's, which writes the first token."""

    num_steps: int = 0
    num_tokens: int = 0
    num_drafted: int = 0
    num_accepted: int = 0
    prompt_ms: float = 0.0
    draft_ms: float = 0.0
    verify_ms: float = 0.0
    other_ms: float = 0.0

    def add(self, step: StepTrace) -> None:
        self.num_tokens += len(step.token_ids)
        if step.kind == "prefill":
            self.prompt_ms = step.t_ms
            return
        self.num_steps += 1
        self.num_drafted += num_drafted(step)
        self.num_accepted += step.num_accepted
        self.draft_ms += step.draft_ms
        self.verify_ms += step.verify_ms
        self.other_ms += step.other_ms


def num_drafted(step: StepTrace) -> int:
    """Rows of the tree below its root."""
    return 0 if step.tree is None else len(step.tree.parents) - 1


def step_json(step: StepTrace, counters: Counters) -> dict[str, Any]:
    """One step without its tree and layers, and the counters, it included. experts: per layer, mean over the layers.

    No list holds another: of those Gradio sends wrong differences where they shrink.
    """
    return {
        "step": step.step,
        "kind": step.kind,
        "t_ms": step.t_ms,
        "text": step.text,
        "token_ids": step.token_ids,
        "num_drafted": num_drafted(step),
        "num_accepted": step.num_accepted,
        "draft_ms": step.draft_ms,
        "verify_ms": step.verify_ms,
        "other_ms": step.other_ms,
        "budget": step.settings.effective_budget,
        "experts_natural": _mean(step.experts_natural),
        "experts_active": _mean(step.experts_active),
        "expert_bytes": step.expert_bytes,
        "mass_kept": step.mass_kept,
        "lossless": step.lossless,
        "counters": asdict(counters),
        "summary": None if step.summary is None else asdict(step.summary),
    }


def outcome_json(summary: RunSummary, counters: Counters, settings: Settings) -> dict[str, Any]:
    """What a finished answer was asked with, read and cost. experts: per layer, mean over tree steps and layers."""
    names = ("lossless", "tokens_per_s", "tokens_per_step", "experts_natural", "experts_active", "mass_kept")
    return {name: getattr(summary, name) for name in names} | {
        "counters": asdict(counters),
        "settings": settings.to_json(),
    }


def defaults(info: EngineInfo, limits: Limits) -> Settings:
    """What is asked with where a program names nothing: the page's, for this model."""
    balanced = presets(info.top_k, info.num_experts)[DEFAULT_PRESET]
    return replace(balanced, max_new_tokens=min(balanced.max_new_tokens, limits.max_new_tokens))


def messages_of(prompt: Any) -> list[dict]:
    """A text as the one message of a chat. ValueError for what is neither that nor a list; the engine looks inside."""
    if not isinstance(prompt, str | list) or not prompt:
        raise ValueError(f"prompt={prompt!r} is not allowed: use a text, or a list of messages with role and content.")
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


def stop_texts(stop: Any) -> tuple[str, ...]:
    """A text, or a list of up to MAX_STOPS, or None for none; ValueError for anything else."""
    stops = [] if stop is None else [stop] if isinstance(stop, str) else stop
    if not isinstance(stops, list) or len(stops) > MAX_STOPS or not all(isinstance(one, str) and one for one in stops):
        raise ValueError(f"stop={stop!r} is not allowed: use a text, or a list of up to {MAX_STOPS} texts.")
    return tuple(stops)


def allowed(info: EngineInfo, limits: Limits) -> dict[str, dict[str, Any]]:
    """What each setting may be for this model, as JSON schema."""
    found: dict[str, dict[str, Any]] = {
        "budget": {"type": ["integer", "null"], "minimum": info.top_k, "maximum": info.num_experts},
        "policy": {"enum": [*POLICIES]},
        "score": {"enum": [*SCORES]},
        "row_weight": {"enum": [*ROW_WEIGHTS]},
        "protect_root": {"type": "boolean"},
        "method": {"type": "string"},
        "drafter": {"enum": [*DRAFTERS]},
        "total_tokens": {"type": "integer", "minimum": 1, "maximum": MAX_TREE_TOKENS},
        "depth": {"type": "integer", "minimum": 1, "maximum": 16},
        "top_k": {"type": "integer", "minimum": 1, "maximum": 16},
        "min_path_p": {"type": "number", "minimum": 0, "exclusiveMaximum": 1},
        "governor": {"enum": [*GOVERNORS]},
        "temperature": {"type": "number", "minimum": 0, "maximum": 10},
        "top_p": {"type": "number", "exclusiveMinimum": 0, "maximum": 1},
        "max_new_tokens": {"type": "integer", "minimum": 1, "maximum": limits.max_new_tokens},
        "seed": {"type": "integer", "minimum": 0, "maximum": 2**63 - 1},
        "ignore_eos": {"type": "boolean"},
        "system": {"type": "string", "maxLength": MAX_SYSTEM_CHARACTERS},
    }
    assert [*found] == [field.name for field in fields(Settings)]
    return found


def _mean(values: Sequence[int]) -> float:
    return sum(values) / len(values) if values else 0.0
