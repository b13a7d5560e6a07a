"""The governor seam: what decides, step by step, how far to guess and how much to load.

Owns the interface and what a governor is told of a step. Knows nothing of any governor.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from moespec.config import BudgetConfig, TreeConfig
from moespec.types import DraftTree


class Outcome(NamedTuple):
    """What a step came to.

    path        rows that were accepted, the root first, of the tree that was verified
    num_tokens  emitted, the bonus token included
    draft_ms    drafting; rest_ms: verifying and everything else
    mass_kept   share of the router probability that the budget kept, mean over layers
    """

    path: Sequence[int]
    num_tokens: int
    draft_ms: float
    rest_ms: float
    mass_kept: float

    @property
    def step_ms(self) -> float:
        return self.draft_ms + self.rest_ms


class Governor(Protocol):
    """Asked twice a step, before and after drafting, and told afterwards. It serves one request after the other.

    What the caller asks for is the limit: a governor drafts no more rows, and drops no expert unless it may.
    """

    name: str

    def settings(self, tree: TreeConfig, budget: BudgetConfig) -> tuple[TreeConfig, BudgetConfig]:
        """What to draft with, of what was asked for."""
        ...

    def choose(self, tree: DraftTree, budget: BudgetConfig) -> tuple[DraftTree, BudgetConfig]:
        """What to verify of the drafted tree, and under which budget. Not asked of a root alone."""
        ...

    def observe(self, outcome: Outcome) -> None:
        """The step that was last chosen, as it went."""
        ...
