"""Everything a visitor may choose, flat and JSON-safe: what the controls, a link, the history and the API all hold.

Owns names, defaults and presets. What a value means is the engine's configs' to say, and what they refuse is refused
here. Knows nothing of widgets.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields, replace
from typing import Any

from moespec import BudgetConfig, GenerationConfig, TreeConfig

MAX_SYSTEM_CHARACTERS = 4000
DRAFTERS = ("auto", "ngram", "none")
GOVERNORS = ("fixed", "evict", "cascade-like", "utility", "utility:floor=0.7", "utility:floor=0.85")


@dataclass(frozen=True)
class Settings:
    """How much to load (budget to method), how far to guess (drafter to governor), how to write (the rest).

    budget: experts per layer, None for no budget. method: a rival's setting (`oea:k0=2`), which then stands for all of
    the budget's. Making one raises ValueError with the name of what is not allowed.
    """

    # 16 is the least on the embedded model's frontier (assets/bench), with the paper's score, that loses less than two
    # points of exact match for sure; it agrees on 98 % of next tokens.
    budget: int | None = 16
    policy: str = "substitution"
    score: str = "softmax"
    row_weight: str = "uniform"
    protect_root: bool = False
    method: str = ""
    drafter: str = "auto"
    total_tokens: int = TreeConfig.total_tokens
    depth: int = TreeConfig.depth
    top_k: int = TreeConfig.top_k
    min_path_p: float = TreeConfig.min_path_p
    governor: str = "fixed"
    temperature: float = 0.0
    top_p: float = 1.0
    max_new_tokens: int = 192
    seed: int = 0
    ignore_eos: bool = False
    system: str = ""

    def __post_init__(self) -> None:
        for name in ("protect_root", "ignore_eos"):
            _require(isinstance(getattr(self, name), bool), self, name, "true or false")
        for name in ("method", "system"):
            _require(isinstance(getattr(self, name), str), self, name, "a text")
        _require(self.drafter in DRAFTERS, self, "drafter", " or ".join(DRAFTERS))
        _require(self.governor in GOVERNORS, self, "governor", ", ".join(GOVERNORS))
        if self.method.strip() and "floor" in self.governor:
            raise ValueError(
                f"governor={self.governor!r} chooses a budget, and method={self.method!r} is one: use one."
            )
        if isinstance(self.budget, float):
            raise ValueError(f"budget={self.budget} is no number of experts: use a whole number, such as 16.")
        if len(self.system) > MAX_SYSTEM_CHARACTERS:
            raise ValueError(f"The system prompt is longer than {MAX_SYSTEM_CHARACTERS} characters: shorten it.")
        _ = self.budget_config, self.tree_config, self.generation_config

    @property
    def budget_config(self) -> BudgetConfig:
        if self.method.strip():
            from moespec import EMBEDDED_PROFILES, parse_policy  # here, because torch takes seconds

            return parse_policy(self.method.strip(), EMBEDDED_PROFILES)
        if self.budget is None:
            return BudgetConfig()
        return BudgetConfig(
            budget=self.budget,
            policy=self.policy,
            score=self.score,
            row_weight=self.row_weight,
            protect_root=self.protect_root,
        )

    @property
    def tree_config(self) -> TreeConfig:
        if self.drafter == "none":
            return TreeConfig(1)
        return TreeConfig(self.total_tokens, self.depth, self.top_k, self.min_path_p)

    @property
    def generation_config(self) -> GenerationConfig:
        return GenerationConfig(
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            seed=self.seed,
            ignore_eos=self.ignore_eos,
        )

    @property
    def is_lossless(self) -> bool:
        """Whether nothing asked for here changes what the target would write."""
        return self.budget_config.is_lossless and "floor" not in self.governor

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def changed(self) -> dict[str, Any]:
        """What differs from the defaults: enough for a link."""
        return {field.name: value for field in fields(self) if (value := getattr(self, field.name)) != _default(field)}

    @staticmethod
    def from_json(values: Mapping[str, Any], base: Settings | None = None) -> Settings:
        """What is not named is as in `base`, or has its default. ValueError names what is unknown or not allowed."""
        if not isinstance(values, Mapping):
            raise ValueError(f'settings={values!r} are no settings: write names and values, such as {{"budget": 16}}.')
        unknown = sorted(set(values) - {field.name for field in fields(Settings)})
        if unknown:
            raise ValueError(f"setting {unknown[0]!r} is not known: use {', '.join(f.name for f in fields(Settings))}.")
        return replace(base or Settings(), **{name: _whole(value) for name, value in values.items()})


def _whole(value: Any) -> Any:
    """Sliders and JavaScript hand over floats; what is not a whole number is left for the configs to refuse."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _default(field: Any) -> Any:
    assert field.default is not MISSING
    return field.default


def _require(ok: bool, settings: Settings, name: str, allowed: str) -> None:
    if not ok:
        raise ValueError(f"{name}={getattr(settings, name)!r} is not allowed: use {allowed}.")


# name to what it is for, in one sentence
PRESETS = {
    "Lossless": "No budget: the model's own text, token for token.",
    "Balanced": "Reads few experts, loses next to nothing.",
    "Tight": "As few experts as one token uses: faster, and you can see the loss.",
    "Adaptive": "No budget; the tree grows and shrinks by what earlier steps paid.",
}


def presets(top_k: int, num_experts: int) -> dict[str, Settings]:
    """By name, for a model of so many experts: budgets are the shares of them that the embedded model's would be."""
    balanced = Settings(budget=min(num_experts, max(top_k, round(num_experts * 16 / 64))))
    lossless = replace(balanced, budget=None)
    found = lossless, balanced, replace(balanced, budget=top_k), replace(lossless, governor="utility", min_path_p=0.02)
    return dict(zip(PRESETS, found, strict=True))
