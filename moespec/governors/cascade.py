"""Cascade (arXiv 2506.20675) as far as the public record goes, hence `-like`: try tree sizes, keep the best a while.

Utility of a size is its token gain over its cost ratio: (tokens per step / 1) / (ms per step / ms of a plain step).
A test phase gives sizes a few steps each, the smallest first, until one has less utility than the one before; the set
phase keeps the best, which is plain decoding, speculation off, where none is above 1. The phases' lengths, and that
testing ends early, are ours. Lossless: it changes how much is guessed, nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from moespec.config import BudgetConfig, TreeConfig
from moespec.governors.base import Outcome
from moespec.types import DraftTree

NUM_TEST_STEPS = 4  # of every size
NUM_SET_STEPS = 64


@dataclass
class _Trial:
    """A size in the test phase under way, and what its steps came to."""

    num_rows: int
    num_steps: int = 0
    num_tokens: int = 0
    total_ms: float = 0.0


class CascadeLike:
    """Sizes: one row, which is plain decoding, then 2, 4, 8 and so on up to the tree asked for."""

    name = "cascade-like"

    def __init__(self) -> None:
        self._trials: list[_Trial] = []
        self._place = 0  # of the size in force
        self._asked = 0
        self._num_left: int | None = None  # steps of the set phase; None: sizes are being tested

    def settings(self, tree: TreeConfig, budget: BudgetConfig) -> tuple[TreeConfig, BudgetConfig]:
        if tree.total_tokens != self._asked or self._num_left == 0:
            sizes = [2**power for power in range(tree.total_tokens.bit_length()) if 2**power < tree.total_tokens]
            self._trials = [_Trial(num_rows) for num_rows in (*sizes, tree.total_tokens)]
            self._asked, self._place, self._num_left = tree.total_tokens, 0, None
        return replace(tree, total_tokens=self._trials[self._place].num_rows), budget

    def choose(self, tree: DraftTree, budget: BudgetConfig) -> tuple[DraftTree, BudgetConfig]:
        return tree, budget

    def observe(self, outcome: Outcome) -> None:
        if self._num_left is not None:
            self._num_left -= 1
            return
        trial = self._trials[self._place]
        trial.num_steps += 1
        trial.num_tokens += outcome.num_tokens
        trial.total_ms += outcome.step_ms
        if trial.num_steps < NUM_TEST_STEPS:
            return
        tried = self._trials[: self._place + 1]
        is_worse = len(tried) > 1 and self._utility(trial) < self._utility(tried[-2])
        if is_worse or len(tried) == len(self._trials):
            self._place = tried.index(max(tried, key=self._utility))  # the first, plain decoding, has 1
            self._num_left = NUM_SET_STEPS
        else:
            self._place += 1

    def _utility(self, trial: _Trial) -> float:
        plain = self._trials[0]
        return (trial.num_tokens / plain.num_tokens) / (trial.total_ms / plain.total_ms)
