"""Prompt look-up against its formula over every path, its index against a fresh one, and generate's text."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

from moespec import DraftContext, DraftTree, Engine, GenerationConfig, TreeConfig
from moespec.drafters import ngram
from moespec.drafters.ngram import NgramDrafter
from tests.conftest import tiny_model
from tests.moespec.test_heads import paths_of

TREES = [
    TreeConfig(),
    TreeConfig(total_tokens=64, depth=6, top_k=16, min_path_p=0),  # all there is
    TreeConfig(total_tokens=5, depth=6, top_k=2, min_path_p=0),  # some of it
    TreeConfig(total_tokens=64, depth=4, top_k=1, min_path_p=0),  # a chain
    TreeConfig(total_tokens=64, depth=1, top_k=16, min_path_p=0.2),
]


def probability(ids: list[int], path: tuple[int, ...], size: int) -> float:
    """p_n = (c_n + p_(n-1)) / (N_n + 1) over all earlier matches of the last n tokens."""
    if size == 0:
        return 0.0
    shorter = probability(ids, path, size - 1)
    if size > len(ids):
        return shorter
    ends = [end for end in range(size, len(ids)) if ids[end - size : end] == ids[-size:]]
    agreeing = [end for end in ends if tuple(ids[end : end + len(path)]) == path]
    return (len(agreeing) + shorter) / (len(ends) + 1)


def best_paths(ids: list[int], config: TreeConfig, alphabet: int) -> dict[tuple[int, ...], float]:
    """Every path that is likely enough, with at most `top_k` children of each node, the likeliest."""
    found: dict[tuple[int, ...], float] = {}
    level: list[tuple[int, ...]] = [()]
    for _ in range(config.depth):
        below = []
        for path in level:
            children = {(*path, token): probability(ids, (*path, token), 3) for token in range(alphabet)}
            likely = [child for child, p in children.items() if p > 0 and p >= config.min_path_p]
            kept = sorted(likely, key=lambda child: (-children[child], -last_seen(ids, child)))[: config.top_k]
            found |= {child: children[child] for child in kept}
            below += kept
        level = below
    return found


def last_seen(ids: list[int], path: tuple[int, ...]) -> int:
    """The last place behind the last token's word where the path stands: of equal ones the latest comes first."""
    places = [end for end in range(1, len(ids)) if ids[end - 1] == ids[-1]]
    return max(end for end in places if tuple(ids[end : end + len(path)]) == path)


def drafted(tree: DraftTree) -> dict[tuple[int, ...], float]:
    return dict(zip(paths_of(tree)[1:], tree.draft_logp_T.exp().tolist()[1:], strict=True))


@pytest.mark.parametrize("config", TREES, ids=str)
def test_a_tree_holds_the_likeliest_continuations(config):
    rng, num_full, num_empty = random.Random(0), 0, 0
    for alphabet, length in itertools.product((2, 6), (1, 2, 3, 9, 30)):
        ids = [rng.randrange(alphabet) for _ in range(length)]
        tree = NgramDrafter().propose(DraftContext(ids, config))
        actual, allowed = drafted(tree), best_paths(ids, config, alphabet)
        assert tree.tokens_T[0] == ids[-1]
        assert actual.keys() <= allowed.keys()
        assert list(actual.values()) == pytest.approx([allowed[path] for path in actual], rel=1e-5)
        best = sorted(allowed.values(), reverse=True)[: config.total_tokens - 1]
        assert sorted(actual.values(), reverse=True) == pytest.approx(best, rel=1e-5)
        for row, parent in enumerate(tree.parents_T.tolist()):
            ancestors = {row} if row == 0 else {row, *tree.mask_TT[parent].nonzero()[:, 0].tolist()}
            assert set(tree.mask_TT[row].nonzero()[:, 0].tolist()) == ancestors
        assert tree.depths_T.tolist() == [len(path) for path in paths_of(tree)]
        num_full += len(actual) == config.total_tokens - 1
        num_empty += not actual
    assert num_empty  # one token has no earlier one
    assert num_full or config.total_tokens == 64


