"""Records every MoE layer's routing in one step: asks the policy for the plan, counts what it did.

Owns the definitions of experts natural / kept / active, mass kept, displaced and lossless (`design.md`). Knows nothing
of models beyond their numbers of experts.
"""

from __future__ import annotations

import base64
from dataclasses import dataclass

import torch
from torch import Tensor

from moespec.budget import MoESpec
from moespec.config import BudgetConfig
from moespec.models import MoeLayer
from moespec.policies.base import ExpertPolicy
from moespec.routing import RouterOutput, router_scores
from moespec.trace import LayerTrace
from moespec.types import DraftTree, ExpertPlan, TreeContext

CHANGED = 1e-6  # routing weights that differ by less are the same up to rounding


def policy_for(budget: BudgetConfig, num_experts: int) -> ExpertPolicy | None:
    """The policy that acts, or None where no routing can change: no budget, or B >= E."""
    if not isinstance(budget.policy, str):
        return budget.policy
    if budget.coverage is None and (budget.budget is None or budget.budget >= num_experts):
        return None
    return MoESpec(budget)


@dataclass(frozen=True)
class RoutingCounts:
    """One step's routing over L layers and T rows; tensors on the host."""

    score_LE: Tensor  # router probability summed over the rows
    natural_LE: Tensor
    kept_LE: Tensor
    active_LE: Tensor
    ids_LTK: Tensor
    weights_LTK: Tensor
    missing_LT: Tensor  # natural (row, expert) pairs that were not run
    mass_kept_L: Tensor  # share of the score on the shortlist; 1 without a budget
    natural_weight_kept_L: Tensor
    changed: bool  # some row's routing differs from the natural one

    def num_experts_by_layer(self) -> tuple[list[int], list[int], list[int]]:
        """(natural, kept, active) per layer."""
        natural, kept, active = (s.sum(dim=1).tolist() for s in (self.natural_LE, self.kept_LE, self.active_LE))
        return natural, kept, active

    def layer_traces(self, layers: list[int]) -> list[LayerTrace]:
        """The layers' entries of a StepTrace."""
        scores = self.score_LE.tolist()
        natural, kept, active = (_id_lists(sets) for sets in (self.natural_LE, self.kept_LE, self.active_LE))
        mass, weight = self.mass_kept_L.tolist(), self.natural_weight_kept_L.tolist()
        displaced = self.missing_LT.sum(dim=1).tolist()
        ids = self.ids_LTK.to(torch.uint16).numpy()
        weights = self.weights_LTK.to(torch.float16).numpy()
        return [
            LayerTrace(
                layer=layer,
                score=[round(value, 4) for value in scores[n]],
                natural=natural[n],
                kept=kept[n],
                active=active[n],
                ids=base64.b64encode(ids[n].tobytes()).decode(),
                weights=base64.b64encode(weights[n].tobytes()).decode(),
                mass_kept=round(mass[n], 6),
                natural_weight_kept=round(weight[n], 6),
                num_displaced=displaced[n],
            )
            for n, layer in enumerate(layers)
        ]


class StepRecorder:
    """One step's `route` function for `Target.stepping`, and afterwards its counts."""

    def __init__(self, moe_layers: list[MoeLayer], tree: DraftTree, policy: ExpertPolicy | None) -> None:
        self._moe_layers = moe_layers
        self._tree = tree
        self._policy = policy
        self._logits: list[Tensor] = []
        self._natural: list[tuple[Tensor, Tensor]] = []
        self._plans: list[ExpertPlan] = []

    def route(self, number: int, output: RouterOutput) -> ExpertPlan:
        """What the experts of MoE layer `number` will see."""
        logits_TE, weights_TK, ids_TK, _ = output
        if self._policy is None:
            plan = ExpertPlan(ids_TK=ids_TK, weights_TK=weights_TK)
        else:
            layer = self._moe_layers[number]
            context = TreeContext(self._tree.depths_T, self._tree.draft_logp_T, layer.layer)
            plan = self._policy.plan(router_scores(layer.family, output), context)
        self._logits.append(logits_TE)
        self._natural.append((ids_TK, weights_TK))
        self._plans.append(plan)
        return plan

    def counts(self) -> RoutingCounts:
        """All layers at once: a dozen small operations instead of a dozen per layer."""
        logits_LTE = torch.stack(self._logits).float()
        natural_ids_LTK = torch.stack([ids for ids, _ in self._natural])
        natural_LTE = _dense(natural_ids_LTK, torch.stack([weights for _, weights in self._natural]), logits_LTE)
        chosen_LTE = _chosen(natural_ids_LTK, logits_LTE)
        if self._policy is None:
            ids_LTK, run_LTE, used_LTE = natural_ids_LTK, natural_LTE, chosen_LTE
            weights_LTK = torch.stack([weights for _, weights in self._natural])
            kept_LE = chosen_LTE.any(dim=1)
        else:
            ids_LTK = torch.stack([plan.ids_TK for plan in self._plans])
            weights_LTK = torch.stack([plan.weights_TK for plan in self._plans])
            run_LTE = _dense(ids_LTK, weights_LTK, logits_LTE)
            used_LTE = run_LTE != 0
            kept_LE = torch.stack([_shortlist(plan, used) for plan, used in zip(self._plans, used_LTE, strict=True)])
        survives_LTE = natural_LTE * used_LTE
        score_LE = logits_LTE.softmax(dim=-1).sum(dim=1)
        mass_kept_L = (score_LE * kept_LE).sum(dim=1) / score_LE.sum(dim=1)
        return RoutingCounts(
            score_LE=score_LE.cpu(),
            mass_kept_L=(torch.ones_like(mass_kept_L) if self._policy is None else mass_kept_L).cpu(),
            natural_LE=chosen_LTE.any(dim=1).cpu(),
            kept_LE=kept_LE.cpu(),
            active_LE=used_LTE.any(dim=1).cpu(),
            ids_LTK=ids_LTK.cpu(),
            weights_LTK=weights_LTK.float().cpu(),
            missing_LT=(chosen_LTE & ~used_LTE).sum(dim=-1).cpu(),
            natural_weight_kept_L=(survives_LTE.sum(dim=(1, 2)) / natural_LTE.sum(dim=(1, 2))).cpu(),
            changed=self._policy is not None and bool(((run_LTE - natural_LTE).abs() > CHANGED).any()),
        )


def _dense(ids_LTK: Tensor, weights_LTK: Tensor, like_LTE: Tensor) -> Tensor:
    """Routing weights as fp32 [L, T, E], 0 where an expert is not used."""
    return torch.zeros_like(like_LTE).scatter_add_(2, ids_LTK, weights_LTK.float())


def _chosen(ids_LTK: Tensor, like_LTE: Tensor) -> Tensor:
    return torch.zeros_like(like_LTE, dtype=torch.bool).scatter_(2, ids_LTK, True)


def _shortlist(plan: ExpertPlan, used_TE: Tensor) -> Tensor:
    """A policy without a shortlist of its own kept what it used."""
    return used_TE.any(dim=0) if plan.kept_E is None else plan.kept_E


def _id_lists(sets_LE: Tensor) -> list[list[int]]:
    return [[expert for expert, member in enumerate(row) if member] for row in sets_LE.tolist()]
