"""The oracle: what a shortlist would be if it were known which rows get accepted. A yardstick, no method.

The verifier runs a step twice for it (`policies.base.ForesightPolicy`): its times mean nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch

from moespec.budget import score_experts, select_experts, substitute
from moespec.policies.method import Method, RoutedModel
from moespec.types import ExpertPlan, RouterScores, TreeContext


@dataclass(frozen=True)
class Oracle(Method):
    """Keeps the experts of the path that the unbudgeted step accepts; all rows route inside them.

    Where `b` is given, at most so many, those with the most routing weight over the path's rows.
    """

    method: ClassVar[str] = "oracle"
    b: int | None = None
    path: tuple[int, ...] = field(default=(), kw_only=True, compare=False)  # rows; the root is always one of them

    def __post_init__(self) -> None:
        self.require(self.b is None or self.b >= 1, "b", "1 or more")

    def check(self, model: RoutedModel) -> None:
        if self.b is not None:
            self.require_experts("b", model)

    def informed(self, accepted_rows: Sequence[int]) -> Oracle:
        return replace(self, path=tuple(accepted_rows))

    def plan(self, scores: RouterScores, context: TreeContext) -> ExpertPlan:
        assert self.path, "an oracle plans what it was informed of"
        on_path_T = torch.zeros(len(scores.logits_TE), dtype=torch.float32, device=scores.logits_TE.device)
        on_path_T[list(self.path)] = 1.0
        score_E = score_experts(scores, "natural", on_path_T)
        size = scores.num_experts if self.b is None else max(self.b, scores.top_k)
        kept_E = select_experts(score_E, size) & (score_E > 0)
        ids_TK, weights_TK = substitute(scores, kept_E)
        return ExpertPlan(ids_TK=ids_TK, weights_TK=weights_TK, kept_E=kept_E, score_E=score_E)
