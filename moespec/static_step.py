"""A verify step of fixed shape: everything that may change between two steps lies in buffers on the device.

Owns the buffers, what is computed of them (embedding to logits, features, opinions, routing and its counts), and the
rule for which targets can have it. Nothing in `StaticStep.run` asks the device for anything, so that a CUDA graph can
hold it (`graph.py`); without one the same operations run one by one. Letters as in `types.py`; S: the cache's capacity.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moespec.backends import TritonBackend
from moespec.budget import MoESpec, row_weights
from moespec.counts import count_tensors
from moespec.kv_cache import TreeCache
from moespec.routing import FAMILIES, RouterOutput
from moespec.sampling import TreeOpinions
from moespec.step_router import StepRouting
from moespec.types import DraftTree, ExpertPlan, TreeContext

if TYPE_CHECKING:
    from kernels.select import Selection, Settings
    from moespec.target import Target

BUCKETS = (1, 2, 4, 8, 16, 32, 48, 64)  # rows


def unsupported_reason(target: Target) -> str | None:
    """Why a target has no step of fixed shape, in words; None if it has."""
    if not isinstance(target.backend, TritonBackend) or target.backend.name != "triton":
        return "its experts do not run on Triton kernels"
    unknown = {moe.family.name for moe in target.moe_layers if moe.family not in FAMILIES}
    if unknown:
        return f"the select kernel does not know the router family {', '.join(sorted(unknown))}"
    return None


@dataclass(frozen=True)
class StaticOutputs:
    """What a step leaves on the device; the next run of the same step overwrites it.

    counts: see `counts.count_tensors`; of padded rows nothing means anything.
    """

    logits_TV: Tensor
    features_TF: Tensor | None
    opinions: list[Tensor]  # best_T, top_ids_TA, top_logp_TA, node_logp_T
    counts: list[Tensor]


class StaticStep:
    """Steps of one target with a fixed number of rows on a cache whose storage does not move."""

    def __init__(self, target: Target, num_rows: int, cache: TreeCache) -> None:
        from kernels.select import Settings

        self._target, self._cache, self._num_rows = target, cache, num_rows
        device = target.device
        self._rows_T = torch.arange(num_rows, device=device)
        self._positions_S = torch.arange(cache.capacity, device=device)
        self._tokens_T, self._depths_T, self._parents_T = (torch.zeros_like(self._rows_T) for _ in range(3))
        self._seen_TT = torch.zeros(num_rows, num_rows, dtype=torch.bool, device=device)
        self._row_weights_T = torch.ones(num_rows, device=device)
        self._prefix_1 = torch.zeros(1, dtype=torch.int64, device=device)
        self._settings: Settings = Settings.on(device, num_rows, target.num_experts)

    def fill(self, tree: DraftTree, prefix: int, policy: MoESpec | None) -> None:
        """The next step's tree behind `prefix` positions, and its policy. Fewer rows than the step has are padded."""
        num_rows = tree.num_rows
        assert num_rows <= self._num_rows
        for buffer, part in (
            (self._tokens_T, tree.tokens_T),
            (self._depths_T, tree.depths_T),
            (self._parents_T, tree.parents_T),
        ):
            buffer.zero_()[:num_rows].copy_(part)
        self._seen_TT.zero_()[:num_rows, :num_rows].copy_(tree.mask_TT)
        self._seen_TT.fill_diagonal_(True)  # a row that sees nothing has no softmax
        self._prefix_1.fill_(prefix)
        weights_T = None
        if policy is not None:
            config, context = policy.config, TreeContext(tree.depths_T, tree.draft_logp_T, 0)
            weights_T = row_weights(config.row_weight, config.depth_decay, context)
        self._row_weights_T.fill_(1.0)
        if weights_T is not None:
            self._row_weights_T[:num_rows].copy_(weights_T)
        num_experts, settings = self._target.num_experts, self._settings
        numbers, coverage = _numbers(policy, num_experts)
        settings.numbers_5[1:].copy_(torch.tensor(numbers, dtype=torch.int32))
        settings.coverage_1.fill_(coverage)
        settings.numbers_5[:1].fill_(num_rows)
        if tree.num_valid is not None:
            settings.numbers_5[:1].copy_(tree.num_valid)
            # A drafter that was not sure of anything leaves the root alone, and a single row is never budgeted.
            is_alone = tree.num_valid == 1
            settings.numbers_5[1].masked_fill_(is_alone, num_experts)
            settings.coverage_1.masked_fill_(is_alone, 0.0)

    def run(self) -> StaticOutputs:
        """The step on what the buffers hold."""
        target = self._target
        router = StaticRouter(target, self._settings, self._row_weights_T)
        write_T = self._prefix_1 + self._rows_T
        with target.stepping(router), self._cache.writing_at(write_T):
            positions_T = self._prefix_1 + self._depths_T
            logits_TV = target.forward_masked(self._tokens_T, positions_T, self._mask(write_T), self._cache)
        opinions = TreeOpinions.tensors(logits_TV, self._parents_T, self._tokens_T)
        is_valid_T = self._rows_T < self._settings.numbers_5[0]
        counts = count_tensors(router.routing(), is_valid_T)
        return StaticOutputs(logits_TV, target.features(), opinions, counts)

    def _mask(self, write_T: Tensor) -> Tensor:
        """Additive [1, 1, T, S]: a row sees the prefix and, of the rows written behind it, those it may see."""
        dtype = self._target.dtype
        least = torch.finfo(dtype).min
        prefix_TS = torch.where(self._positions_S < self._prefix_1, 0.0, least).to(dtype).repeat(self._num_rows, 1)
        own_TT = torch.where(self._seen_TT, 0.0, least).to(dtype)
        return prefix_TS.index_copy_(1, write_T, own_TT)[None, None]


