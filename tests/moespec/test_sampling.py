"""Sampling without a budget emits the target's distribution; the usual wrong rule would be caught.

Joint distribution of the first two tokens after the prompt's own, over 8 symbols: 64 cells, chi-square with n = 2,000
runs; the threshold has a false-alarm rate of 1e-4 (Wilson and Hilferty's approximation), and the seeds are fixed.
"""

from __future__ import annotations

import math
from collections import Counter

import torch
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from moespec.config import GenerationConfig
from moespec.sampling import choose_tokens, process_logits
from moespec.types import DraftTree, ancestor_mask
from moespec.verify import verify_tree

VOCAB, NUM_RUNS = 8, 2000


def chi_square_limit(degrees: int, z: float = 3.719) -> float:
    """The 1 - 1e-4 quantile."""
    return degrees * (1 - 2 / (9 * degrees) + z * math.sqrt(2 / (9 * degrees))) ** 3


def target_logits(prefix: tuple[int, ...]) -> torch.Tensor:
    """A little language model: any fixed function of the prefix."""
    return torch.randn(VOCAB, generator=torch.Generator().manual_seed(hash(prefix) % 2**31)) * 1.5


def draft_tree() -> tuple[DraftTree, list[tuple[int, ...]]]:
    """Root 0; children 1, 2, 5; below 1 the tokens 3, 4, below 2 the token 6; and each row's prefix."""
    tokens = torch.tensor([0, 1, 2, 5, 3, 4, 6])
    parents = torch.tensor([-1, 0, 0, 0, 1, 1, 2])
    depths = torch.tensor([0, 1, 1, 1, 2, 2, 2])
    prefixes = [(0,), (0, 1), (0, 2), (0, 5), (0, 1, 3), (0, 1, 4), (0, 2, 6)]
    return DraftTree(tokens, parents, depths, -depths.float(), ancestor_mask(parents, 2)), prefixes


def joint_counts(choose) -> Counter:
    """Counts of the first two tokens after the root; a second step without a tree where the first emitted just one."""
    tree, prefixes = draft_tree()
    logits_TV = torch.stack([target_logits(prefix) for prefix in prefixes])
    counts: Counter = Counter()
    for seed in range(NUM_RUNS):
        generation = GenerationConfig(temperature=1.0, seed=seed)
        emitted = choose(tree, logits_TV, generation)
        if len(emitted) == 1:
            logits_1V = target_logits((0, emitted[0]))[None]
            emitted += choose_tokens(logits_1V, torch.zeros(1, dtype=torch.long), 11, generation).tolist()
        counts[tuple(emitted[:2])] += 1
    return counts


def statistic(counts: Counter) -> float:
    first = target_logits((0,)).double().softmax(-1)
    total = 0.0
    for a in range(VOCAB):
        second = target_logits((0, a)).double().softmax(-1)
        for b in range(VOCAB):
            expected = NUM_RUNS * float(first[a] * second[b])
            total += (counts[a, b] - expected) ** 2 / expected
    return total


def ours(tree: DraftTree, logits_TV: torch.Tensor, generation: GenerationConfig) -> list[int]:
    return verify_tree(tree, choose_tokens(logits_TV, tree.depths_T, 10, generation)).token_ids


def sampled_draft_rule(tree: DraftTree, logits_TV: torch.Tensor, generation: GenerationConfig) -> list[int]:
    """The rule for sampled drafts, min(1, p / q) with q the drafter's: wrong for a deterministic top-k set."""
    rng = torch.Generator().manual_seed(generation.seed)
    row, emitted = 0, []
    while True:
        p = logits_TV[row].softmax(-1)
        children = [child for child in range(1, tree.num_rows) if int(tree.parents_T[child]) == row]
        accepted = None
        for child in children:
            token, q = int(tree.tokens_T[child]), 0.4
            if float(torch.rand(1, generator=rng)) < min(1.0, float(p[token]) / q):
                accepted = child
                break
            p = p.clone()
            p[token] = max(0.0, float(p[token]) - q)
            p = p / p.sum()
        if accepted is None:
            return [*emitted, int(torch.multinomial(p, 1, generator=rng))]
        emitted.append(int(tree.tokens_T[accepted]))
        row = accepted


def test_the_emitted_tokens_have_the_targets_joint_distribution():
    assert statistic(joint_counts(ours)) < chi_square_limit(VOCAB * VOCAB - 1)


def test_the_rule_for_sampled_drafts_would_be_rejected():
    assert statistic(joint_counts(sampled_draft_rule)) > chi_square_limit(VOCAB * VOCAB - 1)


def test_processors_equal_transformers():
    logits_TV = torch.randn(6, 50, generator=torch.Generator().manual_seed(0))
    for temperature, top_k, top_p in ((0.7, 0, 1.0), (1.3, 5, 1.0), (1.0, 0, 0.8), (0.9, 10, 0.6), (1.0, 0, 1e-6)):
        warpers = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
        if top_k:
            warpers.append(TopKLogitsWarper(top_k))
        if top_p < 1:
            warpers.append(TopPLogitsWarper(top_p))
        expected = warpers(torch.zeros(6, 1, dtype=torch.long), logits_TV.clone())
        assert torch.equal(process_logits(logits_TV, temperature, top_k, top_p), expected)
