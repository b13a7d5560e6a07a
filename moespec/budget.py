"""MoE-Spec (arXiv 2602.16052): score, select, truncate, substitute. The paper, and nothing else.

Tensor in, tensor out; fixed shapes and no host synchronisation, so that a CUDA graph can hold it. Knows nothing of
models or engines. Letters: T tree rows, E experts, K top-k; B is the budget.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moespec.config import BudgetConfig
from moespec.types import ExpertPlan, RouterScores, TreeContext


def row_weights(kind: str, depth_decay: float, context: TreeContext) -> Tensor | None:
    """w_t of the score, fp32 [T]: None (the paper: all equal), decay ** depth, or the drafter's path probability."""
    if kind == "depth":
        return depth_decay ** context.depths_T.float()
    if kind == "path":
        return context.draft_logp_T.exp()
    return None


def score_experts(scores: RouterScores, kind: str, weights_T: Tensor | None) -> Tensor:
    """s_i = sum_t w_t * P[t, i], fp32 [E] (section 3.2 of the paper, w_t = 1 there; the full softmax over all experts).

    kind "natural" replaces P by each row's own top-k weights and 0 elsewhere: weight that would really be used.
    """
    if kind == "natural":
        mass_TE = torch.zeros_like(scores.probs_TE)
        mass_TE.scatter_(1, scores.natural_ids_TK, scores.natural_weights_TK.float())
    else:
        mass_TE = scores.probs_TE
    return mass_TE.sum(dim=0) if weights_T is None else weights_T @ mass_TE


def select_experts(score_E: Tensor, budget: int | Tensor) -> Tensor:
    """S: the `budget` experts with the highest score, bool [E]; ties go to the lower id."""
    order_E = score_E.argsort(descending=True, stable=True)
    rank_E = torch.arange(score_E.shape[0], device=score_E.device)
    return torch.zeros_like(score_E, dtype=torch.bool).scatter(0, order_E, rank_E < budget)


def cover(score_E: Tensor, coverage: float, min_experts: int) -> Tensor:
    """The smallest set whose share of the score reaches `coverage`, at least `min_experts`, bool [E].

    The paper's second selection mode: K = #{cumulative share < coverage} + 1, clamped to [k, E].
    """
    sorted_E, order_E = score_E.sort(descending=True, stable=True)
    cumulative_E = sorted_E.cumsum(dim=0) / sorted_E.sum()
    rank_E = torch.arange(score_E.shape[0], device=score_E.device)
    keep_rank_E = (rank_E <= (cumulative_E < coverage).sum()) | (rank_E < min_experts)
    return torch.zeros_like(keep_rank_E).scatter(0, order_E, keep_rank_E)


def used_by_roots(scores: RouterScores, context: TreeContext) -> Tensor:
    """The natural experts of the rows that are roots, bool [E]: one request has one root, a batch as many as it has."""
    used_TE = torch.zeros_like(scores.probs_TE, dtype=torch.bool)
    is_root_TK = (context.depths_T == 0)[:, None].expand_as(scores.natural_ids_TK)
    return used_TE.scatter(1, scores.natural_ids_TK, is_root_TK).any(dim=0)


def truncate(scores: RouterScores, kept_E: Tensor) -> tuple[Tensor, Tensor]:
    """Truncation: every row keeps its natural experts; those outside S get weight 0. (ids [T, K], weights [T, K])"""
    ids_TK = scores.natural_ids_TK
    weights_TK = scores.family.weights(scores.logits_TE, scores.probs_TE, ids_TK, kept_E[ids_TK])
    return ids_TK, weights_TK.to(scores.natural_weights_TK.dtype)


def substitute(scores: RouterScores, kept_E: Tensor) -> tuple[Tensor, Tensor]:
    """Substitution: every row takes its top-k inside S, weighted by its original probabilities. [T, K] each

    Where S has fewer than k experts, so has every row.
    """
    best = scores.family.selection(scores.logits_TE, scores.probs_TE, kept_E).topk(scores.top_k, dim=-1)
    # Groups, too, may leave a row fewer than k of S: what is at minus infinity is none of them, and weighs nothing.
    survives_TK = best.values > -torch.inf
    weights_TK = scores.family.weights(scores.logits_TE, scores.probs_TE, best.indices, survives_TK)
    return best.indices, weights_TK.to(scores.natural_weights_TK.dtype)


@dataclass(frozen=True)
class MoESpec:
    """The method as an expert policy: `plan` is what runs in every MoE layer of a verify step."""

    config: BudgetConfig

    def plan(self, scores: RouterScores, context: TreeContext) -> ExpertPlan:
        """Shortlist the experts of this layer for all rows of the tree and route inside it."""
        config = self.config
        weights_T = row_weights(config.row_weight, config.depth_decay, context)
        score_E = score_experts(scores, config.score, weights_T)
        roots_E = used_by_roots(scores, context) if config.protect_root else None
        if config.coverage is not None:
            kept_E = cover(score_E, config.coverage, scores.top_k)
            if roots_E is not None:
                kept_E = kept_E | roots_E
        else:
            assert config.budget is not None, "a MoESpec needs a budget or a coverage"
            # The roots' own experts outrank all others; they count against the budget.
            ranked_E = score_E if roots_E is None else score_E + 2 * score_E.sum() * roots_E
            kept_E = select_experts(ranked_E, max(config.budget, scores.top_k))
        route = truncate if config.policy == "truncation" else substitute
        ids_TK, weights_TK = route(scores, kept_E)
        return ExpertPlan(ids_TK=ids_TK, weights_TK=weights_TK, kept_E=kept_E, score_E=score_E)
