"""What `bench methods` compares: every expert policy at matched experts per layer, every governor, and the baselines
that a sceptic would ask for.

Owns the groups of arms and the search for each method's setting that reads as many experts as the others. Knows nothing
of how arms are measured.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from moespec.bench.arms import LARGE, Arm, parse_arm
from moespec.config import GenerationConfig, TreeConfig
from moespec.engine import Engine

# Groups: governors against fixed settings, class by class; the same with floors, lossy; every expert policy.
LOSSLESS, FLOORED, MATCHED = "lossless", "with a floor of mass", "at matched experts"
NUM_MATCHING_TOKENS = 48  # of each prompt, to see how many experts a setting reads
CHAINS = ("3,2,1,0", "4,3,1,0", "5,4,1,0")  # of depth 2 to 4
SMALL_TREES = ("4,3,3,0", "6,4,3,0", "8,5,4,0")
GOVERNED_TREE = "16,8,3,0.02"  # what governors choose from
STOPPING_TREE = "16,8,3,0.12"  # what those choose from, too, that do not stop growing by themselves
FIXED_TREES = ("16,8,3,0.2", "16,8,3,0.12", "16,8,3,0.06", "9,8,1,0.2", "9,8,1,0.1")
FIXED_BUDGETS = ("moe-spec:b=8", "moe-spec:b=12", "moe-spec:b=16")


@dataclass(frozen=True)
class Family:
    """A method and the settings of its that are tried, from few experts to many."""

    name: str
    settings: tuple[str, ...]


def families(top_k: int, num_experts: int) -> list[Family]:
    """All methods with a knob that moves how many experts are read."""
    budgets = [budget for budget in range(top_k, num_experts, 1 if num_experts <= 16 else 2)]
    slots = range(1, top_k + 1)
    shares = [f"{share:.2f}" for share in (0.3, 0.35, 0.4, 0.45, 0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9)]
    scales = [f"{scale:.2f}" for scale in (0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.2, 1.5)]

    def over(name: str, spelling: str, values: Sequence[object]) -> Family:
        return Family(name, tuple(spelling.format(value) for value in values))

    return [
        over("moe-spec", "moe-spec:b={}", budgets),
        over("moe-spec, truncating", "moe-spec:b={},policy=truncation", budgets),
        over("moe-spec, coverage", "moe-spec:coverage={}", shares),
        over("moe-spec, natural weights by path", "moe-spec:b={},score=natural,row-weight=path", budgets),
        over("moe-spec, by depth", "moe-spec:b={},row-weight=depth", budgets),
        over("moe-spec, root kept", "moe-spec:b={},root", budgets),
        over("alloc-moe-like", "alloc-moe-like:b={}", budgets),
        over("accept-moe-like", "accept-moe-like:scale={}", scales),
        over("sere", "sere:s={}", slots),
        over("sere, protected", "sere:s={},rho=0.5", slots),
        over("oea", "oea:k0={}", slots),
        over("top-s", "top-s:s={}", slots),
        over("random", "random:b={}", budgets),
        over("oracle", "oracle:b={}", budgets),
    ]


def matched_arms(
    engine: Engine, wanted: float, prompts: Sequence[list[int]], profiles: Path | None, progress: Callable[[str], None]
) -> Iterator[Arm]:
    """Each method at the setting whose mean experts read per layer is nearest to `wanted`, at the large tree.

    Experts read do not fall along a family's settings, so that a bisection finds the nearest.
    """
    tree = _numbers(LARGE)
    for family in families(engine.target.top_k, engine.target.num_experts):
        found: dict[str, float] = {}

        def num_read(setting: str, found: dict[str, float] = found) -> float:
            if setting not in found:
                found[setting] = _num_read(engine, parse_arm(f"{setting}@{tree}", profiles), prompts)
            return found[setting]

        low, high = 0, len(family.settings) - 1
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if num_read(family.settings[middle]) <= wanted else (low, middle)
        best = min((family.settings[low], family.settings[high]), key=lambda setting: abs(num_read(setting) - wanted))
        progress(f"{family.name}: {best} reads {num_read(best):.1f} experts per layer")
        yield parse_arm(f"{best}@{tree}", profiles)


def _num_read(engine: Engine, arm: Arm, prompts: Sequence[list[int]]) -> float:
    """Experts per layer that tree steps read, mean over short texts."""
    generation = GenerationConfig(NUM_MATCHING_TOKENS)
    counts = []
    for prompt in prompts:
        assert arm.budget is not None and arm.tree is not None
        summary = [step.summary for step in engine.generate(prompt, generation, arm.budget, arm.tree)][-1]
        if summary is not None and summary.experts_active is not None:
            counts.append(summary.experts_active)
    if not counts:
        raise ValueError(f"{arm.key} wrote no tree step: give prompts with longer answers.")
    return statistics.fmean(counts)


def groups(matched: Sequence[Arm], floors: Sequence[float]) -> dict[str, list[Arm]]:
    """Arms by the question they answer; each group is measured by itself, and what it compares is in it.

    A setting that runs alone finds its code and its experts in the processor's caches; among fifty others it does not,
    and the more a method does between two forwards, the more it loses.
    """
    return {
        LOSSLESS: [*baseline_arms(), *swept_arms(("eagle3",)), *governed_arms()],
        FLOORED: [parse_arm("plain"), *swept_arms(("eagle3", *FIXED_BUDGETS)), *floored_arms(floors)],
        MATCHED: [parse_arm("plain"), parse_arm(f"eagle3@{_numbers(LARGE)}"), *matched],
    }


def baseline_arms() -> list[Arm]:
    """Lossless: plain decoding, chains, small trees, and the tree that policies are compared at."""
    trees = (*CHAINS, *SMALL_TREES, _numbers(LARGE))
    return [parse_arm("plain"), *(parse_arm(f"eagle3@{tree}") for tree in trees)]


def governed_arms() -> list[Arm]:
    """EVICT, Cascade and utility, lossless."""
    rivals = [f"{name}@{tree}" for name in ("evict", "cascade-like") for tree in (GOVERNED_TREE, STOPPING_TREE)]
    return [parse_arm(arm) for arm in (*rivals, f"utility@{GOVERNED_TREE}")]


def floored_arms(floors: Sequence[float]) -> list[Arm]:
    """Utility under each floor of router mass."""
    return [parse_arm(f"utility:floor={floor:g}@{GOVERNED_TREE}") for floor in floors]


def swept_arms(names: Sequence[str]) -> list[Arm]:
    """Fixed settings that a governor is held against: trees and chains that stop early or late."""
    return [parse_arm(f"{name}@{tree}") for tree in FIXED_TREES for name in names]


def _numbers(tree: TreeConfig) -> str:
    return ",".join(f"{number:g}" for number in tree.numbers)
