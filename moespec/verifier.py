"""One verify step: a tree in, what the target says of it out, on the host. Owns the two ways to run it.

Either layer by layer under any policy, or as a step of fixed shape (`static_step.py`) under MoE-Spec or none, replayed
as a CUDA graph where there is one. Knows nothing of what is then kept or emitted.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from moespec.backends import TritonBackend
from moespec.budget import MoESpec
from moespec.config import GenerationConfig
from moespec.counts import RoutingCounts
from moespec.kv_cache import TreeCache
from moespec.packed_copy import to_host
from moespec.policies.base import ExpertPolicy
from moespec.recorder import StepRecorder
from moespec.sampling import TreeOpinions, choose_tokens
from moespec.static_step import StaticSteps, unsupported_reason
from moespec.target import Target
from moespec.types import DraftTree, Verdict
from moespec.verify import verify_tree


@dataclass(frozen=True)
class Verified:
    """What came of a step. Opinions, verdict and counts are on the host; features [T, F] where the target is."""

    opinions: TreeOpinions
    verdict: Verdict
    counts: RoutingCounts
    features_TF: Tensor | None


class Verifier:
    """Verifies trees with one target."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self._steps = StaticSteps(target) if unsupported_reason(target) is None else None

    def forget_captures(self) -> None:
        """Capture anew: something that was captured has changed beside its buffers."""
        if self._steps is not None:
            self._steps = StaticSteps(self._target)

    @property
    def graph_reason(self) -> str | None:
        """Why steps are not replayed as CUDA graphs, in words; None if they are."""
        return unsupported_reason(self._target) or self._target.graphs.reason

    def verify(
        self, tree: DraftTree, cache: TreeCache, policy: ExpertPolicy | None, generation: GenerationConfig
    ) -> Verified:
        """Run the tree behind what the cache holds. No policy, or a single row: the routers' own choice."""
        is_known = policy is None or type(policy) is MoESpec
        if self._steps is not None and is_known and unsupported_reason(self._target) is None:
            assert policy is None or isinstance(policy, MoESpec)
            try:
                return self._verify_static(self._steps, tree, cache, policy, generation)
            except Exception as error:  # Triton's compiler and driver raise whatever they like
                # Nothing is lost: rows behind the prefix are written again.
                assert isinstance(self._target.backend, TritonBackend)
                self._target.backend.give_up(error)
        return self._verify_layer_by_layer(_without_padding(tree), cache, policy, generation)

    def _verify_layer_by_layer(
        self, tree: DraftTree, cache: TreeCache, policy: ExpertPolicy | None, generation: GenerationConfig
    ) -> Verified:
        target, prefix = self._target, cache.length
        recorder = StepRecorder(target.moe_layers, tree, policy if tree.num_rows > 1 else None)
        # A root alone sees everything before it: no mask, which lets attention take its shortest way.
        seen_TT = tree.mask_TT if tree.num_rows > 1 else None
        with target.stepping(recorder):
            logits_TV = target.forward(tree.tokens_T, tree.depths_T + prefix, seen_TT, cache, keep=tree.num_rows)
        opinions = TreeOpinions.of(tree, logits_TV)
        target_T = choose_tokens(logits_TV, opinions.best_T, tree, prefix + 1, generation)
        opinions, (target_T,) = _on_host(opinions, target_T)
        return Verified(opinions, verify_tree(opinions.tree, target_T), recorder.counts(), target.features())

    def _verify_static(
        self,
        steps: StaticSteps,
        tree: DraftTree,
        cache: TreeCache,
        policy: MoESpec | None,
        generation: GenerationConfig,
    ) -> Verified:
        prefix, num_rows = cache.length, tree.num_rows
        outputs = steps.verify(tree, prefix, cache, policy)
        # Buffers may have more rows than the tree.
        best_T, *others = (part[:num_rows] for part in outputs.opinions)
        target_T = choose_tokens(outputs.logits_TV[:num_rows], best_T, tree, prefix + 1, generation)
        opinions, (target_T, *tensors) = _on_host(TreeOpinions(tree, best_T, *others), target_T, *outputs.counts)
        num_valid = opinions.tree.num_rows
        counts = RoutingCounts.of(tensors).first_rows(num_valid)
        features_TF = None if outputs.features_TF is None else outputs.features_TF[:num_valid]
        if policy is None or num_valid == 1:
            counts = counts.natural()
        return Verified(opinions, verify_tree(opinions.tree, target_T[:num_valid]), counts, features_TF)


def _on_host(opinions: TreeOpinions, *others: Tensor) -> tuple[TreeOpinions, list[Tensor]]:
    """Opinions, their tree without its padding, and the others, in one copy."""
    tree = opinions.tree
    if tree.num_valid is None and all(part.device.type == "cpu" for part in (tree.tokens_T, opinions.best_T, *others)):
        return opinions, list(others)
    fields = {name: value for name, value in vars(tree).items() if isinstance(value, Tensor)}
    said = opinions.best_T, opinions.top_ids_TA, opinions.top_logp_TA, opinions.node_logp_T
    host = to_host([*fields.values(), *said, *others])
    on_host: dict[str, Any] = dict(zip(fields, host, strict=False))
    tree = _without_padding(replace(tree, **on_host))
    said_T, others_T = host[len(fields) : len(fields) + len(said)], host[len(fields) + len(said) :]
    return TreeOpinions(tree, *(part[: tree.num_rows] for part in said_T)), others_T


def _without_padding(tree: DraftTree) -> DraftTree:
    return tree if tree.num_valid is None else tree.first_rows(int(tree.num_valid))
