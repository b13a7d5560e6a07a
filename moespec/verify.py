"""Acceptance: which rows of a draft tree the target agrees with, and what the step therefore emits.

One rule, greedy or sampled: every row has the target's own token; walk from the root to the child that equals it;
where there is none, that token is the bonus. Because the children are a deterministic set, this is the published walk
(accept x with probability p(x), else renormalise) in distribution. Knows nothing of models.
"""

from __future__ import annotations

from torch import Tensor

from moespec.types import DraftTree, Verdict


def verify_tree(tree: DraftTree, target_T: Tensor) -> Verdict:
    """The accepted path and the emitted tokens. `target_T` int64 [T]: the target's token after each row.

    A row is accepted if it and all its ancestors equal the target's token at their parent. Siblings differ, so the
    accepted rows form one path. One copy to the host.
    """
    agrees_T = tree.tokens_T == target_T[tree.parents_T.clamp(min=0)]
    agrees_T[0] = True
    accepted_T = (agrees_T | ~tree.mask_TT).all(dim=1)
    packed = (accepted_T * (target_T + 1)).tolist()  # 0 where rejected, so that one copy carries both
    path = [row for row, token in enumerate(packed) if token]
    return Verdict(path=path, token_ids=[packed[row] - 1 for row in path])
