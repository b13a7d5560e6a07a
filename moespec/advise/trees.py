"""Which trees could have been asked for: from the steps of one large tree, what smaller ones would have come to.

Owns the growth of a tree replayed on a recorded one (`tree.py` is where trees grow): a smaller tree is a part of a
larger one that was grown from the same state, but for nodes so unlikely that the larger one had no row for them; they
count as rows that were not accepted. Knows nothing of engines or costs.
"""

from __future__ import annotations

import math
import statistics
from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile

from moespec.advise.acceptance import TRIED, Candidate
from moespec.config import TreeConfig
from moespec.trace import StepTrace, TreeTrace
from moespec.tree import SEARCHED

LARGE = TreeConfig(64, 8, 8, min_path_p=0)
DEPTHS, BRANCHINGS, LEAST_PS = (2, 4, 8), (2, 3, 8), (0, 0.05, 0.12, 0.25)


@dataclass(frozen=True)
class Growth:
    """One step's nodes as a growth of some depth and branching would have had them, likeliest first.

    path_p_N      of the nodes, falling
    above_p_N     of what each hangs below, infinite for the root
    accepted_N    whether each was accepted
    frontier_p_L  path probability of the likeliest node of each level
    num_nodes     of the growth, those included that the large tree had no row for
    """

    path_p_N: list[float]
    above_p_N: list[float]
    accepted_N: list[bool]
    frontier_p_L: list[float]
    num_nodes: int

    def cut(self, config: TreeConfig) -> tuple[int, int, int]:
        """(rows, levels drafted, accepted draft tokens) of the tree asked for."""
        if not config.min_path_p:
            num_nodes = min(self.num_nodes, config.total_tokens - 1)
            return 1 + num_nodes, config.depth, sum(self.accepted_N[:num_nodes])
        least, least_searched = config.min_path_p, SEARCHED * config.min_path_p
        num_likely = bisect_right(self.path_p_N, -least, key=lambda p: -p)
        pairs = zip(self.accepted_N[:num_likely], self.above_p_N, strict=False)
        kept = [accepted for accepted, above_p in pairs if above_p >= least_searched][: config.total_tokens - 1]
        # A level is drafted below every one whose likeliest node is to be looked below.
        above = takewhile(lambda p: p >= least_searched, self.frontier_p_L[: config.depth - 1])
        return 1 + len(kept), 1 + sum(1 for _ in above), sum(kept)


def growth_of(tree: TreeTrace, depth: int, top_k: int) -> Growth:
    """Replay: on every level the `top_k` likeliest children of the `top_k` likeliest nodes are followed."""
    children: dict[int, list[int]] = {}
    for row, parent in enumerate(tree.parents):
        children.setdefault(parent, []).append(row)
    nodes: list[int] = []
    frontier, frontier_p_L = [0], []
    for _ in range(depth):
        level = [row for parent in frontier for row in _likeliest(children.get(parent, []), tree, top_k)]
        if not level:
            break
        nodes += level
        frontier = _likeliest(level, tree, top_k)
        frontier_p_L.append(tree.path_p[frontier[0]])
    ordered = _likeliest(nodes, tree, len(nodes))
    above_p_N = [tree.path_p[parent] if (parent := tree.parents[row]) else math.inf for row in ordered]
    is_full = len(tree.parents) == LARGE.total_tokens  # else the drafter knew no more
    num_nodes = top_k + (depth - 1) * top_k**2 if is_full else len(nodes)
    accepted_N = [tree.accepted[row] for row in ordered]
    return Growth([tree.path_p[row] for row in ordered], above_p_N, accepted_N, frontier_p_L, num_nodes)


def candidates_of(steps: Sequence[StepTrace]) -> list[Candidate]:
    """Trees of all sizes, depths, branchings and least probabilities, by what was drafted as `LARGE` without a budget.

    Steps in which nothing was drafted count for every tree.
    """
    drafted = [step.tree for step in steps if step.kind == "tree" and step.tree is not None]
    num_plain = len(steps) - len(drafted)
    found = []
    for depth, top_k in ((depth, top_k) for depth in DEPTHS for top_k in BRANCHINGS):
        growths = [growth_of(tree, depth, top_k) for tree in drafted]
        for config in (TreeConfig(rows, depth, top_k, least_p) for rows in TRIED for least_p in LEAST_PS):
            cuts = [growth.cut(config) for growth in growths] + [(1, 0, 0)] * num_plain
            sizes = Counter((rows, levels) for rows, levels, _ in cuts)
            shares: dict[tuple[float, float], float] = {size: count / len(cuts) for size, count in sizes.items()}
            found.append(Candidate(config, statistics.fmean(accepted for *_, accepted in cuts), shares))
    return found


def _likeliest(rows: Sequence[int], tree: TreeTrace, count: int) -> list[int]:
    return sorted(rows, key=lambda row: -tree.path_p[row])[:count]
