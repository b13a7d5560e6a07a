"""After AcceptMoE (arXiv 2608.02989): the demand for experts, weighted by how likely each row gets committed.

What is public of it: router mass is weighted by a probability, measured beforehand, that a draft position is committed;
the size of the set comes from the effective rank (entropy) of that demand, not from a fixed B; the root's natural top-k
is never removed. No formula is, so that this one is ours.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from moespec.budget import score_experts, select_experts, substitute, used_by_roots
from moespec.policies.method import Method, RoutedModel
from moespec.policies.profiles import Profile, has_profile, read_profile
from moespec.types import ExpertPlan, RouterScores, TreeContext

COMMITMENTS = ("profile", "path")


@dataclass(frozen=True)
class AcceptMoELike(Method):
    """Substitution into the experts of the highest demand, as many as the demand effectively spreads over.

    c_t = P(row t is committed): measured by depth and path probability (commitment=profile), or the drafter's own
          probability of the path (commitment=path); 1 at the root
    d_i = sum_t c_t * w[t, i]                    w: the routers' own top-k weights, 0 elsewhere
    r   = exp(-sum_i p_i log p_i), p = d / sum d    the effective rank: from 1, one expert, to E, all alike
    S   = the root's top-k, then the highest d, ceil(scale * r) in all, clamped to [k, E]

    Of the full softmax in place of w, r is nearly the natural union: 26 of 36 experts in a tree of 16 of the embedded
    model, where w gives 13.
    """

    method: ClassVar[str] = "accept-moe-like"
    scale: float = 1.0
    commitment: str = "path"
    profile: Profile | None = field(default=None, kw_only=True, compare=False, repr=False)

    def __post_init__(self) -> None:
        self.require(0 < self.scale < math.inf, "scale", "a number above 0")
        self.require(self.commitment in COMMITMENTS, "commitment", " or ".join(COMMITMENTS))

    @classmethod
    def read(cls, values: dict[str, Any], profiles: Path | None) -> Self:
        """The measured commitment where the folder has one, unless the values say otherwise."""
        wanted = values.get("commitment")
        if wanted == "path" or (wanted is None and not has_profile(profiles, "acceptance")):
            return cls(**values)
        profile = read_profile(profiles, "acceptance", cls.method)
        return cls(**{"commitment": "profile"} | values, profile=profile)

    def check(self, model: RoutedModel) -> None:
        if self.profile is not None:
            self.profile.check(model)

    def plan(self, scores: RouterScores, context: TreeContext) -> ExpertPlan:
        demand_E = score_experts(scores, "natural", self.committed(context))
        rank = torch.special.entr(demand_E / demand_E.sum()).sum().exp()
        root_E = used_by_roots(scores, context)
        size = torch.maximum((self.scale * rank).ceil(), root_E.sum())
        kept_E = select_experts(demand_E.masked_fill(root_E, torch.inf), size)
        ids_TK, weights_TK = substitute(scores, kept_E)
        return ExpertPlan(ids_TK=ids_TK, weights_TK=weights_TK, kept_E=kept_E, score_E=demand_E)

    def committed(self, context: TreeContext) -> Tensor:
        """c, fp32 [T]."""
        path_p_T = context.draft_logp_T.exp()
        if self.commitment == "path":
            return path_p_T
        assert self.profile is not None, "commitment=profile comes with the profile"
        rate_NP, edges_P = (self.profile.tensors[name].to(path_p_T.device) for name in ("rate", "edges"))
        return rate_NP[context.depths_T.clamp(max=len(rate_NP) - 1), torch.bucketize(path_p_T, edges_P)]
