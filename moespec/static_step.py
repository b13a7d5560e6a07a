"""A verify step of fixed shape: everything that may change between two steps lies in buffers on the device.

Owns the buffers, what is computed of them (embedding to logits, features, opinions, routing and its counts), and the
rule for which targets can have it. Nothing in `StaticStep.run` asks the device for anything, so that a CUDA graph can
hold it (`graph.py`); without one the same operations run one by one. Letters as in `types.py`; S: the cache's capacity.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moespec.backends import TritonBackend, rule_of
from moespec.budget import MoESpec
from moespec.config import ROW_WEIGHTS
from moespec.counts import RoutingCounts, count_tensors
from moespec.dense import mask_behind
from moespec.graph import Prepared
from moespec.kv_cache import TreeCache
from moespec.packed_copy import packed, unpacked
from moespec.routing import RouterOutput
from moespec.sampling import TreeOpinions
from moespec.step_router import StepRouting
from moespec.tree import NUM_ALTERNATIVES
from moespec.types import DraftTree, ExpertPlan

if TYPE_CHECKING:
    from kernels.select import Selection, Settings
    from moespec.target import Target

BUCKETS = (1, 2, 4, 8, 16, 32, 48, 64)  # rows
NUM_TREE_PARTS = 8  # of what is said, `num_valid` the first


def unsupported_reason(target: Target) -> str | None:
    """Why a target has no step of fixed shape, in words; None if it has."""
    if not isinstance(target.backend, TritonBackend) or target.backend.name != "triton":
        return "its experts do not run on Triton kernels"
    unknown = {moe.family.name for moe in target.moe_layers if rule_of(moe.family) is None}
    if unknown:
        return f"the select kernel does not know the router family {', '.join(sorted(unknown))}"
    return None


@dataclass(frozen=True)
class StaticOutputs:
    """What a step leaves on the device; the next run of the same step overwrites it.

    said      what the host wants to know: `num_valid` and the buffers' tree, its `TreeOpinions.tensors`, the step's
              `counts.count_tensors`; rows behind `num_valid` mean nothing
    packed    the same as one tensor of bytes
    """

    logits_TV: Tensor
    features_TF: Tensor | None
    said: list[Tensor]
    packed: Tensor

    def on_host(self) -> tuple[DraftTree, list[Tensor], RoutingCounts]:
        """The tree without padding, the opinions of its rows, the counts: in one copy."""
        return read_said(unpacked(self.packed.cpu(), self.said))


def read_said(said: list[Tensor]) -> tuple[DraftTree, list[Tensor], RoutingCounts]:
    """What was said, on the host; see `StaticOutputs`."""
    num_valid = int(said[0])
    tokens_T, parents_T, depths_T, draft_logp_T, mask_TT, alt_ids_TA, alt_logp_TA = said[1:NUM_TREE_PARTS]
    whole = DraftTree(tokens_T, parents_T, depths_T, draft_logp_T, mask_TT, alt_ids_TA, alt_logp_TA)
    tree = whole.first_rows(num_valid)
    opinions, counts = said[NUM_TREE_PARTS : NUM_TREE_PARTS + 4], said[NUM_TREE_PARTS + 4 :]
    return tree, [part[:num_valid] for part in opinions], RoutingCounts.of(counts).first_rows(num_valid)


class StaticStep:
    """Steps of one target with a fixed number of rows on a cache whose storage does not move."""

    def __init__(self, target: Target, num_rows: int, cache: TreeCache) -> None:
        self._target, self._cache, self._num_rows = target, cache, num_rows
        device = target.device
        self._rows_T = torch.arange(num_rows, device=device)
        self._positions_S = torch.arange(cache.capacity, device=device)
        self._own_TT = torch.eye(num_rows, dtype=torch.bool, device=device)
        self._tree = DraftTree(
            tokens_T=torch.zeros_like(self._rows_T),
            parents_T=torch.zeros_like(self._rows_T),
            depths_T=torch.zeros_like(self._rows_T),
            draft_logp_T=torch.zeros(num_rows, dtype=torch.float32, device=device),
            mask_TT=torch.zeros_like(self._own_TT),
            alt_ids_TA=torch.full((num_rows, NUM_ALTERNATIVES), -1, device=device),
            alt_logp_TA=torch.zeros(num_rows, NUM_ALTERNATIVES, dtype=torch.float32, device=device),
            num_valid=torch.zeros((), dtype=torch.int64, device=device),
        )
        # Whole numbers are exact in fp64. Pinned, so that the copy waits for nothing.
        self._numbers = torch.zeros(len(_numbers(0, None, 0)), dtype=torch.float64, device=device)

    def fill(self, tree: DraftTree, prefix: int, policy: MoESpec | None) -> None:
        """The next step's tree behind `prefix` positions, and its policy. Fewer rows than the step has are padded."""
        num_rows, buffers, is_cuda = tree.num_rows, self._tree, self._target.device.type == "cuda"
        assert num_rows <= self._num_rows
        numbers = torch.tensor(_numbers(prefix, policy, self._target.num_experts), dtype=torch.float64)
        self._numbers.copy_(numbers.pin_memory() if is_cuda else numbers, non_blocking=True)
        for name in ("tokens_T", "parents_T", "depths_T", "draft_logp_T"):
            getattr(buffers, name)[:num_rows].copy_(getattr(tree, name))
        buffers.mask_TT[:num_rows, :num_rows].copy_(tree.mask_TT)
        assert buffers.alt_ids_TA is not None and buffers.alt_logp_TA is not None and buffers.num_valid is not None
        if tree.alt_ids_TA is None or tree.alt_logp_TA is None:
            buffers.alt_ids_TA.fill_(-1)
        else:
            num_given = tree.alt_ids_TA.shape[1]
            buffers.alt_ids_TA[:, num_given:].fill_(-1)
            buffers.alt_ids_TA[:num_rows, :num_given].copy_(tree.alt_ids_TA)
            buffers.alt_logp_TA[:num_rows, :num_given].copy_(tree.alt_logp_TA)
        if tree.num_valid is None:
            buffers.num_valid.fill_(num_rows)
        else:
            buffers.num_valid.copy_(tree.num_valid)

    def run(self) -> StaticOutputs:
        """The step on what the buffers hold."""
        target, tree = self._target, self._tree
        assert tree.num_valid is not None and tree.alt_ids_TA is not None and tree.alt_logp_TA is not None
        prefix_1 = self._numbers[:1].long()
        is_valid_T = self._rows_T < tree.num_valid
        router = StaticRouter(target, self._settings(), self._row_weights())
        write_T = prefix_1 + self._rows_T
        # What stands in padded rows is anything; none of them is seen, and each sees itself, or it had no softmax.
        seen_TT = (tree.mask_TT & is_valid_T) | self._own_TT
        mask_TS = mask_behind(prefix_1, seen_TT, write_T, self._positions_S, target.dtype)
        with target.stepping(router), self._cache.writing_at(write_T):
            positions_T = prefix_1 + tree.depths_T
            key_positions_S = self._positions_S.index_copy(0, write_T, positions_T)
            logits_TV = target.forward_masked(
                tree.tokens_T, positions_T, mask_TS[None, None], key_positions_S, self._cache
            )
        said = [
            *(tree.num_valid, tree.tokens_T, tree.parents_T, tree.depths_T, tree.draft_logp_T, tree.mask_TT),
            *(tree.alt_ids_TA, tree.alt_logp_TA),
            *TreeOpinions.tensors(logits_TV, tree.parents_T, tree.tokens_T),
            *count_tensors(router.routing(), is_valid_T),
        ]
        return StaticOutputs(logits_TV, target.features(), said, packed(said))

    def _settings(self) -> Settings:
        """The policy as the select kernel takes it."""
        from kernels.select import Settings

        tree, numbers = self._tree, self._numbers
        assert tree.num_valid is not None
        # A drafter that was not sure of anything leaves the root alone, and a single row is never budgeted.
        is_alone = tree.num_valid == 1
        budget_1 = torch.where(is_alone, self._target.num_experts, numbers[_BUDGET : _BUDGET + 1])
        coverage_1 = torch.where(is_alone, 0.0, numbers[_COVERAGE : _COVERAGE + 1]).float()
        numbers_5 = torch.cat([tree.num_valid[None].double(), budget_1, numbers[_FLAGS : _FLAGS + 3]])
        return Settings(numbers_5.int(), coverage_1, torch.zeros_like(numbers_5[:1], dtype=torch.int32))

    def _row_weights(self) -> Tensor:
        """`budget.row_weights` of the policy, fp32 [T]; ones where it weights all rows alike."""
        kind, decay = self._numbers[_ROW_WEIGHT], self._numbers[_DECAY].float()
        by_depth_T, by_path_T = decay**self._tree.depths_T, self._tree.draft_logp_T.exp()
        return torch.where(kind == 0, 1.0, torch.where(kind == 1, by_depth_T, by_path_T))


