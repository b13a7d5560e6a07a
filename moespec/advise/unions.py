"""How many experts a draft tree uses together: what was recorded of a model, or the bound where nothing was.

Owns the recorded points and their sources. Real routers prefer some experts, and rows of one tree share them: unions
are far below independent rows'. Knows nothing of devices.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moespec.cost import ModelShape, expected_union, union_between

RECORD = Path(__file__).resolve().parents[2] / "assets" / "bench" / "advise-cpu.json"  # of the embedded pair
PAPER = "MoE-Spec (arXiv 2602.16052), as others read it off its figures"
# Where nothing is recorded: trees are worth at least rows ** 0.55 independent rows, as OLMoE's are (39 experts of 64 at
# 31 rows, 54 at 127), the most alike on record; Qwen3-30B-A3B's are worth rows ** 0.66.
LEAST_POWER = 0.55


@dataclass(frozen=True)
class Unions:
    """Experts per layer by rows of a tree, without a budget. `is_measured`: recorded, not the bound.

    Recorded trees are of one drafter on some texts; another's may be worth half or twice their rows.
    """

    num_experts: int
    top_k: int
    source: str
    measured: Mapping[int, float]

    @property
    def is_measured(self) -> bool:
        return bool(self.measured)

    def bound(self, num_rows: float) -> float:
        """Of independent rows."""
        return expected_union(self.num_experts, self.top_k, num_rows)

    def expected(self, num_rows: float) -> float:
        return self._recorded(num_rows) if self.is_measured else self.bound(num_rows)

    def least(self, num_rows: float) -> float:
        if self.is_measured:
            return self._recorded(max(1.0, num_rows / 2))
        return self.bound(num_rows**LEAST_POWER)

    def most(self, num_rows: float) -> float:
        bound = self.bound(num_rows)
        return min(bound, self._recorded(2 * num_rows)) if self.is_measured and num_rows > 1 else bound

    def _recorded(self, num_rows: float) -> float:
        return min(union_between(self.num_experts, self.top_k, self.measured, num_rows), self.bound(num_rows))


Sizes = tuple[int, int, int, int]  # MoE layers, experts, top-k, hidden size: checkpoints of one architecture


def sizes_of(shape: ModelShape) -> Sizes:
    return shape.num_moe_layers, shape.num_experts, shape.top_k, shape.hidden_size


def unions_of(shape: ModelShape) -> Unions:
    """What is recorded of a model of these sizes; nothing where nothing is."""
    record = read_record()
    own = "measured, assets/bench/advise-cpu.json", {row["num_rows"]: row["union"] for row in record["unions"]}
    recorded = _PAPERS | {tuple(record["sizes"]): own}
    source, measured = recorded.get(sizes_of(shape), ("independent routing, an upper bound", {}))
    return Unions(shape.num_experts, shape.top_k, source, measured)


def read_record() -> dict[str, Any]:
    """What `advise --measure --json` said of the embedded pair."""
    return json.loads(RECORD.read_text(encoding="utf-8"))["measured"]


# Mixtral's trees of 63 rows use "7 to 8" of 8: half-way.
_PAPERS: dict[Sizes, tuple[str, dict[int, float]]] = {
    (16, 64, 8, 2048): (PAPER, {31: 39.0, 127: 54.0}),
    (48, 128, 8, 2048): (PAPER, {63: 80.0}),
    (32, 8, 2, 4096): (PAPER, {63: 7.5}),
}
