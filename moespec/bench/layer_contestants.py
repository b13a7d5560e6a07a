"""Ways to run the same MoE layer on the same rows: ours on the kernels or on the CPU, and transformers'.

Owns what each contestant is allowed to have ready before the clock starts. Knows no clock. The names:

| name                 | what is timed                                                                              |
|----------------------|--------------------------------------------------------------------------------------------|
| layer                | ours, whole: router, select with the budget, experts, their sum                             |
| experts              | ours, without router and select                                                            |
| select               | ours, select alone, on given logits                                                        |
| load-only            | the active experts' bytes read and added up                                                 |
| eager, grouped_mm, batched_mm | transformers' experts on the same plan; the first is the class's own forward        |
| router + ...         | the same behind transformers' router, which chooses the same experts; where kernels run     |
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moespec.backends import rule_of
from moespec.bench.layers import BenchLayer, Layers
from moespec.bench.machine import Call
from moespec.bench.routings import Case, RoutedLayer
from moespec.config import BudgetConfig
from moespec.hf import ALL_EXPERTS_FUNCTIONS
from moespec.memory import free_bytes
from moespec.recorder import policy_for
from moespec.routing import RouterOutput, router_scores
from moespec.types import TreeContext

IMPLEMENTATIONS = ("grouped_mm", "batched_mm", "eager")
ROUTER = "router + "


@dataclass(frozen=True)
class Contest:
    """One case, ready to be timed.

    calls       by contestant, one per layer
    num_active  experts that the plan reads, mean over the layers
    golden      the first layer's output in plain torch, in fp32 where the kernels run
    skipped     contestants that cannot take part, and why
    """

    calls: Mapping[str, list[Call]]
    num_active: float
    golden: Callable[[], Tensor]
    skipped: Mapping[str, str]


def cpu_contest(layers: Layers, case: Case, routed: list[RoutedLayer], x_TD: Tensor) -> Contest:
    """Our CPU backend, as the engine would choose it, beside transformers'."""
    shape = layers.shape
    policy = policy_for(BudgetConfig(budget=case.budget), shape.num_experts)
    none_T = torch.zeros(case.num_rows, dtype=torch.int64)
    context = TreeContext(none_T, none_T.float(), 0)
    skipped = _skips(layers, case, x_TD.device)

    def plan(output: RouterOutput) -> tuple[Tensor, Tensor]:
        if policy is None:
            return output.ids_TK, output.weights_TK
        planned = policy.plan(router_scores(layers.family, output), context)
        return planned.ids_TK, planned.weights_TK

    def calls(layer: BenchLayer, route: RoutedLayer) -> dict[str, Call]:
        output = RouterOutput(*route.router(x_TD))
        ids_TK, weights_TK = plan(output)
        return {
            "layer": lambda: layers.backend(layer.experts, x_TD, *plan(RouterOutput(*route.router(x_TD)))),
            "experts": lambda: layers.backend(layer.experts, x_TD, ids_TK, weights_TK),
            "select": lambda: plan(output),
            **{name: call for name, call in _transformers(layer, route, x_TD, skipped).items() if ROUTER not in name},
        }

    both = list(zip(layers.layers, routed, strict=True))
    plans = [plan(RouterOutput(*route.router(x_TD))) for route in routed]
    num_active = sum(ids_TK[weights_TK != 0].unique().numel() for ids_TK, weights_TK in plans)
    first = both[0]
    return Contest(
        calls=_by_contestant([calls(layer, route) for layer, route in both]),
        num_active=num_active / len(plans),
        golden=lambda: first[0].experts(x_TD, first[1].ids_TK, first[1].weights_TK),
        skipped=skipped,
    )


