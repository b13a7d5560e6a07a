"""Which rows go to which experts while a layer is timed: random, with exactly as many experts active as a case says.

Owns the cases and the router weights that lead to them, so that whatever routes these rows finds the same plan. Knows
nothing of experts' weights. Letters: T rows, E experts, K top-k, D hidden size.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moespec.bench.layers import Layers, LayerShape

ROWS = (1, 2, 4, 8, 16, 32, 48, 64)
BUDGETS = (8, 12, 16, 24, 32, 48, 64, None)
# Above all noise, and so far that 64 rows' probability of an expert outside the plan stays below one row's inside.
_CHOSEN_LOGIT, _NOISE = 8.0, 0.5


@dataclass(frozen=True)
class Case:
    """T rows under a budget; None is none."""

    num_rows: int
    budget: int | None


@dataclass(frozen=True)
class RoutedLayer:
    """A layer's router (transformers' module) and its plan for these rows."""

    router: Any
    ids_TK: Tensor
    weights_TK: Tensor


def cases(shape: LayerShape, rows: Sequence[int], budgets: Sequence[int | None]) -> list[Case]:
    """Every number of rows with every budget in [K, E) that could drop an expert; a single row is never budgeted."""
    found = []
    for num_rows in rows:
        most = min(shape.num_experts, num_rows * shape.top_k)
        kept = [budget for budget in budgets if budget is not None and shape.top_k <= budget < most]
        is_free = None in budgets or any(budget is not None and budget >= most for budget in budgets)
        found += [Case(num_rows, budget) for budget in kept if num_rows > 1]
        found += [Case(num_rows, None)] if is_free or num_rows == 1 else []
    return found


def random_plan(case: Case, shape: LayerShape, generator: torch.Generator) -> Tensor:
    """ids [T, K] on the CPU: uniform where the budget holds them all, else uniform among `budget` experts, all used."""
    shuffled_TE = torch.rand(case.num_rows, shape.num_experts, generator=generator).argsort(dim=1)
    natural_TK = shuffled_TE[:, : shape.top_k]
    if case.budget is None or natural_TK.unique().numel() <= case.budget:
        return natural_TK
    kept_B = torch.randperm(shape.num_experts, generator=generator)[: case.budget]
    order_TB = torch.rand(case.num_rows, case.budget, generator=generator)
    # Each kept expert comes first in one row, in turn: whatever the others choose, none is left out.
    turn_B = torch.arange(case.budget)
    order_TB[turn_B % case.num_rows, turn_B] -= 1
    return kept_B[order_TB.argsort(dim=1)[:, : shape.top_k]]


def wanted_logits(ids_TK: Tensor, num_experts: int, generator: torch.Generator) -> Tensor:
    """[T, E] fp32: noise, and every row's planned experts far above it."""
    logits_TE = _NOISE * torch.randn(len(ids_TK), num_experts, generator=generator)
    return logits_TE.scatter_add_(1, ids_TK, torch.full(ids_TK.shape, _CHOSEN_LOGIT))


def random_rows(layers: Layers, num_rows: int, device: torch.device) -> Tensor:
    """x [T, D]. More rows than features would have no router that tells them apart."""
    if num_rows > layers.shape.hidden_size:
        raise ValueError(f"{num_rows} rows of {layers.shape.hidden_size} features cannot be routed at will: use fewer.")
    generator = torch.Generator(device).manual_seed(num_rows)
    return torch.randn(num_rows, layers.shape.hidden_size, device=device, generator=generator).to(layers.dtype)


@torch.no_grad()
def route(layers: Layers, case: Case, x_TD: Tensor) -> list[RoutedLayer]:
    """A router and its plan for every layer, each its own."""
    generator = torch.Generator().manual_seed(case.num_rows)
    inverse_DT = torch.linalg.pinv(x_TD.float())
    routed = []
    for _ in layers.layers:
        ids_TK = random_plan(case, layers.shape, generator)
        logits_TE = wanted_logits(ids_TK, layers.shape.num_experts, generator).to(x_TD.device)
        router: Any = copy.deepcopy(layers.router)
        for parameter in router.parameters():
            parameter.requires_grad_(False).zero_()  # gpt-oss has a bias, too
        router.weight.copy_((inverse_DT @ logits_TE).T)  # of the least norm, such that x @ weight.T are these logits
        _, weights_TK, found_TK = router(x_TD)
        assert torch.equal(found_TK.sort(dim=1).values.cpu(), ids_TK.sort(dim=1).values), "the router left its plan"
        routed.append(RoutedLayer(router, found_TK, weights_TK))
    return routed
