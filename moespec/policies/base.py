"""The expert-policy seam: what decides, layer by layer, which experts the rows of a verify step may use."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from moespec.types import ExpertPlan, RouterScores, TreeContext


class ExpertPolicy(Protocol):
    """Anything with `plan`. Called once per MoE layer and verify step of two rows or more; never in prefill."""

    def plan(self, scores: RouterScores, context: TreeContext) -> ExpertPlan:
        """Route the rows. Ids must be valid expert ids; a weight of 0 drops that (row, slot)."""
        ...


@runtime_checkable
class ForesightPolicy(ExpertPolicy, Protocol):
    """A yardstick that no deployment can have: it is told what a step will accept before it plans.

    Whoever verifies runs the step under no policy first and then again under the informed one, so that the time of
    such a step is the speed of nothing.
    """

    def informed(self, accepted_rows: Sequence[int]) -> ExpertPolicy:
        """The policy of one step, whose accepted path has these rows of the tree, the root first."""
        ...