class StaticSteps:
    """The steps of one target, each captured once per number of rows and storage of the cache."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self._storage: tuple[int, int] | None = None
        self._steps: Prepared[StaticOutputs] = Prepared(target.graphs)

    def verify(self, tree: DraftTree, prefix: int, cache: TreeCache, policy: MoESpec | None) -> StaticOutputs:
        """Run the tree's rows behind `prefix` positions of the cache; the outputs last until the next step."""
        num_rows = next(size for size in BUCKETS if tree.num_rows <= size)
        cache.reserve(prefix + num_rows)
        storage = cache.layers[0].keys.data_ptr(), cache.capacity
        if storage != self._storage:
            # What was captured reads the old storage.
            self._storage, self._steps = storage, Prepared(self._target.graphs)
        return self._steps.run(num_rows, lambda: StaticStep(self._target, num_rows, cache), (tree, prefix, policy))


class StaticRouter:
    """A step's router on the select kernel: every layer's plan is made on the device from the settings there."""

    plans_from_logits = True

    def __init__(self, target: Target, settings: Settings, row_weights_T: Tensor) -> None:
        self._target, self._settings, self._row_weights_T = target, settings, row_weights_T
        self._selections: list[Selection] = []

    def route(self, number: int, output: RouterOutput) -> ExpertPlan:
        from kernels.select import select

        moe = self._target.moe_layers[number]
        rule = rule_of(moe.family)
        assert rule is not None, "a target with another family has no step of fixed shape"
        top_k, dtype = output.ids_TK.shape[1], output.weights_TK.dtype
        selection = select(output.logits_TE, self._row_weights_T, self._settings, top_k, rule, dtype)
        self._selections.append(selection)
        backend = self._target.backend
        assert isinstance(backend, TritonBackend)
        backend.expect(moe.experts, selection.lists)
        return ExpertPlan(selection.ids_TK, selection.weights_TK, selection.kept_E)

    def compiled_budget(self) -> None:
        """Layers are asked one by one: this router runs where the CPU's kernels do not."""

    def record(self, routings: list[StepRouting]) -> None:
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


# Places in what `_numbers` returns.
_BUDGET, _FLAGS, _COVERAGE, _ROW_WEIGHT, _DECAY = 1, 2, 5, 6, 7


def _numbers(prefix: int, policy: MoESpec | None, num_experts: int) -> list[float]:
    """prefix, budget, three flags (truncates, natural score, protect root), coverage, kind of row weight, decay."""
    if policy is None:
        return [prefix, num_experts, 0, 0, 0, 0.0, 0, 1.0]
    config = policy.config
    budget = num_experts if config.budget is None else config.budget
    flags = config.policy == "truncation", config.score == "natural", config.protect_root
    row_weight = ROW_WEIGHTS.index(config.row_weight)
    return [prefix, budget, *map(int, flags), float(config.coverage or 0.0), row_weight, config.depth_decay]
