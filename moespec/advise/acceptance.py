"""What a drafter gets accepted, as trees that could be asked for and what their steps come to.

Owns the three ways to know it before a model is loaded: typed in by depth, typed in as tokens per step, read from a
record. Measuring is `probes.py`'s. Knows nothing of costs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moespec.config import MAX_TREE_TOKENS, TreeConfig
from moespec.cost import likeliest_tree

SIZES = (1, 2, 4, 8, 16, 32, 64)  # rows of a tree that figures are shown for
TRIED = (2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)  # and that one is chosen from
MAX_DEPTH = TreeConfig().depth
# What the choices behind the first get of the rest, each a share of what is left: a typed-in rate says nothing of them.
LATER_SHARE = 0.4
NUM_RANKS = 4
TYPED_ERROR = 0.15  # of accepted tokens: figures of one text seldom hold better on another


@dataclass(frozen=True)
class Candidate:
    """A tree that could be asked for: mean accepted draft tokens, and its steps by (rows, levels drafted)."""

    tree: TreeConfig
    num_accepted: float
    sizes: Mapping[tuple[float, float], float]

    @property
    def num_rows(self) -> float:
        return sum(rows * share for (rows, _), share in self.sizes.items())

    @property
    def num_levels(self) -> float:
        return sum(levels * share for (_, levels), share in self.sizes.items())

    def to_json(self) -> list[Any]:
        """The tree, accepted tokens, mean rows and mean levels."""
        return [self.tree.numbers, *(round(mean, 3) for mean in (self.num_accepted, self.num_rows, self.num_levels))]

    @staticmethod
    def from_json(values: Sequence[Any]) -> Candidate:
        """As if all its steps were of their mean size."""
        tree, num_accepted, num_rows, num_levels = values
        return Candidate(TreeConfig(*tree), num_accepted, {(num_rows, num_levels): 1.0})


@dataclass(frozen=True)
class Acceptance:
    """Trees to choose from. `low` and `high`: what accepted tokens may be, as factors."""

    source: str
    candidates: Sequence[Candidate]
    low: float = 1 - TYPED_ERROR
    high: float = 1 + TYPED_ERROR


def parse_rates(text: str) -> Acceptance:
    """`0.8,0.7,0.6`: how often the drafter's first choice is right at depth 1, 2 and 3, given that all before it were.

    Deeper levels are as the last. Later choices may stand behind the first: `0.7/0.15/0.05,0.6/0.1`; else each takes a
    share of the rest. ValueError for what are no such rates.
    """
    try:
        rates = [[float(rate) for rate in level.split("/")] for level in text.split(",")]
    except ValueError as error:
        raise ValueError(f"acceptance={text!r} is not a list of rates by depth, such as 0.8,0.7,0.6.") from error
    return Acceptance(f"typed in: {text} by depth", _candidates(rates))


def parse_tokens(text: str) -> Acceptance:
    """`3.1` or `3.1@32`: tokens per step, bonus token included, at a tree of so many rows (64 unless given).

    Trees of other sizes get what one rate at all depths would give them. ValueError where no rate gives so many.
    """
    tokens, _, rows = text.partition("@")
    try:
        wanted, num_rows = float(tokens) - 1, int(rows or MAX_TREE_TOKENS)
    except ValueError as error:
        raise ValueError(f"accepted={text!r} is not tokens per step, such as 3.1, or 3.1@32 at 32 rows.") from error
    if not 2 <= num_rows <= MAX_TREE_TOKENS or not 0 <= wanted <= min(num_rows - 1, MAX_DEPTH):
        raise ValueError(
            f"accepted={text!r} is not allowed: use 1 to {1 + min(max(num_rows, 2) - 1, MAX_DEPTH)} tokens per step, "
            f"and 2 to {MAX_TREE_TOKENS} rows."
        )
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        enough = likeliest_tree(_ranks([[middle]]), num_rows).num_accepted >= wanted
        low, high = (low, middle) if enough else (middle, high)
    return Acceptance(f"typed in: {wanted + 1:g} tokens per step at {num_rows} rows", _candidates([[high]]))


def recorded(record: Mapping[str, Any]) -> Acceptance:
    """Of a record of `advise --measure`."""
    found = record["acceptance"]
    candidates = [Candidate.from_json(values) for values in found["candidates"]]
    return Acceptance(found["source"], candidates, found["low"], found["high"])


def _candidates(rates: Sequence[Sequence[float]]) -> list[Candidate]:
    ranks, found = _ranks(rates), {}
    for num_rows in TRIED:
        tree = likeliest_tree(ranks, num_rows)
        if tree.num_rows > 1:  # a drafter that is never right offers none
            config = TreeConfig(tree.num_rows, tree.depth, tree.top_k, 0)
            found[config] = Candidate(config, tree.num_accepted, {(tree.num_rows, tree.depth): 1.0})
    return list(found.values())


def _ranks(rates: Sequence[Sequence[float]]) -> list[list[float]]:
    """Rates by depth and rank, to the deepest level and the last rank that are looked at."""
    levels = [[*rates[min(depth, len(rates) - 1)]] for depth in range(MAX_DEPTH)]
    for level in levels:
        if len(level) == 1:
            for _ in range(NUM_RANKS - 1):
                level.append(min(level[-1], LATER_SHARE * max(0.0, 1 - sum(level))))
    return levels
