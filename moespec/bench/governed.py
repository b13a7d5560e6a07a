"""The governors of a benchmark's arms: each arm has one for all its prompts, as a server would.

Owns nothing else. What steps cost here is measured when the first arm asks for it.
"""

from __future__ import annotations

from functools import cached_property

from moespec.bench.arms import Arm
from moespec.cost_table import CostTable
from moespec.engine import Engine
from moespec.governors import Governor, parse_governor
from moespec.kept_costs import profile_costs


class Governors:
    """By arm; None for an arm of fixed settings."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._by_arm: dict[str, Governor | None] = {}

    def of(self, arm: Arm) -> Governor | None:
        if arm.key not in self._by_arm:
            self._by_arm[arm.key] = parse_governor(arm.governor, lambda: self._table)
        return self._by_arm[arm.key]

    @cached_property
    def _table(self) -> CostTable:
        return profile_costs(self._engine)