class StaticSteps:
    """The steps of one target, each captured once per number of rows and storage of the cache."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self._storage: tuple[int, int] | None = None
        self._steps: dict[int, tuple[StaticStep, Callable[[], StaticOutputs]]] = {}

    def verify(self, tree: DraftTree, prefix: int, cache: TreeCache, policy: MoESpec | None) -> StaticOutputs:
        """Run the tree's rows behind `prefix` positions of the cache; the outputs last until the next step."""
        num_rows = next(size for size in BUCKETS if tree.num_rows <= size)
        cache.reserve(prefix + num_rows)
        storage = cache.layers[0].keys.data_ptr(), cache.capacity
        if storage != self._storage:
            # What was captured reads the old storage.
            self._storage, self._steps = storage, {}
        if num_rows not in self._steps:
            step = StaticStep(self._target, num_rows, cache)
            step.fill(tree, prefix, policy)
            self._steps[num_rows] = step, self._target.graphs.capture(step.run)
        step, run = self._steps[num_rows]
        step.fill(tree, prefix, policy)
        return run()


class StaticRouter:
    """A step's router on the select kernel: every layer's plan is made on the device from the settings there."""

    def __init__(self, target: Target, settings: Settings, row_weights_T: Tensor) -> None:
        self._target, self._settings, self._row_weights_T = target, settings, row_weights_T
        self._selections: list[Selection] = []

    def route(self, number: int, output: RouterOutput) -> ExpertPlan:
        from kernels.select import Rule, select

        moe = self._target.moe_layers[number]
        rule = {"softmax, top-k, renormalised": Rule.RENORMALISED, "softmax, top-k": Rule.SOFTMAX}.get(
            moe.family.name, Rule.SOFTMAX_OF_CHOSEN
        )
        top_k, dtype = output.ids_TK.shape[1], output.weights_TK.dtype
        selection = select(output.logits_TE, self._row_weights_T, self._settings, top_k, rule, dtype)
        self._selections.append(selection)
        backend = self._target.backend
        assert isinstance(backend, TritonBackend)
        backend.expect(moe.experts, selection.lists)
        return ExpertPlan(selection.ids_TK, selection.weights_TK, selection.kept_E)

    def compiled_budget(self) -> None:
        """Layers are asked one by one: this router runs where the CPU's kernels do not."""

    def record(self, routing: StepRouting) -> None:
        raise AssertionError("layers are asked one by one")

    def routing(self) -> StepRouting:
        """What all layers did."""
        found = self._selections
        return StepRouting(
            logits_LTE=None,
            natural_ids_LTK=torch.stack([one.natural_ids_TK for one in found]),
            natural_weights_LTK=torch.stack([one.natural_weights_TK for one in found]),
            ids_LTK=torch.stack([one.ids_TK for one in found]),
            weights_LTK=torch.stack([one.weights_TK for one in found]),
            kept_LE=torch.stack([one.kept_E for one in found]),
            score_LE=torch.stack([one.score_E for one in found]),
        )


def _numbers(policy: MoESpec | None, num_experts: int) -> tuple[list[int], float]:
    """(budget, truncates, natural score, protect root), coverage: as the kernel takes a policy."""
    if policy is None:
        return [num_experts, 0, 0, 0], 0.0
    config = policy.config
    budget = num_experts if config.budget is None else config.budget
    flags = config.policy == "truncation", config.score == "natural", config.protect_root
    return [budget, *map(int, flags)], float(config.coverage or 0.0)
