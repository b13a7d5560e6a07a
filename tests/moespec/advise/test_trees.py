"""Smaller trees replayed on a large one, against the growth that really makes trees."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

from moespec import TreeConfig
from moespec.advise.trees import BRANCHINGS, DEPTHS, LARGE, candidates_of, growth_of
from moespec.trace import StepTrace, TreeTrace
from moespec.tree import chain, grow_tree

VOCAB, ROOT = 40, 7


class Words:
    """A drafter of nothing but a table: what follows depends on the word and its level."""

    def __init__(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.logp_LVV = (3 * torch.randn(LARGE.depth, VOCAB, VOCAB, generator=generator)).log_softmax(dim=-1)
        self.num_calls = 0

    def best(self, level: int, tokens_N: torch.Tensor, count: int = 8):
        best = self.logp_LVV[level, tokens_N].topk(count, dim=-1)
        return best.indices, best.values

    def grow(self, config: TreeConfig):
        self.num_calls = 0

        def scorer(frontier):
            self.num_calls += 1
            return self.best(frontier.level, frontier.tokens_N)

        return grow_tree(self.best(0, torch.tensor([ROOT])), scorer, ROOT, config)


def paths(tree) -> list[tuple[int, ...]]:
    """The words from the root to every row."""
    found = []
    for token, parent in zip(tree.tokens_T.tolist(), tree.parents_T.tolist(), strict=True):
        found.append(() if parent < 0 else (*found[parent], token))
    return found


def traced(tree, text: tuple[int, ...]) -> TreeTrace:
    """The tree as a step's trace where the target went on with `text`."""
    rows = len(tree.tokens_T)
    return TreeTrace(
        token_ids=tree.tokens_T.tolist(),
        pieces=[""] * rows,
        parents=tree.parents_T.tolist(),
        depths=tree.depths_T.tolist(),
        draft_p=[1.0] * rows,
        path_p=tree.draft_logp_T.exp().tolist(),
        target_p=[None] * rows,
        accepted=[path == text[: len(path)] for path in paths(tree)],
        missing=[0] * rows,
        target_top=[[]] * rows,
        draft_top=[[]] * rows,
    )


def step(tree: TreeTrace | None) -> StepTrace:
    values = dict.fromkeys(StepTrace.__dataclass_fields__)
    return StepTrace(**{**values, "kind": "plain" if tree is None else "tree", "tree": tree})


@pytest.mark.parametrize("seed", range(4))
def test_a_smaller_tree_is_what_would_have_been_grown(seed):
    words, rng = Words(seed), random.Random(seed)
    large = words.grow(LARGE)
    text = max(rng.sample(paths(large), 12), key=len)
    trace = traced(large, text)
    for depth, top_k in itertools.product(DEPTHS, BRANCHINGS):
        growth = growth_of(trace, depth, top_k)
        for rows, least_p in itertools.product((2, 5, 12, 20), (0, 0.03, 0.1, 0.3)):
            config = TreeConfig(rows, depth, top_k, least_p)
            small = words.grow(config)
            num_accepted = sum(path == text[: len(path)] for path in paths(small)[1:])
            assert growth.cut(config) == (small.num_rows, 1 + words.num_calls, num_accepted), config


def test_a_candidate_is_the_mean_of_its_steps():
    words = Words(5)
    large = words.grow(LARGE)
    deep, none = max(paths(large), key=len), ()
    steps = [step(traced(large, deep)), step(traced(large, none)), step(None)]
    found = {candidate.tree: candidate for candidate in candidates_of(steps)}
    whole = found[LARGE]
    assert whole.num_accepted == pytest.approx(len(deep) / 3)
    assert whole.sizes == {(64, 8): pytest.approx(2 / 3), (1, 0): pytest.approx(1 / 3)}
    assert whole.num_rows == pytest.approx((64 + 64 + 1) / 3)
    least = found[TreeConfig(64, 8, 8, 0.25)]
    assert least.num_rows < whole.num_rows and least.num_accepted <= whole.num_accepted


def test_a_drafter_that_knew_no_more_is_not_given_more():
    drafted = chain_of(3)
    assert growth_of(drafted, 8, 8).cut(LARGE) == (4, 8, 3)
    assert growth_of(drafted, 2, 8).cut(TreeConfig(64, 2, 8, 0)) == (3, 2, 2)


def chain_of(length: int) -> TreeTrace:
    tree = chain(ROOT, list(range(length)), [-0.1] * length, torch.device("cpu"))
    return traced(tree, tuple(range(length)))


def test_without_a_draft_every_tree_is_a_root():
    for candidate in candidates_of([step(None)]):
        assert candidate.num_accepted == 0 and candidate.sizes == {(1, 0): 1.0}
