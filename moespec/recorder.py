"""Records every MoE layer's routing in one step: asks the policy for the plan, keeps what ran.

What it comes to is counted in `counts.py`. Knows nothing of models beyond their numbers of experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

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
    """One step's router for `Target.stepping`, and afterwards its counts, request by request.

    trees: the requests', whose rows come one after the other. The policy is asked for each request's rows, or, where
    `is_shared`, for all of them together; never for a single row, which keeps its own routing. positions: of the roots.
    """

    plans_from_logits = False

    def __init__(
        self,
        moe_layers: list[MoeLayer],
        trees: Sequence[DraftTree],
        policy: ExpertPolicy | None,
        is_shared: bool = False,
        positions: Sequence[int] | None = None,
    ) -> None:
        self._moe_layers = moe_layers
        self._sizes = [tree.num_rows for tree in trees]
        self._policy = policy
        self._is_shared = is_shared and len(trees) > 1
        positions = positions or [0] * len(trees)
        pairs = [(trees, positions[0])] if self._is_shared else zip(([tree] for tree in trees), positions, strict=True)
        self._asked = [_context(together, position) for together, position in pairs]
        self._outputs: list[RouterOutput] = []
        self._plans: list[ExpertPlan] = []
        self._kept: list[list[Tensor]] = []  # per layer the shortlists, as many as the policy was asked for
        self._routings: list[StepRouting] = []

    def route(self, number: int, output: RouterOutput) -> ExpertPlan:
        """What the experts of MoE layer `number` will see."""
        pairs = zip(_split(output, self._asked), self._asked, strict=True)
        plans = [self._plan(number, part, context) for part, context in pairs]
        plan = plans[0]
        if len(plans) > 1:
            plan = ExpertPlan(torch.cat([p.ids_TK for p in plans]), torch.cat([p.weights_TK for p in plans]))
        self._outputs.append(output)
        self._plans.append(plan)
        self._kept.append([_shortlist(plan, output.logits_TE.shape[-1]) for plan in plans])
        return plan

    def _plan(self, number: int, output: RouterOutput, context: TreeContext) -> ExpertPlan:
        if not self._acts_on(context):
            return ExpertPlan(ids_TK=output.ids_TK, weights_TK=output.weights_TK)
        assert self._policy is not None
        layer = self._moe_layers[number]
        return self._policy.plan(router_scores(layer.family, output), replace(context, layer=layer.layer))

    def _acts_on(self, context: TreeContext) -> bool:
        return self._policy is not None and len(context.depths_T) > 1

    def compiled_budget(self) -> CompiledBudget | None:
        """The policy for a call that takes all layers; None for a policy that is not MoE-Spec."""
        ones_T = torch.ones(sum(self._sizes), dtype=torch.float32)
        if self._policy is None:
            return CompiledBudget(ones_T)
        # A subclass may plan otherwise, and a MoESpec handed over as an object may lack what its plan asks for.
        if type(self._policy) is not MoESpec or self._policy.config.is_lossless:
            return None
        config = self._policy.config
        weights = [row_weights(config.row_weight, config.depth_decay, context) for context in self._asked]
        given = [weights_T for weights_T in weights if weights_T is not None]
        return CompiledBudget(
            row_weights_T=torch.cat(given) if given else ones_T,
            is_shared=self._is_shared,
            natural=config.score == "natural",
            protect_root=config.protect_root,
            size=config.budget or 0,
            coverage=float(config.coverage or 0),
            truncates=config.policy == "truncation",
        )

    def record(self, routings: list[StepRouting]) -> None:
        """The routing of all layers, where `route` was not asked."""
        self._routings = routings

    @property
    def acted(self) -> list[bool]:
        """Whether the policy planned for a request's rows."""
        acted = [self._acts_on(context) for context in self._asked]
        return acted * len(self._sizes) if self._is_shared else acted

    def counts(self) -> list[RoutingCounts]:
        """What the step's routing came to, all layers at once."""
        pairs = zip(self._routings or self._stacked(), self.acted, strict=True)
        return [count_routing(routing, is_natural=not acted) for routing, acted in pairs]

    def _stacked(self) -> list[StepRouting]:
        outputs, plans = self._outputs, self._plans
        parts = (
            [moe.family.softmax_logits(o.logits_TE) for moe, o in zip(self._moe_layers, outputs, strict=True)],
            [output.ids_TK for output in outputs],
            [output.weights_TK for output in outputs],
            [plan.ids_TK for plan in plans],
            [plan.weights_TK for plan in plans],
        )
        kept = [torch.stack(by_layer) for by_layer in zip(*self._kept, strict=True)]
        if self._is_shared:
            kept *= len(self._sizes)
        return StepRouting.by_request([torch.stack(part) for part in parts], kept, self._sizes)


def _context(trees: Sequence[DraftTree], position: int) -> TreeContext:
    """Of rows that are planned for together; the layer is filled in."""
    if len(trees) == 1:
        return TreeContext(trees[0].depths_T, trees[0].draft_logp_T, layer=0, position=position)
    depths_T = torch.cat([tree.depths_T for tree in trees])
    numbers = [torch.full_like(tree.depths_T, number) for number, tree in enumerate(trees)]
    return TreeContext(
        depths_T=depths_T,
        draft_logp_T=torch.cat([tree.draft_logp_T for tree in trees]),
        layer=0,
        requests_T=torch.cat(numbers),
        position=position,
    )


def _split(output: RouterOutput, contexts: Sequence[TreeContext]) -> list[RouterOutput]:
    """A router's output by the rows of these contexts."""
    if len(contexts) == 1:
        return [output]
    sizes = [len(context.depths_T) for context in contexts]
    parts = [[None] * len(sizes) if part is None else part.split(sizes) for part in output]
    return [RouterOutput(*some) for some in zip(*parts, strict=True)]


def _shortlist(plan: ExpertPlan, num_experts: int) -> Tensor:
    """bool [E]; a policy without a shortlist of its own kept what it used."""
    if plan.kept_E is not None:
        return plan.kept_E
    used_E = torch.zeros(num_experts, dtype=torch.bool, device=plan.ids_TK.device)
    return used_E.index_fill_(0, plan.ids_TK[plan.weights_TK != 0], True)
