"""How specialised a target's experts are: who uses which, how a tree's union grows, how much the best of them hold.

Owns the figures' definitions and the draft trees that they are taken over. Every forward here runs the routers' own
choice. Knows nothing of files or reports. Letters: L MoE layers, E experts, D domains, N positions, F feature width.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moespec.bench.measure import Progress
from moespec.budget import cover
from moespec.config import TreeConfig
from moespec.drafters.base import DraftContext
from moespec.drafters.ngram import NgramDrafter
from moespec.engine import Engine
from moespec.kv_cache import TreeCache
from moespec.quality.trials import Text, check_lengths
from moespec.recorder import StepRecorder
from moespec.tree import chain
from moespec.types import DraftTree

DEFAULT_TREE = TreeConfig()  # what a budget meets when nobody asks for another tree
SIZED_TREES = tuple(TreeConfig(total_tokens=size, depth=6, top_k=6, min_path_p=0) for size in (1, 2, 4, 8, 16, 32, 64))
TREES = (DEFAULT_TREE, *SIZED_TREES)
MASS_SHARE = 0.9  # the share whose experts are counted, as notes on the paper count them
TOP_SHARES = (1 / 8, 3 / 16, 1 / 4, 3 / 8, 1 / 2, 3 / 4)  # of all experts: 8, 12, 16, 24, 32, 48 of 64


@dataclass(frozen=True)
class ExpertUse:
    """What the routers made of a text or of a draft tree, summed over its rows; float64 on the host."""

    num_rows: int
    usage_LE: Tensor  # natural top-k weight
    mass_LE: Tensor  # full-softmax probability
    natural_LE: Tensor  # bool: some row's top-k


@dataclass(frozen=True)
class TextUse:
    """One text's expert use, and that of the trees drafted in it: one per position for each of `TREES`."""

    domain: str
    read: ExpertUse
    trees: dict[TreeConfig, list[ExpertUse]]


@dataclass(frozen=True)
class DomainFigures:
    """One domain, per layer. The trees are default ones with two rows or more; None where there is none."""

    domain: str
    num_texts: int
    num_tokens: int
    num_trees: int
    entropy_L: list[float]
    experts_for_mass_L: list[float] | None
    num_dead_L: list[int]


@dataclass(frozen=True)
class UnionFigures:
    """Means over the trees asked for with `rows_asked` rows. `independent` is at the rows that were really drafted."""

    rows_asked: int
    rows_drafted: float
    union_L: list[float]
    independent: float


@dataclass(frozen=True)
class TopFigures:
    """The share that the `num_experts` strongest experts of each layer hold in a default tree: means over trees."""

    num_experts: int
    natural_weight_L: list[float]
    router_mass_L: list[float]


@dataclass(frozen=True)
class Specialisation:
    """All figures; domains in the order of the texts. `num_root_only` default trees are in no figure: one row each."""

    layers: list[int]
    domains: list[DomainFigures]
    everything: DomainFigures
    overlap_LDD: list[list[list[float]]]
    unions: list[UnionFigures]
    tops: list[TopFigures]
    num_root_only: int


def measure(engine: Engine, texts: Sequence[Text], num_positions: int, progress: Progress) -> Specialisation:
    """Read every text and draft trees at up to `num_positions` of its positions. ValueError for what cannot be used."""
    _check(engine, texts, num_positions)
    uses = []
    for number, text in enumerate(texts, start=1):
        uses.append(use_in_text(engine, text, num_positions))
        progress(f"experts: text {number} of {len(texts)}")
    domains = dict.fromkeys(use.domain for use in uses)
    by_domain = {domain: [use for use in uses if use.domain == domain] for domain in domains}
    usage_DLE = torch.stack([_usage(found) for found in by_domain.values()])
    trees, target = _budgeted_trees(uses), engine.target
    sizes = dict.fromkeys(int(share * target.num_experts) for share in TOP_SHARES)
    return Specialisation(
        layers=[moe.layer for moe in target.moe_layers],
        domains=[domain_figures(domain, found) for domain, found in by_domain.items()],
        everything=domain_figures("all", uses),
        overlap_LDD=overlap(usage_DLE[:, None], usage_DLE[None]).permute(2, 0, 1).tolist(),
        unions=[_union_figures(config, uses, target.num_experts, target.top_k) for config in SIZED_TREES],
        tops=[_top_figures(size, trees) for size in sizes if trees and size >= target.top_k],
        num_root_only=sum(len(use.trees[DEFAULT_TREE]) for use in uses) - len(trees),
    )


@torch.inference_mode()
def use_in_text(engine: Engine, text: Text, num_positions: int) -> TextUse:
    """Read the text, then draft in it from back to front: what a tree writes behind its root is never needed again."""
    drafter, token_ids = engine.drafter, text.token_ids
    assert drafter is not None
    cache = TreeCache(len(engine.target.layers))
    whole = chain(token_ids[0], token_ids[1:], [0.0] * (len(token_ids) - 1), engine.target.device)
    read = _expert_use(engine, whole, 0, cache)
    features_NF = engine.target.features()
    roots = tree_positions(len(token_ids), num_positions)
    engine.forget()
    drafter.observe(None if features_NF is None else features_NF[: roots[-1]])
    trees: dict[TreeConfig, list[ExpertUse]] = {config: [] for config in TREES}
    for root in reversed(roots):
        for config, found in trees.items():
            # The drafter's row before the root is run again: its state is what the tree grows from.
            drafter.truncate(root - 1)
            drafter.observe(None if features_NF is None else features_NF[root - 1 : root])
            tree = drafter.propose(DraftContext(token_ids[: root + 1], config))
            cache.truncate(root)
            found.append(_expert_use(engine, tree, root, cache))
    engine.forget()
    return TextUse(text.group, read, trees)


