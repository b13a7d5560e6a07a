"""SERE (arXiv 2602.07616): slots beyond each row's first S go to the most similar expert that some row needs anyway.

As the authors released it (github.com/JL-Cheng/SERE, commit 8512f39): re-routed ids, untouched weights. Two slots of a
row may then name the same expert, whose weights add up. Never in prefill here, where the released code acts too.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Self

import torch

from moespec.policies.method import Method, RoutedModel, best_slots, experts_in
from moespec.policies.profiles import MEASURES, Profile, read_profile
from moespec.types import ExpertPlan, RouterScores, TreeContext


@dataclass(frozen=True)
class Sere(Method):
    """`s` slots of each row make the primary set; `rho` protects an expert that resembles none of it; 0: no protection.

    primary = { ids[t, j] : all t, j < S }                     (slots by weight; the union over the whole tree)
    for every slot (t, j >= S) with e = ids[t, j] not in primary, and v = argmax over primary of Sim[e, v]:
        ids[t, j] = e if rho > 0 and Sim[e, v] < rho else v

    A protected expert does not join the primary set. Sim is at most 1: with rho above 1 nothing is re-routed, and with
    S = k there is nothing to. Frobenius similarity is relative to each layer's own spread, and so is rho.
    """

    method: ClassVar[str] = "sere"
    s: int
    rho: float = 0.0
    measure: str = "frobenius"
    profile: Profile = field(kw_only=True, compare=False, repr=False)  # Sim [L, E, E] under each measure's name

    def __post_init__(self) -> None:
        self.require(self.s >= 1, "s", "1 or more")
        self.require(self.rho >= 0, "rho", "0 or more")
        self.require(self.measure in MEASURES, "measure", " or ".join(MEASURES))

    @classmethod
    def read(cls, values: dict[str, Any], profiles: Path | None) -> Self:
        return cls(**values, profile=read_profile(profiles, "similarity", cls.method))

    def check(self, model: RoutedModel) -> None:
        self.require_slots("s", model)
        self.profile.check(model)

    def plan(self, scores: RouterScores, context: TreeContext) -> ExpertPlan:
        primary_E = experts_in(scores, best_slots(scores, self.s))
        similarity_EE = self.profile.of_layer(self.measure, context.layer).to(primary_E.device)
        nearest_E, place_E = similarity_EE.masked_fill(~primary_E, -torch.inf).max(dim=1)
        stays_E = primary_E | (nearest_E < self.rho) if self.rho > 0 else primary_E
        own_E = torch.arange(scores.num_experts, device=primary_E.device)
        ids_TK = torch.where(stays_E, own_E, place_E)[scores.natural_ids_TK]
        return ExpertPlan(ids_TK=ids_TK, weights_TK=scores.natural_weights_TK)
