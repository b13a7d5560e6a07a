"""One verify step: a tree in, what the target says of it out, on the host. Owns the two ways to run it.

Either layer by layer under any policy, or as a step of fixed shape (`static_step.py`) under MoE-Spec or none, replayed
as a CUDA graph where there is one. Knows nothing of what is then kept or emitted.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from torch import Tensor

from moespec.backends import TritonBackend
from moespec.budget import MoESpec
from moespec.config import GenerationConfig
from moespec.counts import RoutingCounts, shares_read
from moespec.kv_cache import TreeCache
from moespec.packed_copy import to_host
from moespec.policies.base import ExpertPolicy, ForesightPolicy
from moespec.recorder import StepRecorder
from moespec.sampling import TreeOpinions, choose_tokens
from moespec.static_step import NUM_TREE_PARTS, StaticSteps, read_said, unsupported_reason
from moespec.target import Target
from moespec.types import DraftTree, Verdict
from moespec.verify import verify_tree


class Draft(NamedTuple):
    """What a request wants to have verified: its tree, behind what its cache holds."""

    tree: DraftTree
    cache: TreeCache
    generation: GenerationConfig


@dataclass(frozen=True)
class Verified:
    """What came of a step for one request. Opinions, verdict and counts are on the host; features [T, F] where the
    target is.

    is_budgeted  whether a policy planned for its rows
    share_read   in a batch: its own share of the experts read, summed over layers (`counts.shares_read`)
    """

    opinions: TreeOpinions
    verdict: Verdict
    counts: RoutingCounts
    features_TF: Tensor | None
    is_budgeted: bool
    share_read: float | None = None


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
        return self._target.graphs.reason or unsupported_reason(self._target)

    def verify(self, draft: Draft, policy: ExpertPolicy | None) -> Verified:
        """Run the tree. No policy, or a single row: the routers' own choice."""
        if isinstance(policy, ForesightPolicy):
            policy = self._informed([draft], policy)
        is_known = policy is None or type(policy) is MoESpec
        if self._steps is not None and is_known and unsupported_reason(self._target) is None:
            assert policy is None or isinstance(policy, MoESpec)
            try:
                return self._verify_static(self._steps, draft, policy)
            except Exception as error:  # Triton's compiler and driver raise whatever they like
                # Nothing is lost: rows behind the prefix are written again.
                assert isinstance(self._target.backend, TritonBackend)
                self._target.backend.give_up(error)
                self._steps = None
        return self._verify_layer_by_layer([draft], policy)[0]

    def verify_together(
        self, drafts: Sequence[Draft], policy: ExpertPolicy | None, is_shared: bool = False
    ) -> list[Verified]:
        """Run the trees of several requests in one forward. The policy sees the rows of each, or, where `is_shared`,
        of all together.
        """
        if len(drafts) == 1 or (isinstance(policy, ForesightPolicy) and not is_shared):
            return [self.verify(draft, policy) for draft in drafts]
        if isinstance(policy, ForesightPolicy):
            policy = self._informed(drafts, policy)
        verified = self._verify_layer_by_layer(drafts, policy, is_shared)
        shares = shares_read([one.counts for one in verified])
        return [replace(one, share_read=share) for one, share in zip(verified, shares, strict=True)]

    def _informed(self, drafts: Sequence[Draft], policy: ForesightPolicy) -> ExpertPolicy:
        """What was shown the verdicts under no policy; the rows are then written again."""
        prefixes = [draft.cache.length for draft in drafts]
        natural = self.verify_together(drafts, None)
        for draft, prefix in zip(drafts, prefixes, strict=True):
            draft.cache.truncate(prefix)
        firsts = itertools.accumulate([one.opinions.tree.num_rows for one in natural[:-1]], initial=0)
        return policy.informed([f + row for f, one in zip(firsts, natural, strict=True) for row in one.verdict.path])

    def _verify_layer_by_layer(
        self, drafts: Sequence[Draft], policy: ExpertPolicy | None, is_shared: bool = False
    ) -> list[Verified]:
        target = self._target
        drafts = [draft._replace(tree=draft.tree.without_padding()) for draft in drafts]
        trees, prefixes = [draft.tree for draft in drafts], [draft.cache.length for draft in drafts]
        sizes = [tree.num_rows for tree in trees]
        recorder = StepRecorder(target.moe_layers, trees, policy, is_shared, prefixes)
        with target.stepping(recorder):
            logits_TV = self._forward(drafts)
        features_TF = target.features()
        features = [None] * len(drafts) if features_TF is None else features_TF.split(sizes)
        parts = zip(drafts, prefixes, logits_TV.split(sizes), features, recorder.counts(), recorder.acted, strict=True)
        return [_said(*part) for part in parts]

    def _forward(self, drafts: Sequence[Draft]) -> Tensor:
        if len(drafts) > 1:
            return self._target.forward_trees([draft.tree for draft in drafts], [draft.cache for draft in drafts])
        tree, cache, _ = drafts[0]
        # A root alone sees everything before it: no mask, which lets attention take its shortest way.
        seen_TT = tree.mask_TT if tree.num_rows > 1 else None
        return self._target.forward(tree.tokens_T, tree.depths_T + cache.length, seen_TT, cache, keep=tree.num_rows)

    def _verify_static(self, steps: StaticSteps, draft: Draft, policy: MoESpec | None) -> Verified:
        tree, cache, generation = draft
        prefix = cache.length
        outputs = steps.verify(tree, prefix, cache, policy)
        if generation.temperature == 0:
            tree, opinions, counts = outputs.on_host()
            target_T = opinions[0]
        else:
            # Rows of the buffers, of which the tree may have fewer.
            logits_TV, best_T = outputs.logits_TV[: tree.num_rows], outputs.said[NUM_TREE_PARTS][: tree.num_rows]
            drawn_T = choose_tokens(logits_TV, best_T, tree, prefix + 1, generation)
            target_T, *said = to_host([drawn_T, *outputs.said])
            tree, opinions, counts = read_said(said)
        num_valid = tree.num_rows
        is_budgeted = policy is not None and num_valid > 1
        if not is_budgeted:
            counts = counts.natural()
        features_TF = None if outputs.features_TF is None else outputs.features_TF[:num_valid]
        verdict = verify_tree(tree, target_T[:num_valid])
        return Verified(TreeOpinions(tree, *opinions), verdict, counts, features_TF, is_budgeted)


