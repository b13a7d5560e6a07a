"""What one step's routing comes to: experts natural, kept and active, mass kept, what was not run, whether it changed.

Owns these definitions, in tensor operations and, for routing in fp32 on the CPU, as one compiled call
(`native/routing.py`, tested against the same brute force). Knows nothing of models or policies.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moespec.native import check_ids, kernels_for
from moespec.packed_copy import to_host
from moespec.step_router import StepRouting
from moespec.trace import LayerTrace

CHANGED = 1e-6  # routing weights that differ by less are the same up to rounding


@dataclass(frozen=True)
class RoutingCounts:
    """One step's routing over L layers and T rows; tensors on the host."""

    score_LE: Tensor  # router probability summed over the rows
    natural_LE: Tensor
    kept_LE: Tensor
    active_LE: Tensor
    natural_ids_LTK: Tensor
    ids_LTK: Tensor
    weights_LTK: Tensor
    missing_LT: Tensor  # natural (row, expert) pairs that were not run
    mass_kept_L: Tensor  # share of the score on the shortlist; 1 without a budget
    natural_weight_kept_L: Tensor
    changed: bool  # some row's routing differs from the natural one

    @classmethod
    def of(cls, tensors: list[Tensor]) -> RoutingCounts:
        """From `count_tensors`, brought to the host."""
        names = [field.name for field in fields(cls)]
        values: dict[str, Any] = dict(zip(names, tensors, strict=True))
        return cls(**{**values, "changed": bool(values["changed"])})

    def natural(self) -> RoutingCounts:
        """The same where no policy acted: everything was kept."""
        return replace(
            self,
            kept_LE=self.natural_LE,
            active_LE=self.natural_LE,
            mass_kept_L=torch.ones_like(self.mass_kept_L),
            natural_weight_kept_L=torch.ones_like(self.natural_weight_kept_L),
            missing_LT=torch.zeros_like(self.missing_LT),
            changed=False,
        )

    def first_rows(self, num_rows: int) -> RoutingCounts:
        """Without the padding behind the first rows: nothing else counts it."""
        return replace(
            self,
            natural_ids_LTK=self.natural_ids_LTK[:, :num_rows],
            ids_LTK=self.ids_LTK[:, :num_rows],
            weights_LTK=self.weights_LTK[:, :num_rows],
            missing_LT=self.missing_LT[:, :num_rows],
        )

    def num_experts_by_layer(self) -> tuple[list[int], list[int], list[int]]:
        """(natural, kept, active) per layer."""
        natural, kept, active = (sets.numpy().sum(axis=1).tolist() for sets in self._sets)
        return natural, kept, active

    @property
    def _sets(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.natural_LE, self.kept_LE, self.active_LE

    def layer_traces(self, layers: list[int]) -> list[LayerTrace]:
        """The layers' entries of a StepTrace."""
        # In numpy: torch lets go of the interpreter for each operation, and has to wait for it behind the next step.
        scores = np.round(self.score_LE.numpy().astype(float), 4).tolist()
        natural, kept, active = map(_id_lists, self._sets)
        mass, weight = self.mass_kept_L.tolist(), self.natural_weight_kept_L.tolist()
        displaced = self.missing_LT.numpy().sum(axis=1).tolist()
        ids, chosen = (ids_LTK.numpy().astype("<u2") for ids_LTK in (self.ids_LTK, self.natural_ids_LTK))
        weights = self.weights_LTK.numpy().astype("<f2")
        return [
            LayerTrace(
                layer=layer,
                score=scores[n],
                natural=natural[n],
                kept=kept[n],
                active=active[n],
                ids=base64.b64encode(ids[n].tobytes()).decode(),
                weights=base64.b64encode(weights[n].tobytes()).decode(),
                natural_ids=base64.b64encode(chosen[n].tobytes()).decode(),
                mass_kept=round(mass[n], 6),
                natural_weight_kept=round(weight[n], 6),
                num_displaced=displaced[n],
            )
            for n, layer in enumerate(layers)
        ]


def count_routing(routing: StepRouting, *, is_natural: bool) -> RoutingCounts:
    """All layers at once. `is_natural`: no policy acted, so that what the routers chose ran and everything was kept."""
    logits_LTE = routing.logits_LTE
    weights = routing.natural_weights_LTK, routing.weights_LTK
    kernels = None if logits_LTE is None else kernels_for(logits_LTE, *weights)
    if kernels is not None:
        return _count_compiled(kernels, routing, is_natural)
    counts = RoutingCounts.of(to_host(count_tensors(routing)))
    return counts.natural() if is_natural else counts


def shares_read(counts: Sequence[RoutingCounts]) -> list[float]:
    """Per request of a step the experts it reads, summed over layers: one that n requests use is read once and counts
    as an nth for each."""
    active_RLE = torch.stack([count.active_LE for count in counts])
    return (active_RLE / active_RLE.sum(dim=0).clamp(min=1)).sum(dim=(1, 2)).tolist()


def count_tensors(routing: StepRouting, valid_T: Tensor | None = None) -> list[Tensor]:
    """The fields of RoutingCounts, in their order, where a policy acted; on the routing's device, without a copy.

    `valid_T`: bool, the rows that are no padding; padding has weights of 0.
    """
    score_LE = routing.scores()
    natural_LTE = _dense(routing.natural_ids_LTK, routing.natural_weights_LTK, score_LE)
    run_LTE = _dense(routing.ids_LTK, routing.weights_LTK, score_LE)
    chosen_LTE = torch.zeros_like(run_LTE, dtype=torch.bool).scatter_(2, routing.natural_ids_LTK, True)
    if valid_T is not None:
        chosen_LTE &= valid_T[:, None]
    used_LTE = run_LTE != 0
    return [
        score_LE,
        chosen_LTE.any(dim=1),
        routing.kept_LE,
        used_LTE.any(dim=1),
        routing.natural_ids_LTK,
        routing.ids_LTK,
        routing.weights_LTK.float(),
        (chosen_LTE & ~used_LTE).sum(dim=-1),
        (score_LE * routing.kept_LE).sum(dim=1) / score_LE.sum(dim=1),
        (natural_LTE * used_LTE).sum(dim=(1, 2)) / natural_LTE.sum(dim=(1, 2)),
        ((run_LTE - natural_LTE).abs() > CHANGED).any(),
    ]


def _count_compiled(kernels: Any, routing: StepRouting, is_natural: bool) -> RoutingCounts:
    assert routing.logits_LTE is not None
    given = routing.logits_LTE, routing.natural_ids_LTK, routing.natural_weights_LTK
    run = routing.ids_LTK, routing.weights_LTK, routing.kept_LE
    # Copies where rows are some of a batch's: kernels take arrays in C order.
    arrays = [part.contiguous().numpy() for part in (*given, *run)]
    if not is_natural:
        check_ids(arrays[3], routing.logits_LTE.shape[-1])
    names = ("score_LE", "mass_kept_L", "natural_LE", "kept_LE", "active_LE", "missing_LT", "natural_weight_kept_L")
    *parts, changed = kernels.routing.count(*arrays, is_natural, CHANGED)
    tensors: dict[str, Any] = {name: torch.from_numpy(part) for name, part in zip(names, parts, strict=True)}
    routed = {name: getattr(routing, name) for name in ("natural_ids_LTK", "ids_LTK", "weights_LTK")}
    return RoutingCounts(changed=changed, **routed, **tensors)


def _dense(ids_LTK: Tensor, weights_LTK: Tensor, score_LE: Tensor) -> Tensor:
    """Routing weights as fp32 [L, T, E], 0 where an expert is not used."""
    (num_layers, num_rows, _), num_experts = ids_LTK.shape, score_LE.shape[1]
    dense_LTE = score_LE.new_zeros(num_layers, num_rows, num_experts)
    return dense_LTE.scatter_add_(2, ids_LTK, weights_LTK.float())


def _id_lists(sets_LE: Tensor) -> list[list[int]]:
    return [np.flatnonzero(row).tolist() for row in sets_LE.numpy()]
