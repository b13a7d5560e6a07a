"""Acceptance: which rows of a draft tree the target agrees with, and what the step therefore emits.

One rule, greedy or sampled: every row has the target's own token; walk from the root to the child that equals it;
where there is none, that token is the bonus. Because the children are a deterministic set, this is the published walk
(accept x with probability p(x), else renormalise) in distribution. Knows nothing of models.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moespec.types import DraftTree, Verdict


def verify_tree(tree: DraftTree, target_T: Tensor) -> Verdict:
    """The accepted path and the emitted tokens. `target_T` int64 [T]: the target's token after each row.

    Siblings differ, so at most one child of an accepted row equals the target's token there. The walk over numbers on
    the host takes microseconds, where tensor operations for the same take a dozen calls; from a device they come in one
    copy.
    """
    parts = tree.tokens_T, tree.parents_T, target_T
    is_on_host = target_T.device.type == "cpu"
    tokens, parents, wanted = (part.tolist() for part in parts) if is_on_host else torch.stack(parts).tolist()
    path = [0]
    for row, (token, parent) in enumerate(zip(tokens, parents, strict=True)):
        if parent == path[-1] and token == wanted[parent]:
            path.append(row)
    return Verdict(path=path, token_ids=[wanted[row] for row in path])
