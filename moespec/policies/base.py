"""The expert-policy seam: what decides, layer by layer, which experts the rows of a verify step may use."""

from __future__ import annotations

from typing import Protocol

from moespec.types import ExpertPlan, RouterScores, TreeContext


class ExpertPolicy(Protocol):
    """Anything with `plan`. Called once per MoE layer and verify step of two rows or more; never in prefill."""

    def plan(self, scores: RouterScores, context: TreeContext) -> ExpertPlan:
        """Route the rows. Ids must be valid expert ids; a weight of 0 drops that (row, slot)."""
        ...
