"""How often a draft row gets committed, by its depth and the drafter's probability of its path.

Counted over greedy, unbudgeted runs of a few tokens, begun all along texts; knows nothing of files. Letters: N depths,
P places between the edges.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from moespec.config import MAX_TREE_TOKENS, GenerationConfig, TreeConfig
from moespec.engine import Engine

EDGES = (0.01, 0.03, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)  # of path probability
TREE = TreeConfig(MAX_TREE_TOKENS, depth=8, top_k=6, min_path_p=0)  # unlikely rows, too, are to be counted
RUN_TOKENS = 16


def committed_rows(engine: Engine, texts: list[list[int]], progress: Callable[[str], None]) -> tuple[Tensor, Tensor]:
    """(rows drafted, rows committed), fp64 [N, P] each: depth 0, the root, to the deepest."""
    drafted_NP, committed_NP = torch.zeros(2, TREE.depth + 1, len(EDGES) + 1, dtype=torch.float64)
    # No row is drafted deeper than a run may still write: none is counted that could not have been committed.
    generation = GenerationConfig(RUN_TOKENS, ignore_eos=True)
    for number, token_ids in enumerate(texts, start=1):
        for length in range(1, len(token_ids) + 1, RUN_TOKENS):
            trees = (step.tree for step in engine.generate(token_ids[:length], generation, tree=TREE))
            for tree in filter(None, trees):
                places_T = torch.bucketize(torch.tensor(tree.path_p), torch.tensor(EDGES))
                cells, accepted_T = (torch.tensor(tree.depths), places_T), torch.tensor(tree.accepted).double()
                drafted_NP.index_put_(cells, torch.ones_like(accepted_T), accumulate=True)
                committed_NP.index_put_(cells, accepted_T, accumulate=True)
        progress(f"acceptance: text {number} of {len(texts)}")
    engine.forget()
    return drafted_NP, committed_NP


def rates(drafted_NP: Tensor, committed_NP: Tensor) -> Tensor:
    """Share of rows committed, fp64 [N, P], each cell with one row more that took the middle of its place's edges.

    Cells without rows are therefore the drafter's own probability. The root, committed already, has 1.
    """
    bounds = torch.tensor([0.0, *EDGES, 1.0], dtype=torch.float64)
    rate_NP = (committed_NP + (bounds[:-1] + bounds[1:]) / 2) / (drafted_NP + 1)
    rate_NP[0] = 1
    return rate_NP
