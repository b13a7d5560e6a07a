"""The compiled and the fixed-shape draft pass against torch's, tree for tree; what holds for equally likely ones."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from moespec import DraftContext, DraftTree, TreeConfig
from moespec.drafters.base import propose_together
from moespec.drafters.compiled_pass import CompiledPass
from moespec.drafters.eagle3 import Eagle3Drafter, make_pass
from moespec.drafters.ngram import NgramDrafter
from moespec.drafters.static_pass import StaticPass
from moespec.drafters.torch_pass import TorchPass
from moespec.graph import Graphs
from moespec.native import load_kernels
from moespec.tree import grow_tree
from tests.moespec.test_eagle3 import VOCAB, tiny_head
from tests.questions import NoQuestions

KERNELS = load_kernels()
SMALL_VOCAB = torch.tensor([2, 3, 5, 7, 11, 13, 17, 19, 23, 29])


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def head_of(options: dict):
    head = tiny_head(**options)
    for parameter in head.parameters():
        if parameter.dim() == 1:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)  # three norms that are told apart
    if "draft_vocab_size" in options:
        head.draft_only(SMALL_VOCAB[: options["draft_vocab_size"]])
    return head


def assert_same_tree(actual: DraftTree, expected: DraftTree) -> None:
    for name in ("tokens_T", "parents_T", "depths_T", "mask_TT", "alt_ids_TA"):
        assert torch.equal(getattr(actual, name), getattr(expected, name)), name
    for name in ("draft_logp_T", "alt_logp_TA"):
        torch.testing.assert_close(getattr(actual, name), getattr(expected, name), atol=1e-4, rtol=1e-4)


def static_pass(head, max_context: int) -> StaticPass:
    return StaticPass(head, max_context, Graphs(torch.device("cpu")))


def drafter_pair(kind, options: dict, max_context: int = 64) -> list[Eagle3Drafter]:
    head = head_of(options)
    return [Eagle3Drafter(head, max_context, make(head, max_context)) for make in (kind, TorchPass)]


def without_padding(tree: DraftTree) -> DraftTree:
    return tree if tree.num_valid is None else tree.first_rows(int(tree.num_valid))


both_kinds = pytest.mark.parametrize("kind", [CompiledPass, static_pass], ids=["compiled", "static"])


HEADS = [
    {},
    {"norm_before_residual": True},
    {"norm_output": True},
    {"norm_before_fc": True, "fc_norm": True},
    {"draft_vocab_size": 10},
    {"draft_vocab_size": 3, "norm_output": True},  # fewer draft tokens than a node has alternatives
]
TREES = [
    TreeConfig(),
    TreeConfig(total_tokens=2, depth=1, top_k=1, min_path_p=0),  # the smallest: the head is not run again
    TreeConfig(total_tokens=30, depth=1, top_k=4, min_path_p=0),  # asks for more than one level holds
    TreeConfig(total_tokens=6, depth=5, top_k=1, min_path_p=0),  # a chain
    TreeConfig(total_tokens=64, depth=6, top_k=16, min_path_p=0),  # the largest: more children than words
    TreeConfig(total_tokens=5, depth=8, top_k=6, min_path_p=0),  # most of what is expanded is not kept
    TreeConfig(total_tokens=20, depth=8, top_k=4, min_path_p=0.02),  # stops where paths are unlikely
]


@both_kinds
@pytest.mark.parametrize("options", HEADS, ids=str)
@pytest.mark.parametrize("config", TREES, ids=str)
def test_a_pass_drafts_the_same_tree(kind, options, config):
    token_ids, features_NF = torch.randint(0, VOCAB, (15,)).tolist(), torch.randn(14, 48)
    trees: list[list[DraftTree]] = []
    for drafter in drafter_pair(kind, options):
        drafter.observe(features_NF[:4])  # in two parts, as after two steps
        drafter.observe(features_NF[4:9])
        first = without_padding(drafter.propose(DraftContext(token_ids[:10], config)))
        drafter.observe(features_NF[9:12])  # behind keys of the first tree
        second = without_padding(drafter.propose(DraftContext(token_ids[:13], config)))
        drafter.truncate(5)
        drafter.observe(features_NF[9:])
        third = without_padding(drafter.propose(DraftContext(token_ids[:5] + token_ids[9:], config)))
        trees.append([first, second, third])
    for actual, expected in zip(*trees, strict=True):
        assert_same_tree(actual, expected)
    assert len({tuple(tree.draft_logp_T.tolist()) for tree in trees[0]}) == 3  # the features were read


@both_kinds
def test_a_pass_keeps_its_keys_when_they_outgrow_their_place(kind):
    token_ids, features_NF = torch.randint(0, VOCAB, (521,)).tolist(), torch.randn(520, 48)
    trees = []
    for drafter in drafter_pair(kind, {}, max_context=600):
        drafter.observe(features_NF[:505])
        drafter.propose(DraftContext(token_ids[:506], TreeConfig(depth=8)))  # the tree crosses position 512
        drafter.observe(features_NF[505:])  # and then the text
        trees.append(without_padding(drafter.propose(DraftContext(token_ids, TreeConfig()))))
    assert_same_tree(*trees)


@both_kinds
def test_a_long_prompt_after_a_short_text_finds_its_place(kind):
    """Its keys outgrow the storage in a pass that is not of the usual few rows."""
    token_ids, features_NF = torch.randint(0, VOCAB, (602,)).tolist(), torch.randn(600, 48)
    trees = []
    for drafter in drafter_pair(kind, {}, max_context=700):
        drafter.observe(features_NF[:9])
        drafter.propose(DraftContext(token_ids[:10], TreeConfig()))
        drafter.truncate(0)
        drafter.observe(features_NF)
        trees.append(without_padding(drafter.propose(DraftContext(token_ids[:601], TreeConfig(16, 5, 4, 0)))))
    assert_same_tree(*trees)


@pytest.mark.parametrize("options", HEADS, ids=str)
def test_a_draft_of_fixed_shape_asks_the_device_for_nothing(options):
    head = head_of(options)
    drafted = static_pass(head, 64)
    config = TreeConfig(16, 5, 4, min_path_p=0.05)
    drafted.grow(drafted.extend([1, 2, 3], torch.randn(3, 48), 0), 3, 4, config)
    ((extension, _),), ((growth, _),) = drafted._extensions.by_shape.values(), drafted._growths.by_shape.values()
    with NoQuestions() as mode:
        extension.run()
        growth.run()
    assert mode.asked == ()
    with NoQuestions() as mode:
        torch.ones(1)[:1] = 0  # a number of the host's
    assert mode.asked  # the mode can tell


def test_only_small_fp32_heads_are_compiled():
    assert isinstance(make_pass(tiny_head(), 64), CompiledPass)
    assert isinstance(make_pass(tiny_head().to(torch.bfloat16), 64), TorchPass)


def test_features_of_another_width_are_refused():
    drafter = Eagle3Drafter(tiny_head(), 64)
    drafter.observe(torch.randn(4, 32))
    with pytest.raises(ValueError, match=r"reads features \[4, 48\], not \[4, 32\]"):
        drafter.propose(DraftContext([1, 2, 3, 4, 5], TreeConfig()))


def assert_whole(tree: DraftTree) -> None:
    """Every row hangs one level below its parent, which stands before it."""
    parents, depths = tree.parents_T.tolist(), tree.depths_T.tolist()
    for row in range(1, len(parents)):
        assert parents[row] < row
        assert depths[row] == depths[parents[row]] + 1


@pytest.mark.parametrize("total_tokens", [2, 12, 40])
def test_no_child_comes_without_a_parent_that_is_as_likely(total_tokens):
    """Every log-probability is 0.0, which is what a certain drafter gives."""
    depth, top_k, num_best = 6, 8, 8

    def certain(num_rows: int):
        return torch.arange(num_best).expand(num_rows, -1), torch.zeros(num_rows, num_best)

    config = TreeConfig(total_tokens, depth, top_k, 0)
    tree = grow_tree(certain(1), lambda frontier: certain(len(frontier.tokens_N)), 9, config)
    assert tree.num_rows == total_tokens
    assert_whole(tree)
    # The same pool by hand: every level expands the first nodes of the one before.
    size = top_k + (depth - 1) * top_k * top_k
    parents, levels, places = np.full(size, -1), np.ones(size, np.int64), [-1]
    above = 0  # the first node of the level above
    for level in range(2, depth + 1):
        first = top_k + (level - 2) * top_k * top_k
        parents[first : first + top_k * top_k] = np.repeat(np.arange(above, above + top_k), top_k)
        levels[first : first + top_k * top_k] = level
        places += range(above, above + top_k)
        above = first
    alternatives = np.zeros((len(places), num_best), np.int64), np.zeros((len(places), num_best), np.float32)
    pool = (np.arange(size), np.zeros(size, np.float32), parents, levels, np.array(places), *alternatives)
    found = (torch.from_numpy(part) for part in KERNELS.tree.select(9, total_tokens - 1, -math.inf, pool))
    compiled = DraftTree(*found)
    assert compiled.num_rows == total_tokens
    assert_whole(compiled)


@pytest.mark.parametrize("kind", [CompiledPass, TorchPass, static_pass])
def test_a_certain_head_drafts_a_chain(kind):
    head = head_of({})
    head.lm_head.weight.mul_(1e4)  # one token takes all the probability there is in fp32
    drafter = Eagle3Drafter(head, 64, kind(head, 64))
    drafter.observe(torch.randn(9, 48))
    tree = drafter.propose(DraftContext(list(range(10)), TreeConfig(total_tokens=5, depth=8, top_k=4, min_path_p=0)))
    assert tree.draft_logp_T.tolist() == [0.0] * 5
    assert tree.parents_T.tolist() == [-1, 0, 1, 2, 3]
    assert_whole(tree)


# (rows, vocabulary, asked): one row, the whole vocabulary, a large one
@pytest.mark.parametrize("shape", [(1, 97, 5), (3, 5, 5), (2, 5000, 16)])
@pytest.mark.parametrize("spread", [0.1, 5.0, 60.0])  # nearly flat, usual, most tokens without any probability in fp32
def test_the_likeliest_tokens_are_the_top_of_the_softmax(shape, spread):
    num_rows, vocab, num_best = shape
    logits_TV = torch.randn(num_rows, vocab) * spread
    ids, logp = (torch.from_numpy(part) for part in KERNELS.head.best_of(logits_TV.numpy(), num_best))
    expected = logits_TV.double().log_softmax(dim=-1).topk(num_best, dim=-1)
    assert torch.equal(ids, expected.indices)
    torch.testing.assert_close(logp.double(), expected.values, atol=1e-4, rtol=1e-5)


def test_equally_likely_tokens_come_by_number():
    ids, logp = KERNELS.head.best_of(np.array([[0, 1, 1, 0, 1, 0]], np.float32), 5)
    assert ids.tolist() == [[1, 2, 4, 0, 3]]
    assert logp[0, 0] == logp[0, 2] > logp[0, 3] == logp[0, 4]


@pytest.mark.parametrize("options", HEADS, ids=str)
def test_trees_grown_together_are_those_grown_alone(options):
    """Conversations of other lengths, whose trees end elsewhere; again behind what became of them."""
    head, lengths, max_context = head_of(options), [9, 1, 30], 64
    configs = [TreeConfig(20, 5, 3, 0), TreeConfig(6, 2, 3, 0), TreeConfig(16, 8, 3, 0.03)]
    first, alone = (Eagle3Drafter(head, max_context, CompiledPass(head, max_context)) for _ in range(2))
    together, separate = [first, first.fork(), first.fork()], [alone, alone.fork(), alone.fork()]
    texts = [torch.randint(VOCAB, (length + 8,)).tolist() for length in lengths]
    for round_number in range(2):
        features = [torch.randn(7 * round_number or length, 48) for length in lengths]
        for drafters in (together, separate):
            for drafter, features_NF in zip(drafters, features, strict=True):
                drafter.observe(features_NF)
        ends = [length + 7 * round_number + 1 for length in lengths]
        contexts = [DraftContext(text[:end], config) for text, end, config in zip(texts, ends, configs, strict=True)]
        trees = propose_together(list(zip(together, contexts, strict=True)))
        assert [tree.num_rows for tree in trees] != [trees[0].num_rows] * 3
        for tree, drafter, context in zip(trees, separate, contexts, strict=True):
            assert_same_tree(tree, drafter.propose(context))


@both_kinds
def test_a_fork_keeps_a_conversation_of_its_own(kind):
    head, features_NF = head_of({}), torch.randn(12, 48)
    text, other = torch.randint(VOCAB, (2, 13)).tolist()
    drafter = Eagle3Drafter(head, 64, kind(head, 64))
    expected = Eagle3Drafter(head, 64, kind(head, 64))
    fork = drafter.fork()
    for each in (drafter, expected):
        each.observe(features_NF)
    before = expected.propose(DraftContext(text, TreeConfig()))
    fork.observe(features_NF.flip(0))
    fork.propose(DraftContext(other, TreeConfig()))
    assert_same_tree(without_padding(drafter.propose(DraftContext(text, TreeConfig()))), without_padding(before))
    assert len(fork.head.fc.weight) and fork.head is drafter.head


def test_what_cannot_be_drafted_together_is_left_to_each():
    head = head_of({})
    torch_pass, compiled = (Eagle3Drafter(head, 64, kind(head, 64)) for kind in (TorchPass, CompiledPass))
    small, large = (DraftContext([1, 2], TreeConfig(top_k=top_k)) for top_k in (2, 3))
    assert propose_together([(torch_pass, small), (torch_pass.fork(), small)]) is None
    assert propose_together([(compiled, small), (compiled.fork(), large)]) is None
    assert propose_together([(NgramDrafter(), small), (NgramDrafter(), small)]) is None