def test_two_continuations_make_a_branch_and_a_longer_match_counts_more():
    #      a b c d   x b c e   a b c
    ids = [1, 2, 3, 4, 9, 2, 3, 5, 1, 2, 3]
    tree = NgramDrafter().propose(DraftContext(ids, TreeConfig(total_tokens=3, depth=1, top_k=2, min_path_p=0)))
    # Both follow "b c" and "c" once; "a b c" was seen once, and d followed: p_1 = 1/3, p_2 = (1 + 1/3) / 3.
    assert drafted(tree) == pytest.approx({(4,): (1 + 4 / 9) / 2, (5,): (4 / 9) / 2})


def test_only_the_latest_matches_are_looked_at(monkeypatch):
    monkeypatch.setattr(ngram, "MAX_MATCHES", 2)
    ids = [7, 1, 7, 2, 7, 3, 7, 2, 7]  # the last two 7s before the end are followed by 3 and 2
    tree = NgramDrafter().propose(DraftContext(ids, TreeConfig(total_tokens=9, depth=1, top_k=9, min_path_p=0)))
    assert drafted(tree).keys() == {(3,), (2,)}


def test_a_drafter_that_followed_a_text_drafts_as_a_fresh_one():
    """Through accepted tokens, retries and new turns: what was forgotten leaves nothing behind."""
    rng, following, ids = random.Random(1), NgramDrafter(), []
    config = TreeConfig(total_tokens=32, depth=5, top_k=4, min_path_p=0)
    for _ in range(60):
        kept = rng.choice([len(ids), len(ids), rng.randrange(len(ids) + 1)])
        ids = ids[:kept] + [rng.randrange(4) for _ in range(rng.randrange(1, 6))]
        following.truncate(kept)
        following.observe(None)
        actual, expected = (drafter.propose(DraftContext(ids, config)) for drafter in (following, NgramDrafter()))
        assert torch.equal(actual.tokens_T, expected.tokens_T) and torch.equal(actual.parents_T, expected.parents_T)
        assert torch.equal(actual.draft_logp_T, expected.draft_logp_T)
    following.truncate(0)
    assert not following._ends


class Guarded(list):
    """Token ids of a long text, of which a step may look at the new ones and the last alone."""

    allowed: int

    def __iter__(self):
        raise AssertionError("the whole text is read")

    def __getitem__(self, place):
        first = range(len(self))[place][0] if isinstance(place, slice) else place % len(self)
        assert len(self) - first <= self.allowed, "old tokens are read again"
        return super().__getitem__(place)


def test_a_step_reads_the_new_tokens_of_a_long_text_alone():
    rng, drafter = random.Random(2), NgramDrafter()
    ids = Guarded(rng.randrange(50) for _ in range(20_000))
    ids.allowed = len(ids)
    drafter.propose(DraftContext(ids, TreeConfig()))
    ids += [3, 4, 5]
    ids.allowed = 3
    assert drafter.propose(DraftContext(ids, TreeConfig())).num_rows > 1


def test_greedy_is_what_generate_writes(family):
    """Of a text that repeats itself, so that drafts are right and wrong."""
    prompt_ids = torch.tensor([3, 1, 4, 1, 5, 9, 2, 6] * 3)
    expected = tiny_model(family).generate(prompt_ids[None], do_sample=False, max_new_tokens=48)[0, 24:].tolist()
    engine = Engine.from_model(tiny_model(family), drafter="ngram")
    steps = list(engine.generate(prompt_ids, GenerationConfig(max_new_tokens=48)))
    assert steps[-1].summary.token_ids == expected
    assert any(step.kind == "tree" for step in steps)
    # The same when the drafter already knows another text.
    assert [*engine.generate([9, 9, 4, 1], GenerationConfig(max_new_tokens=8))]
    assert [*engine.generate(prompt_ids, GenerationConfig(max_new_tokens=48))][-1].summary.token_ids == expected
