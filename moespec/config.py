"""What a caller may ask for: how to write, how far to guess, how much to load.

Owns the three frozen request types and their own limits. Knows nothing of a model: what depends on the loaded
model (its top-k, its number of experts, its context) is checked by the engine.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moespec.policies.base import ExpertPolicy

EMBEDDED_TARGET = Path(__file__).resolve().parent.parent / "assets" / "model"  # the model that ships with us
MAX_TREE_TOKENS = 64  # rows of one verify step; a trace keeps row ids in one byte
POLICIES = ("substitution", "truncation")
SCORES = ("softmax", "natural")
ROW_WEIGHTS = ("uniform", "depth", "path")
SCOPES = ("request", "batch")


@dataclass(frozen=True)
class GenerationConfig:
    """How to write. Processors follow transformers: temperature, then top-k, then top-p."""

    max_new_tokens: int = 256
    temperature: float = 0.0  # 0 is greedy: the setting in which losslessness can be checked by eye
    top_p: float = 1.0
    top_k: int = 0  # 0 keeps the whole vocabulary
    seed: int = 0
    ignore_eos: bool = False  # benchmarks: every run writes the same number of tokens
    stop: tuple[str, ...] = ()
    raw: bool = False  # True: a text prompt is used as it is, without the chat template
    thinking: bool = True  # False: the chat template's switch for models that think aloud first is turned off

    def __post_init__(self) -> None:
        _require(_is_int(self.max_new_tokens) and self.max_new_tokens >= 1, "max_new_tokens", self, "1 or more")
        _require(_is_number(self.temperature) and 0 <= self.temperature <= 10, "temperature", self, "0 to 10")
        _require(_is_number(self.top_p) and 0 < self.top_p <= 1, "top_p", self, "above 0 and at most 1")
        _require(_is_int(self.top_k) and self.top_k >= 0, "top_k", self, "0 (off) or more")
        _require(_is_int(self.seed) and 0 <= self.seed < 2**63, "seed", self, "a whole number, 0 to 2**63 - 1")
        stops_are_texts = isinstance(self.stop, tuple) and all(isinstance(s, str) and s for s in self.stop)
        _require(stops_are_texts, "stop", self, "a tuple of non-empty strings")


@dataclass(frozen=True)
class TreeConfig:
    """How far to guess. `total_tokens` counts the root, as the paper's tree of 63 does.

    `depth` is the deepest level below the root (EAGLE's code counts growth rounds: its 7 is our 8); `top_k` is the
    number of children tried per expanded node and the number of nodes expanded per level. Nodes that the drafter gives
    less than `min_path_p` to be reached are not verified, and a model that drafts looks for nothing below those of less
    than twice that: where it is unsure, a step stays small.
    """

    total_tokens: int = 16  # with the rest: the fastest of a dozen trees for the embedded pair on two CPU cores
    depth: int = 8
    top_k: int = 3
    min_path_p: float = 0.12

    def __post_init__(self) -> None:
        limit = MAX_TREE_TOKENS
        _require(_is_int(self.total_tokens) and 1 <= self.total_tokens <= limit, "total_tokens", self, f"1 to {limit}")
        _require(_is_int(self.depth) and 1 <= self.depth <= 16, "depth", self, "1 to 16")
        _require(_is_int(self.top_k) and 1 <= self.top_k <= 16, "top_k", self, "1 to 16")
        _require(_is_number(self.min_path_p) and 0 <= self.min_path_p < 1, "min_path_p", self, "0 to below 1")

    @staticmethod
    def parse(text: str) -> TreeConfig:
        """The tree written as `8,4,3` or, with the least probability of a path, `8,4,3,0.2`; or ValueError."""
        try:
            total, depth, top_k, *rest = text.split(",")
            shape, least = (int(total), int(depth), int(top_k)), [float(part) for part in rest]
            if len(least) > 1:
                raise ValueError
        except ValueError as error:
            raise ValueError(
                f"tree={text!r} is not TOTAL,DEPTH,TOPK[,MINP]: three whole numbers, such as 8,4,3, and a probability."
            ) from error
        return TreeConfig(*shape, *least)

    @property
    def numbers(self) -> list[int | float]:
        """What `parse` reads."""
        return [self.total_tokens, self.depth, self.top_k, self.min_path_p]


@dataclass(frozen=True)
class BudgetConfig:
    """How much to load: at most `budget` experts per layer, or the fewest that hold `coverage` of the router mass.

    Neither set means lossless. The rest is the paper's setting: softmax scores summed over equally weighted rows.
    `score="natural"` counts only weight that would be used (each row's own top-k); `row_weight="depth"` weights a row
    by `depth_decay ** depth`, `"path"` by the drafter's probability of reaching it; `protect_root` never takes an
    expert from the root, whose token is already committed. `policy` may also be a rival of MoE-Spec (`parse_policy`) or
    an `ExpertPolicy` of your own.

    `scope` is what the budget is for where several requests are verified together: each request's own tree, so that its
    text is that of a run alone, or all rows of the batch, of which a layer then reads at most `budget` experts.
    """

    budget: int | None = None
    coverage: float | None = None
    policy: str | ExpertPolicy = "substitution"
    score: str = "softmax"
    row_weight: str = "uniform"
    depth_decay: float = 0.6  # embedded-model prototypes: keeps most of the agreement at B=24
    protect_root: bool = False
    scope: str = "request"

    def __post_init__(self) -> None:
        _require(
            self.budget is None or (_is_int(self.budget) and self.budget >= 1), "budget", self, "None or 1 or more"
        )
        in_range = self.coverage is None or (_is_number(self.coverage) and 0 < self.coverage <= 1)
        _require(in_range, "coverage", self, "None, or above 0 and at most 1")
        if self.budget is not None and self.coverage is not None:
            raise ValueError(f"budget={self.budget} and coverage={self.coverage} exclude each other: set one.")
        if isinstance(self.policy, str):
            _require(self.policy in POLICIES, "policy", self, " or ".join(POLICIES))
        elif not callable(getattr(self.policy, "plan", None)):
            raise ValueError(f"policy={self.policy!r} is neither {' nor '.join(POLICIES)}, nor an object with plan().")
        _require(self.score in SCORES, "score", self, " or ".join(SCORES))
        _require(self.row_weight in ROW_WEIGHTS, "row_weight", self, ", ".join(ROW_WEIGHTS))
        _require(self.scope in SCOPES, "scope", self, " or ".join(SCOPES))
        _require(_is_number(self.depth_decay) and 0 < self.depth_decay <= 1, "depth_decay", self, "above 0, at most 1")

    @property
    def is_lossless(self) -> bool:
        """True if this setting can change no routing, whatever the model."""
        return self.budget is None and self.coverage is None and isinstance(self.policy, str)

    @property
    def policy_name(self) -> str:
        """For records: of an object its `name`, or else its class."""
        if isinstance(self.policy, str):
            return self.policy
        return getattr(self.policy, "name", type(self.policy).__name__)


def settings_dict(config: GenerationConfig | TreeConfig | BudgetConfig) -> dict:
    """The config as JSON-safe plain Python; a policy object becomes its name."""
    values = {field.name: getattr(config, field.name) for field in fields(config)}
    if isinstance(config, BudgetConfig):
        values["policy"] = config.policy_name
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value == value


def _require(ok: bool, name: str, config: object, allowed: str) -> None:
    if not ok:
        raise ValueError(f"{name}={getattr(config, name)!r} is not allowed: use {allowed}.")
