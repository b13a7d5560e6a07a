"""What `bench methods` compares: every expert policy at matched experts per layer, every governor, and the baselines
that a sceptic would ask for.

Owns the list of arms and the search for each method's setting that reads as many experts as the others. Knows nothing
of how arms are measured.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from moespec.bench.arms import DEFAULT, LARGE, Arm, parse_arm
from moespec.config import GenerationConfig
from moespec.engine import Engine

NUM_MATCHING_TOKENS = 48  # of each prompt, to see how many experts a setting reads
CHAINS = ("3,2,1,0", "4,3,1,0", "5,4,1,0")  # of depth 2 to 4
SMALL_TREES = ("4,3,3,0", "6,4,3,0", "8,5,4,0")
GOVERNED_TREE = "16,8,3,0.02"  # what governors choose from
STOPPING_TREE = "16,8,3,0.12"  # what those choose from, too, that do not stop growing by themselves
FIXED_TREES = ("16,8,3,0.2", "16,8,3,0.12", "16,8,3,0.06", "9,8,1,0.2", "9,8,1,0.1")
FIXED_BUDGETS = (8, 12, 16)


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
    tree = ",".join(f"{number:g}" for number in LARGE.numbers)
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


def baseline_arms() -> list[Arm]:
    """Lossless: plain decoding, chains, smaller trees, and the two trees that budgets are compared at."""
    trees = (*CHAINS, *SMALL_TREES, *(",".join(f"{n:g}" for n in tree.numbers) for tree in (DEFAULT, LARGE)))
    return [parse_arm("plain"), *(parse_arm(f"eagle3@{tree}") for tree in trees)]


def governed_arms(floors: Sequence[float]) -> list[Arm]:
    """EVICT, Cascade and utility, lossless; utility again under each floor of router mass."""
    rivals = [f"{name}@{tree}" for name in ("evict", "cascade-like") for tree in (GOVERNED_TREE, STOPPING_TREE)]
    names = ("utility", *(f"utility:floor={floor:g}" for floor in floors))
    return [parse_arm(arm) for arm in (*rivals, *(f"{name}@{GOVERNED_TREE}" for name in names))]


def swept_arms() -> list[Arm]:
    """Fixed settings that a governor is held against: trees and chains that stop early or late, also with budgets."""
    names = ("eagle3", *(f"moe-spec:b={budget}" for budget in FIXED_BUDGETS))
    return [parse_arm(f"{name}@{tree}") for tree in FIXED_TREES for name in names]
