"""One spelling of every expert policy, for command line, benchmarks, quality and traces: `NAME[:key=value,...]`.

Owns the names and the refusals; what a method's keys mean is the method's. Knows no formula.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import MISSING, Field, dataclass
from pathlib import Path
from typing import Any, ClassVar

from moespec.config import BudgetConfig
from moespec.policies.accept_moe import AcceptMoELike
from moespec.policies.layer_budgets import AllocMoELike
from moespec.policies.method import Method, Spelled
from moespec.policies.oea import OEA
from moespec.policies.oracle import Oracle
from moespec.policies.random_set import RandomSet
from moespec.policies.sere import Sere
from moespec.policies.top_s import TopS


@dataclass(frozen=True)
class _MoESpec(Spelled):
    """The keys of MoE-Spec, which `BudgetConfig` carries in fields of its own: without an object it runs compiled."""

    method: ClassVar[str] = "moe-spec"
    b: int | None = None
    coverage: float | None = None
    policy: str = "substitution"
    score: str = "softmax"
    row_weight: str = "uniform"
    depth_decay: float = BudgetConfig.depth_decay
    root: bool = False

    def config(self) -> BudgetConfig:
        if self.b is None and self.coverage is None:
            raise ValueError("moe-spec needs b or coverage: write moe-spec:b=... or moe-spec:coverage=...")
        return BudgetConfig(
            budget=self.b,
            coverage=self.coverage,
            policy=self.policy,
            score=self.score,
            row_weight=self.row_weight,
            depth_decay=self.depth_decay,
            protect_root=self.root,
        )


_METHODS: dict[str, type[Method]] = {
    kind.method: kind for kind in (AllocMoELike, AcceptMoELike, OEA, Sere, TopS, RandomSet, Oracle)
}
NAMES = ("none", _MoESpec.method, *_METHODS)


def parse_policy(text: str, profiles: Path | None = None) -> BudgetConfig:
    """The budget written as `none`, `moe-spec:b=12,score=natural,root`, `sere:s=2,rho=0.3`, `oracle`, and so on.

    `profiles`: the folder of calibration files, for methods that need one (`profiles.profiles_folder`). ValueError says
    in one sentence what cannot be read or found; whether the parameters fit a model is `Engine.check_budget`'s to say.
    """
    name, colon, rest = text.partition(":")
    if name not in NAMES or (colon and not rest) or (rest and name == "none"):
        raise ValueError(f"policy {text!r} cannot be read: write NAME or NAME:key=value,... with {', '.join(NAMES)}.")
    if name == "none":
        return BudgetConfig()
    if name == _MoESpec.method:
        return _MoESpec(**_values(_MoESpec, rest)).config()
    kind = _METHODS[name]
    return BudgetConfig(policy=kind.read(_values(kind, rest), profiles))


def _values(kind: type[Spelled], text: str) -> dict[str, Any]:
    """Field name -> value of what stands behind the method's name."""
    parameters = {field.name.replace("_", "-"): field for field in kind.parameters()}
    values: dict[str, Any] = {}
    for part in filter(None, text.split(",")):
        key, equals, value = part.partition("=")
        if key not in parameters:
            raise ValueError(f"{kind.method} has no {key!r}: its keys are {', '.join(parameters)}.")
        field = parameters[key]
        if field.name in values:
            raise ValueError(f"{kind.method}: {key} is given twice.")
        values[field.name] = _value(kind, key, field, value if equals else None)
    for key, field in parameters.items():
        if field.default is MISSING and field.name not in values:
            raise ValueError(f"{kind.method} needs {key}: write {kind.method}:{key}=...")
    return values


def _value(kind: type[Spelled], key: str, field: Field[Any], text: str | None) -> Any:
    read, wanted = _READERS[str(field.type).removesuffix(" | None")]
    try:
        return read(text)
    except (ValueError, TypeError) as error:
        found = key if text is None else f"{key}={text}"
        raise ValueError(f"{kind.method}: {found} is not understood: {key} is {wanted}.") from error


def _flag(text: str | None) -> bool:
    if text is not None:
        raise ValueError
    return True


def _word(text: str | None) -> str:
    if not text:
        raise ValueError
    return text


# Type of a field, as it is written -> (reader, what it reads).
_READERS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "int": (int, "a whole number"),
    "float": (float, "a number"),
    "str": (_word, "a word"),
    "bool": (_flag, "a word of its own, without a value"),
}
