"""Records every MoE layer's routing in one step: asks the policy for the plan, counts what it did.

Owns the definitions of experts natural / kept / active, mass kept, displaced and lossless. Knows nothing of models
beyond their numbers of experts.
"""

from __future__ import annotations

import base64
from dataclasses import dataclass

import torch
from torch import Tensor

from moespec.budget import MoESpec, row_weights
from moespec.config import BudgetConfig
from moespec.models import MoeLayer
from moespec.policies.base import ExpertPolicy
from moespec.routing import RouterOutput, router_scores
from moespec.step_router import CompiledBudget, StepRouting
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
    """One step's router for `Target.stepping`, and afterwards its counts."""

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
        """All layers at once: a dozen small operations instead of a dozen per layer."""
        routing = self._routing or self._stacked()
        logits_LTE = routing.logits_LTE.float()
        natural_LTE = _dense(routing.natural_ids_LTK, routing.natural_weights_LTK, logits_LTE)
        chosen_LTE = torch.zeros_like(logits_LTE, dtype=torch.bool).scatter_(2, routing.natural_ids_LTK, True)
        if self._policy is None:
            run_LTE, used_LTE, kept_LE = natural_LTE, chosen_LTE, chosen_LTE.any(dim=1)
        else:
            run_LTE = _dense(routing.ids_LTK, routing.weights_LTK, logits_LTE)
            used_LTE, kept_LE = run_LTE != 0, routing.kept_LE
        survives_LTE = natural_LTE * used_LTE
        score_LE = logits_LTE.softmax(dim=-1).sum(dim=1)
        mass_kept_L = (score_LE * kept_LE).sum(dim=1) / score_LE.sum(dim=1)
        return RoutingCounts(
            score_LE=score_LE.cpu(),
            mass_kept_L=(torch.ones_like(mass_kept_L) if self._policy is None else mass_kept_L).cpu(),
            natural_LE=chosen_LTE.any(dim=1).cpu(),
            kept_LE=kept_LE.cpu(),
            active_LE=used_LTE.any(dim=1).cpu(),
            ids_LTK=routing.ids_LTK.cpu(),
            weights_LTK=routing.weights_LTK.float().cpu(),
            missing_LT=(chosen_LTE & ~used_LTE).sum(dim=-1).cpu(),
            natural_weight_kept_L=(survives_LTE.sum(dim=(1, 2)) / natural_LTE.sum(dim=(1, 2))).cpu(),
            changed=self._policy is not None and bool(((run_LTE - natural_LTE).abs() > CHANGED).any()),
        )

    def _stacked(self) -> StepRouting:
        weights_LTK = torch.stack([plan.weights_TK for plan in self._plans])
        ids_LTK = torch.stack([plan.ids_TK for plan in self._plans])
        num_experts = self._outputs[0].logits_TE.shape[-1]
        return StepRouting(
            logits_LTE=torch.stack([output.logits_TE for output in self._outputs]),
            natural_ids_LTK=torch.stack([output.ids_TK for output in self._outputs]),
            natural_weights_LTK=torch.stack([output.weights_TK for output in self._outputs]),
            ids_LTK=ids_LTK,
            weights_LTK=weights_LTK,
            kept_LE=torch.stack([_shortlist(plan, num_experts) for plan in self._plans]),
        )


def _dense(ids_LTK: Tensor, weights_LTK: Tensor, like_LTE: Tensor) -> Tensor:
    """Routing weights as fp32 [L, T, E], 0 where an expert is not used."""
    return torch.zeros_like(like_LTE).scatter_add_(2, ids_LTK, weights_LTK.float())


def _shortlist(plan: ExpertPlan, num_experts: int) -> Tensor:
    """bool [E]; a policy without a shortlist of its own kept what it used."""
    if plan.kept_E is not None:
        return plan.kept_E
    used_E = torch.zeros(num_experts, dtype=torch.bool, device=plan.ids_TK.device)
    return used_E.index_fill_(0, plan.ids_TK[plan.weights_TK != 0], True)


def _id_lists(sets_LE: Tensor) -> list[list[int]]:
    return [[expert for expert, member in enumerate(row) if member] for row in sets_LE.tolist()]