def tree_positions(num_tokens: int, num_positions: int) -> list[int]:
    """Roots spread evenly over a text, increasing: each has a token before it, for the drafter, and one behind it."""
    num_roots = num_tokens - 2
    return sorted({1 + (2 * n + 1) * num_roots // (2 * num_positions) for n in range(num_positions)})


def usage_entropy(usage_LE: Tensor) -> Tensor:
    """-sum_e p_e log p_e / log E of each layer's shares p: 1 where all experts are used alike, 0 where one is."""
    return torch.special.entr(_shares(usage_LE)).sum(dim=-1) / math.log(usage_LE.shape[-1])


def experts_for_share(mass_LE: Tensor, share: float) -> Tensor:
    """The fewest experts of each layer that hold `share` of its mass."""
    return torch.stack([cover(mass_E, share, 1).sum() for mass_E in mass_LE])


def overlap(usage_LE: Tensor, other_LE: Tensor) -> Tensor:
    """sum_e min(p_e, q_e) of two usages' shares: 1 where they are the same, 0 where no expert serves both."""
    return torch.minimum(_shares(usage_LE), _shares(other_LE)).sum(dim=-1)


def share_of_top(weight_LE: Tensor, num_experts: int) -> Tensor:
    """The share of each layer's weight that lies on its `num_experts` heaviest experts."""
    return _shares(weight_LE).sort(dim=-1, descending=True).values[..., :num_experts].sum(dim=-1)


def independent_union(num_experts: int, top_k: int, num_rows: int) -> float:
    """E * (1 - (1 - k/E)^T): experts that T rows use if each chooses k of E evenly and independently."""
    return num_experts * (1 - (1 - top_k / num_experts) ** num_rows)


def domain_figures(domain: str, uses: Sequence[TextUse]) -> DomainFigures:
    """The figures of the texts of one domain."""
    trees = _budgeted_trees(uses)
    chosen_LE = torch.stack([use.read.natural_LE for use in uses]).any(dim=0)
    return DomainFigures(
        domain=domain,
        num_texts=len(uses),
        num_tokens=sum(use.read.num_rows for use in uses),
        num_trees=len(trees),
        entropy_L=usage_entropy(_usage(uses)).tolist(),
        experts_for_mass_L=_means([experts_for_share(tree.mass_LE, MASS_SHARE) for tree in trees]) if trees else None,
        num_dead_L=(~chosen_LE).sum(dim=1).tolist(),
    )


def _union_figures(config: TreeConfig, uses: Sequence[TextUse], num_experts: int, top_k: int) -> UnionFigures:
    trees = [tree for use in uses for tree in use.trees[config]]
    return UnionFigures(
        rows_asked=config.total_tokens,
        rows_drafted=statistics.mean(tree.num_rows for tree in trees),
        union_L=_means([tree.natural_LE.sum(dim=1) for tree in trees]),
        independent=statistics.mean(independent_union(num_experts, top_k, tree.num_rows) for tree in trees),
    )


def _top_figures(num_experts: int, trees: Sequence[ExpertUse]) -> TopFigures:
    return TopFigures(
        num_experts=num_experts,
        natural_weight_L=_means([share_of_top(tree.usage_LE, num_experts) for tree in trees]),
        router_mass_L=_means([share_of_top(tree.mass_LE, num_experts) for tree in trees]),
    )


def _expert_use(engine: Engine, tree: DraftTree, prefix: int, cache: TreeCache) -> ExpertUse:
    """Run the tree behind the first `prefix` positions, unbudgeted. A whole text is a tree without branches."""
    target = engine.target
    recorder = StepRecorder(target.moe_layers, [tree], policy=None)
    with target.stepping(recorder):
        target.forward(tree.tokens_T, tree.depths_T + prefix, tree.mask_TT, cache, keep=1)
    counts = recorder.counts()[0]
    mass_LE = counts.score_LE.double()
    weights_LX = counts.weights_LTK.double().flatten(1)
    usage_LE = torch.zeros_like(mass_LE).scatter_add_(1, counts.ids_LTK.flatten(1), weights_LX)
    return ExpertUse(tree.num_rows, usage_LE, mass_LE, counts.natural_LE)


def check_drafter(engine: Engine) -> None:
    """ValueError for an engine whose drafter leaves nearly all steps a single row."""
    if engine.drafter is None or isinstance(engine.drafter, NgramDrafter):
        raise ValueError(f"drafter {engine.info.drafter_name} drafts no trees of a wanted size: give a draft head.")


def _check(engine: Engine, texts: Sequence[Text], num_positions: int) -> None:
    check_drafter(engine)
    if num_positions < 1 or not texts:
        raise ValueError(f"positions={num_positions} in {len(texts)} texts is nowhere to draft: use 1 or more of both.")
    check_lengths(engine, texts, max(config.depth for config in TREES))


def _budgeted_trees(uses: Sequence[TextUse]) -> list[ExpertUse]:
    return [tree for use in uses for tree in use.trees[DEFAULT_TREE] if tree.num_rows > 1]


def _usage(uses: Sequence[TextUse]) -> Tensor:
    return torch.stack([use.read.usage_LE for use in uses]).sum(dim=0)


def _shares(weight_LE: Tensor) -> Tensor:
    return weight_LE / weight_LE.sum(dim=-1, keepdim=True)


def _means(values_NL: Sequence[Tensor]) -> list[float]:
    return torch.stack(list(values_NL)).double().mean(dim=0).tolist()