def kernel_contest(layers: Layers, case: Case, routed: list[RoutedLayer], x_TD: Tensor) -> Contest:
    """Our kernels, the ceiling of what they could reach, and transformers' where it has the number format."""
    from kernels import reference

    ours = [_KernelLayer(layers, case, layer, route, x_TD) for layer, route in zip(layers.layers, routed, strict=True)]
    skipped = _skips(layers, case, x_TD.device)
    calls = [one.calls() | _transformers(one.layer, one.route, x_TD, skipped) for one in ours]
    first = ours[0].plan
    return Contest(
        calls=_by_contestant(calls),
        num_active=sum(int((one.plan.lists.experts_A >= 0).sum()) for one in ours) / len(ours),
        golden=lambda: reference.experts(x_TD.float(), first.ids_TK, first.weights_TK.float(), ours[0].layer.weights),
        skipped=skipped,
    )


class _KernelLayer:
    """One layer on the kernels, with its plan made once for those contestants that start behind it."""

    def __init__(self, layers: Layers, case: Case, layer: BenchLayer, route: RoutedLayer, x_TD: Tensor) -> None:
        from kernels.select import Settings

        shape = layers.shape
        self.layer, self.route, self._x_TD, self._top_k = layer, route, x_TD, shape.top_k
        rule = rule_of(layers.family)
        assert rule is not None, "every shape that is timed is of a family that the kernel knows"
        self._rule = rule
        self._row_weights_T = torch.ones(case.num_rows, device=x_TD.device)
        self._settings = Settings.on(x_TD.device, case.num_rows, case.budget or shape.num_experts)
        self.plan = self._select(self._logits())

    def _logits(self) -> Tensor:
        router = self.route.router
        return F.linear(self._x_TD, router.weight, getattr(router, "bias", None))

    def _select(self, logits_TE: Tensor) -> Any:
        from kernels.select import select

        return select(logits_TE, self._row_weights_T, self._settings, self._top_k, self._rule, self._x_TD.dtype)

    def _experts(self, plan: Any) -> Tensor:
        from kernels.experts import moe_experts

        return moe_experts(self._x_TD, plan.ids_TK, plan.weights_TK, self.layer.weights, plan.lists)

    def calls(self) -> dict[str, Call]:
        from moespec.bench.load_only import load_only

        logits_TE, weights = self._logits(), self.layer.weights
        return {
            "layer": lambda: self._experts(self._select(self._logits())),
            "experts": lambda: self._experts(self.plan),
            "select": lambda: self._select(logits_TE),
            "load-only": lambda: load_only(weights, self.plan.lists.experts_A),
        }


def _transformers(layer: BenchLayer, route: RoutedLayer, x_TD: Tensor, skipped: Mapping[str, str]) -> dict[str, Call]:
    """Its experts on the plan, and behind its own router."""
    calls: dict[str, Call] = {}
    for name in IMPLEMENTATIONS:
        if name not in skipped:
            run = _eager if name == "eager" else ALL_EXPERTS_FUNCTIONS[name]
            calls[name] = partial(run, layer.experts, x_TD, route.ids_TK, route.weights_TK)
            calls[ROUTER + name] = partial(_routed, run, layer.experts, route.router, x_TD)
    return calls


def _eager(experts: Any, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """The class's own forward: `layers.py` built the modules with no other implementation."""
    return experts(x_TD, ids_TK, weights_TK)


def _routed(run: Callable, experts: Any, router: Any, x_TD: Tensor) -> Tensor:
    _, weights_TK, ids_TK = router(x_TD)
    return run(experts, x_TD, ids_TK, weights_TK)


def _skips(layers: Layers, case: Case, device: torch.device) -> dict[str, str]:
    """Transformers' implementations that cannot take part, and why."""
    if layers.layers[0].experts is None:
        return dict.fromkeys(IMPLEMENTATIONS, f"transformers has no {layers.dtype_name} experts")
    # It copies the matrices of every row's every expert; two contestants do, and each is run before it is captured.
    copied_bytes = case.num_rows * layers.shape.top_k * layers.expert_bytes
    if 3 * copied_bytes > free_bytes(device):
        return {"batched_mm": f"it would copy {copied_bytes / 1e9:.1f} GB of weights: too much for the memory left"}
    return {}


def _by_contestant(calls: list[dict[str, Call]]) -> dict[str, list[Call]]:
    return {name: [one[name] for one in calls] for name in calls[0]}
