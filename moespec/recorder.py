"""Records every MoE layer's routing in one step: asks the policy for the plan, keeps what ran.

What it comes to is counted in `counts.py`. Knows nothing of models beyond their numbers of experts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moespec.budget import MoESpec, row_weights
from moespec.config import BudgetConfig
from moespec.counts import RoutingCounts, count_routing
from moespec.moe_layers import MoeLayer
from moespec.policies.base import ExpertPolicy
from moespec.routing import RouterOutput, router_scores
from moespec.step_router import CompiledBudget, StepRouting
from moespec.types import DraftTree, ExpertPlan, TreeContext


def policy_for(budget: BudgetConfig, num_experts: int) -> ExpertPolicy | None:
    """The policy that acts, or None where no routing can change: no budget, or B >= E."""
    if not isinstance(budget.policy, str):
        return budget.policy
    if budget.coverage is None and (budget.budget is None or budget.budget >= num_experts):
        return None
    return MoESpec(budget)


class StepRecorder:
    """One step's router for `Target.stepping`, and afterwards its counts."""

    plans_from_logits = False

    def __init__(self, moe_layers: list[MoeLayer], tree: DraftTree, policy: ExpertPolicy | None) -> None:
        self._moe_layers = moe_layers
        self._tree = tree
        self._policy = policy
        self._outputs: list[RouterOutput] = []
        self._plans: list[ExpertPlan] = []
        self._routing: StepRouting | None = None

    def route(self, number: int, output: RouterOutput) -> ExpertPlan:
        """What the experts of MoE layer `number` will see."""
        if self._policy is None:
            plan = ExpertPlan(ids_TK=output.ids_TK, weights_TK=output.weights_TK)
        else:
            layer = self._moe_layers[number]
            context = TreeContext(self._tree.depths_T, self._tree.draft_logp_T, layer.layer)
            plan = self._policy.plan(router_scores(layer.family, output), context)
        self._outputs.append(output)
        self._plans.append(plan)
        return plan

    def compiled_budget(self) -> CompiledBudget | None:
        """The policy for a call that takes all layers; None for a policy that is not MoE-Spec."""
        ones_T = torch.ones(self._tree.num_rows)
        if self._policy is None:
            return CompiledBudget(ones_T)
        # A subclass may plan otherwise, and a MoESpec handed over as an object may lack what its plan asks for.
        if type(self._policy) is not MoESpec or self._policy.config.is_lossless:
            return None
        config = self._policy.config
        context = TreeContext(self._tree.depths_T, self._tree.draft_logp_T, 0)
        weights_T = row_weights(config.row_weight, config.depth_decay, context)
        return CompiledBudget(
            row_weights_T=ones_T if weights_T is None else weights_T,
            natural=config.score == "natural",
            protect_root=config.protect_root,
            size=config.budget or 0,
            coverage=float(config.coverage or 0),
            truncates=config.policy == "truncation",
        )

    def record(self, routing: StepRouting) -> None:
        """The routing of all layers, where `route` was not asked."""
        self._routing = routing

    def counts(self) -> RoutingCounts:
        """What the step's routing came to, all layers at once."""
        return count_routing(self._routing or self._stacked(), is_natural=self._policy is None)

    def _stacked(self) -> StepRouting:
        weights_LTK = torch.stack([plan.weights_TK for plan in self._plans])
        ids_LTK = torch.stack([plan.ids_TK for plan in self._plans])
        num_experts = self._outputs[0].logits_TE.shape[-1]
        # Where probability is no softmax of the logits, its sum is taken here instead.
        families = [layer.family for layer in self._moe_layers]
        is_softmax = all(family.activation == "softmax" for family in families)
        pairs = zip(families, self._outputs, strict=True)
        return StepRouting(
            logits_LTE=torch.stack([output.logits_TE for output in self._outputs]) if is_softmax else None,
            natural_ids_LTK=torch.stack([output.ids_TK for output in self._outputs]),
            natural_weights_LTK=torch.stack([output.weights_TK for output in self._outputs]),
            ids_LTK=ids_LTK,
            weights_LTK=weights_LTK,
            kept_LE=torch.stack([_shortlist(plan, num_experts) for plan in self._plans]),
            score_LE=None
            if is_softmax
            else torch.stack([family.probabilities(output.logits_TE).sum(dim=0) for family, output in pairs]),
        )


def _shortlist(plan: ExpertPlan, num_experts: int) -> Tensor:
    """bool [E]; a policy without a shortlist of its own kept what it used."""
    if plan.kept_E is not None:
        return plan.kept_E
    used_E = torch.zeros(num_experts, dtype=torch.bool, device=plan.ids_TK.device)
    return used_E.index_fill_(0, plan.ids_TK[plan.weights_TK != 0], True)