def _said(
    draft: Draft, prefix: int, logits_TV: Tensor, features_TF: Tensor | None, counts: RoutingCounts, is_budgeted: bool
) -> Verified:
    """What the target says of a tree behind so many positions."""
    opinions = TreeOpinions.of(draft.tree, logits_TV)
    target_T = choose_tokens(logits_TV, opinions.best_T, draft.tree, prefix + 1, draft.generation)
    opinions, target_T = _on_host(opinions, target_T)
    return Verified(opinions, verify_tree(opinions.tree, target_T), counts, features_TF, is_budgeted)


def _on_host(opinions: TreeOpinions, target_T: Tensor) -> tuple[TreeOpinions, Tensor]:
    """Opinions, their tree, and the target's tokens, in one copy."""
    tree = opinions.tree
    if opinions.best_T.device.type == "cpu":
        return opinions, target_T
    parts = {name: value for name, value in vars(tree).items() if isinstance(value, Tensor)}
    said = opinions.best_T, opinions.top_ids_TA, opinions.top_logp_TA, opinions.node_logp_T
    host = to_host([target_T, *said, *parts.values()])
    on_host: dict[str, Any] = dict(zip(parts, host[1 + len(said) :], strict=True))
    return TreeOpinions(replace(tree, **on_host), *host[1 : 1 + len(said)]), host[0]
