"""EAGLE-3 drafting: the head run incrementally over committed features, then level by level over the growing tree.

Owns which positions the head has seen and what the rows of a growing tree may see. How a pass is computed is
`drafters/passes.py`'s business. Knows nothing of the target but its features.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moespec.drafters.base import DraftContext
from moespec.drafters.head import Eagle3Head
from moespec.drafters.passes import HeadPass, Rows, make_pass
from moespec.tree import Best, Frontier, grow_tree, num_asked, root_only
from moespec.types import DraftTree


class Eagle3Drafter:
    """Feature of position t is paired with token t + 1, so `n` committed positions and a root give `n` head rows."""

    name = "EAGLE-3"

    def __init__(self, head: Eagle3Head, max_context: int, head_pass: HeadPass | None = None) -> None:
        config = head.config
        self.tap_layers = config.tap_layers
        self._pass = head_pass or make_pass(head, max_context)
        self._device = head.fc.weight.device
        self._vocab_map: Tensor | None = None
        if head.d2t is not None:
            self._vocab_map = torch.arange(config.draft_vocab_size, device=self._device) + head.d2t
        self._length = 0  # committed positions whose pair is in the KV cache
        self._pending: list[Tensor] = []  # features of later committed positions

    def observe(self, features_NF: Tensor | None) -> None:
        assert features_NF is not None
        self._pending.append(features_NF)

    def truncate(self, length: int) -> None:
        if length <= self._length:
            self._length, self._pending = length, []
        else:
            kept = torch.cat(self._pending)[: length - self._length]
            self._pending = [kept]

    def propose(self, context: DraftContext) -> DraftTree:
        """Catch up with the committed positions, then grow the tree from the last one's prediction."""
        root = context.token_ids[-1]
        if context.tree.total_tokens == 1:
            return root_only(root, self._device)
        state_1D = self._catch_up(context.token_ids)
        num_best = num_asked(context.tree)
        scorer = _TreeScorer(self._pass, state_1D, self._length, num_best)
        return grow_tree(self._pass.best(state_1D, num_best), scorer, root, context.tree, self._vocab_map)

    def _catch_up(self, token_ids: list[int]) -> Tensor:
        """Run the head over the pending pairs; the state [1, D] after the last, which predicts the root's children."""
        features_NF = torch.cat(self._pending) if len(self._pending) > 1 else self._pending[0]
        start, end = self._length, self._length + features_NF.shape[0]
        assert end == len(token_ids) - 1, "every committed position but the root's has been observed"
        tokens_N = torch.tensor(token_ids[start + 1 : end + 1], device=self._device)
        positions_N = torch.arange(start, end, device=self._device)
        states_ND = self._pass.run(Rows(tokens_N, positions_N, self._pass.fuse(features_NF), start, start))
        self._length, self._pending = end, []
        return states_ND[-1:]


class _TreeScorer:
    """Scores the frontier of a growing tree; the rows' keys lie behind the committed ones and are discarded after."""

    def __init__(self, head_pass: HeadPass, root_state_1D: Tensor, length: int, num_best: int) -> None:
        self._pass, self._states_ND, self._length, self._num_best = head_pass, root_state_1D, length, num_best
        self._seen_NR = torch.zeros(1, 0, dtype=torch.bool, device=root_state_1D.device)  # of the previous call's rows

    def __call__(self, frontier: Frontier) -> Best:
        num_rows, num_before, device = len(frontier.tokens_N), self._seen_NR.shape[1], frontier.tokens_N.device
        hidden_ND = self._pass.next_hidden(self._states_ND)[frontier.parents_N]
        own_NN = torch.eye(num_rows, dtype=torch.bool, device=device)
        self._seen_NR = torch.cat([self._seen_NR[frontier.parents_N], own_NN], dim=1)
        # The root's row has position length - 1, so its children have position length, equal for siblings.
        positions_N = torch.full((num_rows,), self._length + frontier.level - 1, device=device)
        start = self._length + num_before
        rows = Rows(frontier.tokens_N, positions_N, hidden_ND, start, self._length, self._seen_NR)
        self._states_ND = self._pass.run(rows)
        return self._pass.best(self._states_ND, self._num_best)
