"""Sampling without a budget emits the target's distribution; the usual wrong rule would be caught.

Joint distribution of the first three tokens after the prompt's own, over 5 symbols: 125 cells, chi-square with
n = 4,000 runs; the threshold has a false-alarm rate of 1e-4 (Wilson and Hilferty's approximation), and the seeds are
fixed.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter

import pytest
import torch
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from moespec.config import GenerationConfig
from moespec.sampling import TreeOpinions, choose_tokens, process_logits
from moespec.types import DraftTree, ancestor_mask
from moespec.verify import verify_tree

VOCAB, NUM_TOKENS, NUM_RUNS = 5, 3, 4000
# Below every root: children 1, 2 and 4; below 1 the tokens 3 and 0, below 2 the token 1.
BRANCHES = [(), (1,), (2,), (4,), (1, 3), (1, 0), (2, 1)]
PARENTS = [-1, 0, 0, 0, 1, 1, 2]


def chi_square_limit(degrees: int, z: float = 3.719) -> float:
    """The 1 - 1e-4 quantile."""
    return degrees * (1 - 2 / (9 * degrees) + z * math.sqrt(2 / (9 * degrees))) ** 3


def target_logits(prefix: tuple[int, ...]) -> torch.Tensor:
    """A little language model: any fixed function of the prefix."""
    return torch.randn(VOCAB, generator=torch.Generator().manual_seed(hash(prefix) % 2**31))


def draft_tree(root: int) -> DraftTree:
    tokens, parents = torch.tensor([root, *(branch[-1] for branch in BRANCHES[1:])]), torch.tensor(PARENTS)
    depths = torch.tensor([len(branch) for branch in BRANCHES])
    return DraftTree(tokens, parents, depths, -depths.float(), ancestor_mask(parents, 2))


def joint_counts(choose) -> Counter:
    """Counts of the first three tokens after a root; as many steps, each with a tree, as that takes."""
    counts: Counter = Counter()
    logits: dict[tuple[int, ...], torch.Tensor] = {}
    for seed in range(NUM_RUNS):
        written: tuple[int, ...] = (0,)
        while len(written) <= NUM_TOKENS:
            if written not in logits:
                logits[written] = torch.stack([target_logits(written + branch) for branch in BRANCHES])
            generation = GenerationConfig(temperature=1.0, seed=seed)
            written += tuple(choose(draft_tree(written[-1]), logits[written], len(written), generation))
        counts[written[1 : 1 + NUM_TOKENS]] += 1
    return counts


def statistic(counts: Counter) -> float:
    total = 0.0
    for tokens in itertools.product(range(VOCAB), repeat=NUM_TOKENS):
        expected = float(NUM_RUNS)
        for n, token in enumerate(tokens):
            expected *= float(target_logits((0, *tokens[:n])).double().softmax(-1)[token])
        total += (counts[tokens] - expected) ** 2 / expected
    return total


def ours(tree: DraftTree, logits_TV: torch.Tensor, position: int, generation: GenerationConfig) -> list[int]:
    best_T = logits_TV.argmax(dim=-1)
    return verify_tree(tree, choose_tokens(logits_TV, best_T, tree, position, generation)).token_ids


def sampled_draft_rule(
    tree: DraftTree, logits_TV: torch.Tensor, position: int, generation: GenerationConfig
) -> list[int]:
    """The rule for sampled drafts, min(1, p / q) with q the drafter's: wrong for a deterministic top-k set."""
    rng = torch.Generator().manual_seed(100 * generation.seed + position)
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
    assert statistic(joint_counts(ours)) < chi_square_limit(VOCAB**NUM_TOKENS - 1)


def test_the_rule_for_sampled_drafts_would_be_rejected():
    assert statistic(joint_counts(sampled_draft_rule)) > chi_square_limit(VOCAB**NUM_TOKENS - 1)


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opinions_of_a_tree_are_the_targets_probabilities(dtype):
    logits_TV = (8 * torch.randn(4, 300, generator=torch.Generator().manual_seed(3))).to(dtype)
    logits_TV[2, [7, 9]] = 100.0  # a tie
    parents = [-1, 0, 0, 2]
    tree = DraftTree(
        torch.tensor([0, 5, 299, 9]), torch.tensor(parents), torch.tensor([0, 1, 1, 2]), torch.zeros(4),
        ancestor_mask(torch.tensor(parents), 2),
    )  # fmt: skip
    opinions = TreeOpinions.of(tree, logits_TV)
    logp_TV = logits_TV.double().log_softmax(-1)
    expected = logp_TV.sort(dim=-1, descending=True).values[:, :5]
    torch.testing.assert_close(opinions.top_logp_TA.double(), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(logp_TV.gather(1, opinions.top_ids_TA), expected)
    assert opinions.best_T.tolist() == [row.index(max(row)) for row in logits_TV.tolist()]
    nodes = [0.0, float(logp_TV[0, 5]), float(logp_TV[0, 299]), float(logp_TV[2, 9])]
    assert opinions.node_logp_T.tolist() == pytest.approx(nodes, abs=1e-4)


@pytest.mark.parametrize(("token", "parent"), [(300, 0), (-1, 0), (5, 1), (5, 9)])
def test_a_row_that_is_none_is_refused(token, parent):
    tree = DraftTree(
        torch.tensor([0, token]), torch.tensor([-1, parent]), torch.tensor([0, 1]), torch.zeros(2), torch.eye(2).bool()
    )
    with pytest.raises(ValueError, match="the drafter proposed a row"):
        TreeOpinions.of(tree, torch.randn(2, 300))
