"""The data that flows through one step. No logic beyond invariants; knows nothing of models or drafters.

Letters: T tree rows (row 0 is the root), D hidden size, E experts, K top-k, L MoE layers, V vocabulary, A alternatives.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from moespec.routing import RouterFamily


@dataclass(frozen=True)
class DraftTree:
    """A draft tree, parents before children. All tensors lie on the target's device.

    tokens_T      int64; row 0 is the last committed token, whose KV is not written yet
    parents_T     int64; -1 at the root
    depths_T      int64; 0 at the root
    draft_logp_T  fp32; the drafter's log-probability of the path from the root to the node; 0 at the root
    mask_TT       bool; [i, j] is True where j is i or an ancestor of i
    alt_ids_TA, alt_logp_TA   what the drafter would have tried below each row (id -1 where it was not asked)
    num_valid     int64, on the device; rows behind the first so many are padding. None: there is none
    max_depth     no row is deeper, where that is known without asking the device
    """

    tokens_T: Tensor
    parents_T: Tensor
    depths_T: Tensor
    draft_logp_T: Tensor
    mask_TT: Tensor
    alt_ids_TA: Tensor | None = None
    alt_logp_TA: Tensor | None = None
    num_valid: Tensor | None = None
    max_depth: int | None = None

    def __post_init__(self) -> None:
        num_rows = self.tokens_T.shape[0]
        assert self.parents_T.shape == self.depths_T.shape == self.draft_logp_T.shape == (num_rows,)
        assert self.mask_TT.shape == (num_rows, num_rows)

    @property
    def num_rows(self) -> int:
        """Padding included."""
        return self.tokens_T.shape[0]

    def without_padding(self) -> DraftTree:
        """Asks the device how many rows count, where that is known only there."""
        return self if self.num_valid is None else self.first_rows(int(self.num_valid))

    def first_rows(self, num_rows: int) -> DraftTree:
        """Without the rows behind the first so many."""
        alt_ids_TA, alt_logp_TA = self.alt_ids_TA, self.alt_logp_TA
        return DraftTree(
            self.tokens_T[:num_rows],
            self.parents_T[:num_rows],
            self.depths_T[:num_rows],
            self.draft_logp_T[:num_rows],
            self.mask_TT[:num_rows, :num_rows],
            None if alt_ids_TA is None else alt_ids_TA[:num_rows],
            None if alt_logp_TA is None else alt_logp_TA[:num_rows],
            max_depth=self.max_depth,
        )


@dataclass(frozen=True)
class TreeContext:
    """What a policy may know of the rows beside their routing: their place in the tree, and the tree's.

    layer       number among the decoder layers
    requests_T  int64, ascending: which request of a batch each row belongs to, where a policy is asked for all of them
                together (`BudgetConfig.scope`). None: all rows are one request's
    position    how many tokens come before the root, of several requests before the first one's
    """

    depths_T: Tensor
    draft_logp_T: Tensor
    layer: int
    requests_T: Tensor | None = None
    position: int = 0


@dataclass(frozen=True)
class RouterScores:
    """One layer's router output.

    logits_TE           the router's raw logits
    probs_TE            fp32; the router's unbiased probabilities over all experts, each row sums to 1
    natural_ids_TK      int64; the unbudgeted choice
    natural_weights_TK  its routing weights, in the model's dtype
    family              how this router ranks experts and makes weights of the chosen
    """

    logits_TE: Tensor
    probs_TE: Tensor
    natural_ids_TK: Tensor
    natural_weights_TK: Tensor
    family: RouterFamily

    @property
    def num_experts(self) -> int:
        return self.logits_TE.shape[-1]

    @property
    def top_k(self) -> int:
        return self.natural_ids_TK.shape[-1]


@dataclass(frozen=True)
class ExpertPlan:
    """What the experts will see.

    ids_TK      int64; always valid expert ids
    weights_TK  routing weights; 0 means dropped: that (row, slot) touches no expert
    kept_E      bool; the shortlist. None: no budget acted, every expert was allowed
    score_E     fp32; what the shortlist was ranked by. None without a budget
    """

    ids_TK: Tensor
    weights_TK: Tensor
    kept_E: Tensor | None = None
    score_E: Tensor | None = None


@dataclass(frozen=True)
class Verdict:
    """What the target says of a draft tree. Row numbers refer to the tree; all on the host.

    path            accepted rows from the root on, root first
    token_ids       what the step emits: the accepted draft tokens, then the bonus token
    """

    path: list[int]
    token_ids: list[int]

    @property
    def num_accepted(self) -> int:
        """Accepted draft tokens, without the bonus token: the paper's acceptance length."""
        return len(self.path) - 1


def ancestor_mask(parents_T: Tensor, max_depth: int) -> Tensor:
    """bool [T, T]: [i, j] is True where j is i or an ancestor of i. `max_depth` bounds the climb."""
    num_rows = parents_T.shape[0]
    mask_TT = torch.eye(num_rows, dtype=torch.bool, device=parents_T.device)
    # The root is its own parent here, so that climbing past it changes nothing.
    up_T = parents_T.clamp(min=0)
    ancestor_T = up_T
    for _ in range(max_depth):
        mask_TT.scatter_(1, ancestor_T[:, None], True)
        ancestor_T = up_T[ancestor_T]
    return mask_TT
