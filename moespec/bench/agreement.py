"""How far a budget strays from the lossless text: the tree drafted at each position, verified under the budget.

Owns the measures: `root_logits` and what agrees there, on keys and values that no budget has touched, and `Replay`,
a run held to the lossless text while its keys and values keep what the budget did. Knows nothing of timing or records.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from moespec.bench.arms import Arm
from moespec.config import GenerationConfig, TreeConfig
from moespec.control import Control
from moespec.drafters.base import DraftContext
from moespec.engine import Engine
from moespec.governors import Governor
from moespec.kv_cache import TreeCache
from moespec.policies.base import ExpertPolicy, ForesightPolicy
from moespec.recorder import StepRecorder, policy_for
from moespec.run import Aim, Conversation, Run
from moespec.step_router import NaturalRouter
from moespec.trace import RunSummary
from moespec.types import DraftTree, Verdict
from moespec.verifier import Verified
from moespec.verify import verify_tree


@dataclass
class Agreement:
    """At each position of a lossless text: whether the budgeted root row's argmax is the next token, and the divergence
    KL(natural || budgeted) of its distribution, in nats."""

    top1: list[bool] = field(default_factory=list)
    kl: list[float] = field(default_factory=list)


def agreement_by_position(
    engine: Engine, arms: list[Arm], prompt_ids: list[int], text_ids: list[int]
) -> list[Agreement]:
    """Per arm, along the text."""
    token_ids = prompt_ids + text_ids
    found = [Agreement() for _ in arms]
    for position in root_logits(engine, arms, token_ids, first_root=len(prompt_ids)):
        for entry, logits_V in zip(found, position.by_arm, strict=True):
            entry.top1.append(int(logits_V.argmax()) == token_ids[position.root + 1])
            entry.kl.append(divergence(position.natural_V, logits_V))
    return found


def divergence(natural_V: Tensor, logits_V: Tensor) -> float:
    """KL(natural || other) in nats, of two rows of logits."""
    natural_logp_V, logp_V = (logits.double().log_softmax(dim=-1) for logits in (natural_V, logits_V))
    return float(torch.nn.functional.kl_div(logp_V, natural_logp_V, reduction="sum", log_target=True))


@dataclass(frozen=True)
class Position:
    """What follows `token_ids[: root + 1]`: the model's own logits [V], and each arm's at the root of its tree."""

    root: int
    natural_V: Tensor
    by_arm: list[Tensor]


@torch.inference_mode()
def root_logits(engine: Engine, arms: list[Arm], token_ids: list[int], first_root: int) -> Iterator[Position]:
    """Every position from the last but one token's back to `first_root` (1 or more).

    The text is read once without a budget. Then the positions are visited from the last to the first: what a tree
    writes behind its root is never needed again.
    """
    target, drafter = engine.target, engine.drafter
    assert drafter is not None and first_root >= 1
    last_root = len(token_ids) - 2
    cache = TreeCache(len(target.layers))
    positions_N = torch.arange(len(token_ids), device=target.device)
    with target.stepping(NaturalRouter(len(token_ids))):
        ids_N = torch.tensor(token_ids, device=target.device)
        natural_NV = target.forward(ids_N, positions_N, None, cache, keep=len(token_ids) - first_root)
    features_NF = target.features()
    engine.forget()
    drafter.observe(None if features_NF is None else features_NF[:last_root])
    for root in range(last_root, first_root - 1, -1):
        by_tree: dict[TreeConfig, DraftTree] = {}
        by_arm = []
        for arm in arms:
            assert arm.tree is not None
            if arm.tree not in by_tree:
                # The drafter's row before the root is run again: its state is what the tree grows from.
                drafter.truncate(root - 1)
                drafter.observe(None if features_NF is None else features_NF[root - 1 : root])
                by_tree[arm.tree] = drafter.propose(DraftContext(token_ids[: root + 1], arm.tree))
            cache.truncate(root)
            by_arm.append(_verify(engine, arm, by_tree[arm.tree], root, cache)[0])
        yield Position(root, natural_NV[root - first_root], by_arm)
    engine.forget()


def _verify(engine: Engine, arm: Arm, tree: DraftTree, prefix: int, cache: TreeCache) -> Tensor:
    assert arm.budget is not None
    policy = policy_for(arm.budget, engine.target.num_experts) if tree.num_rows > 1 else None
    if isinstance(policy, ForesightPolicy):
        natural_TV = _tree_logits(engine, None, tree, prefix, cache)
        cache.truncate(prefix)
        policy = policy.informed(verify_tree(tree, natural_TV.argmax(dim=-1)).path)
    return _tree_logits(engine, policy, tree, prefix, cache)


def _tree_logits(engine: Engine, policy: ExpertPolicy | None, tree: DraftTree, prefix: int, cache: TreeCache) -> Tensor:
    target = engine.target
    with target.stepping(StepRecorder(target.moe_layers, [tree], policy, positions=[prefix])):
        return target.forward(tree.tokens_T, tree.depths_T + prefix, tree.mask_TT, cache, keep=tree.num_rows)


@dataclass
class Replay(Run):
    """A run whose every step commits the lossless text instead of what the budget would have written."""

    text_ids: list[int] = field(default_factory=list)
    root_agrees: list[bool] = field(default_factory=list)

    def _verify(self, aim: Aim, tree: DraftTree) -> Verified:
        verified = super()._verify(aim, tree)
        verdict, wanted = verified.verdict, self.text_ids[len(self.totals.token_ids) :]
        pairs = zip(verdict.token_ids, wanted, strict=False)
        num_same = next((n for n, (ours, theirs) in enumerate(pairs) if ours != theirs), len(verdict.token_ids))
        self.root_agrees.append(num_same > 0)
        # Rows behind the first wrong token are not kept; the text's own token takes its place.
        emitted = [*verdict.token_ids[:num_same], *wanted[num_same : num_same + 1]][: len(verdict.path)]
        return replace(verified, verdict=Verdict(path=verdict.path[: len(emitted)], token_ids=emitted))


def replay(
    engine: Engine, arm: Arm, prompt_ids: list[int], text_ids: list[int], governor: Governor | None = None
) -> tuple[list[bool], RunSummary]:
    """Run the arm along the lossless text. (per step, whether the root's argmax was the text's; the summary)"""
    assert arm.budget is not None
    engine.forget()
    run = Replay(
        target=engine.target,
        verifier=engine.verifier,
        drafter=engine.drafter,
        conversation=Conversation(TreeCache(len(engine.target.layers))),
        pieces=engine.pieces,
        prompt_ids=prompt_ids,
        generation=GenerationConfig(max_new_tokens=len(text_ids), ignore_eos=True),
        budget=arm.budget,
        tree=arm.tree or TreeConfig(),
        control=Control(),
        governor=governor,
        card=engine.card,
        text_ids=text_ids,
    )
    *_, last = run.steps()
    engine.forget()
    assert last.summary is not None
    return run.root_agrees, last.summary
