"""Incremental drafting against the training-time forward: two programs for one formula."""

from __future__ import annotations

import math

import pytest
import torch

from moespec import DraftContext, Engine, TreeConfig
from moespec.drafters.checkpoint import load_head, save_head
from moespec.drafters.eagle3 import Eagle3Drafter, make_pass
from moespec.drafters.head import Eagle3Config, Eagle3Head
from moespec.drafters.rope import Rope
from moespec.drafters.static_pass import StaticPass
from moespec.drafters.torch_pass import TorchPass
from moespec.graph import Graphs
from moespec.tree import grow_tree
from tests.conftest import tiny_model

VOCAB, NUM_COMMITTED = 31, 9


def tiny_head(**options) -> Eagle3Head:
    torch.manual_seed(0)
    shape = {
        "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
        "vocab_size": VOCAB, "draft_vocab_size": VOCAB, "tap_layers": (1, 2, 3), "target_hidden_size": 16,
    }  # fmt: skip
    config = Eagle3Config(**shape | options)
    head = Eagle3Head(config).requires_grad_(False)
    for parameter in head.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
            largest = parameter.abs().amax(dim=1, keepdim=True)
            # 127ths of a row's largest value: what the compiled pass keeps is then the weight itself.
            parameter.data = (parameter / largest * 127).round() / 127 * largest
    head.embeddings = torch.randn(config.vocab_size, config.hidden_size)
    return head


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"norm_before_residual": True},
        {"norm_output": True},
        {"norm_before_fc": True, "fc_norm": True},
        {"rope": Rope(1e4, {"rope_type": "linear", "factor": 3.0})},
    ],
)
def test_a_drafted_chain_has_the_probabilities_of_the_training_forward(options):
    head = tiny_head(**options)
    drafter = Eagle3Drafter(head, max_context=64)
    token_ids = torch.randint(0, VOCAB, (NUM_COMMITTED + 1,)).tolist()  # the last one is the root
    features_NF = torch.randn(NUM_COMMITTED, 48)
    drafter.observe(features_NF[:4])  # in two parts, as after two steps
    drafter.observe(features_NF[4:])
    tree = drafter.propose(DraftContext(token_ids, TreeConfig(total_tokens=4, depth=3, top_k=1, min_path_p=0)))
    drafted = tree.tokens_T.tolist()[1:]
    # Teacher-forced with the drafted chain: row n - 1 of unrolled step i predicts the chain's token i.
    tokens_1S = torch.tensor([token_ids[1:] + drafted[:-1]])
    padded_1SF = torch.cat([features_NF, torch.zeros(2, 48)])[None]
    expected, total = [], 0.0
    for step, logits_1SV in enumerate(head.unrolled(tokens_1S, padded_1SF, 3)):
        total += float(logits_1SV[0, NUM_COMMITTED - 1].log_softmax(-1)[drafted[step]])
        expected.append(total)
    assert tree.draft_logp_T.tolist()[1:] == pytest.approx(expected, abs=1e-4)
    assert tree.parents_T.tolist() == [-1, 0, 1, 2]


def test_trees_keep_the_best_paths_and_their_ancestors():
    drafter = Eagle3Drafter(tiny_head(), max_context=64)
    token_ids = list(range(NUM_COMMITTED + 1))
    drafter.observe(torch.randn(NUM_COMMITTED, 48))
    tree = drafter.propose(DraftContext(token_ids, TreeConfig(total_tokens=12, depth=4, top_k=3, min_path_p=0)))
    assert tree.num_rows == 12
    parents, logp = tree.parents_T.tolist(), tree.draft_logp_T.tolist()
    for row in range(1, 12):
        assert parents[row] < row
        assert logp[row] <= logp[parents[row]]
        ancestors = {row}
        while parents[row] >= 0:
            row = parents[row]
            ancestors.add(row)
        assert set(tree.mask_TT[max(ancestors)].nonzero()[:, 0].tolist()) == ancestors
    siblings = [(parents[row], int(tree.tokens_T[row])) for row in range(1, 12)]
    assert len(set(siblings)) == len(siblings)


def static_pass(head, max_context: int) -> StaticPass:
    return StaticPass(head, max_context, Graphs(torch.device("cpu")))


def paths(tree) -> dict[tuple[int, ...], float]:
    """Log-probability of every path of tokens below the root."""
    found: dict[int, tuple[int, ...]] = {0: ()}
    for row, (token, parent) in enumerate(zip(tree.tokens_T.tolist(), tree.parents_T.tolist(), strict=True)):
        if row:
            found[row] = (*found[parent], token)
    return {found[row]: logp for row, logp in enumerate(tree.draft_logp_T.tolist()) if row}


@pytest.mark.parametrize("make_pass", [TorchPass, make_pass, static_pass])
def test_paths_below_the_least_probability_and_no_others_are_left_out(make_pass):
    """And those whose parent is not twice as likely as that."""
    head = tiny_head()
    head.lm_head.weight.data *= 3  # sure enough of some children
    features_NF, token_ids = torch.randn(NUM_COMMITTED, 48), list(range(NUM_COMMITTED + 1))
    sizes, unsearched = [], set()
    for least in (0.01, 0.03, 0.1, 0.99):
        drafted = []
        for config in (TreeConfig(64, 5, 3, 0), TreeConfig(64, 5, 3, least)):
            drafter = Eagle3Drafter(head, 64, make_pass(head, 64))
            drafter.observe(features_NF)
            tree = drafter.propose(DraftContext(token_ids, config))
            drafted.append(paths(tree.without_padding()))
        everything, kept = drafted
        likely = {path for path, logp in everything.items() if logp >= math.log(least)}
        below = {path for path in likely if len(path) > 1 and everything[path[:-1]] < math.log(2 * least)}
        assert kept.keys() == likely - below
        sizes.append(len(kept))
        unsearched |= below
    assert sizes[0] > sizes[1] > sizes[2] > sizes[3] == 0 and unsearched


def test_passes_are_over_nodes_that_something_is_looked_for_below():
    """Paths of 0.6 and 0.3, then of 0.36, then of 0.216: twice as likely as the least that is kept."""
    children = torch.tensor([[0.6, 0.3, 0.1]]).log()
    num_nodes = []

    def scorer(frontier):
        num_nodes.append(len(frontier.tokens_N))
        return torch.arange(3).expand(num_nodes[-1], 3), children.expand(num_nodes[-1], 3)

    grow_tree((torch.arange(3)[None], children), scorer, 9, TreeConfig(64, 4, 3, 0.1))
    assert num_nodes == [2, 1, 1]


def test_drafting_again_after_a_cut_gives_the_same_tree():
    drafter = Eagle3Drafter(tiny_head(), max_context=64)
    token_ids, features_NF = list(range(NUM_COMMITTED + 1)), torch.randn(NUM_COMMITTED, 48)
    drafter.observe(features_NF)
    first = drafter.propose(DraftContext(token_ids, TreeConfig()))
    drafter.truncate(5)
    drafter.observe(features_NF[5:])
    second = drafter.propose(DraftContext(token_ids, TreeConfig()))
    assert torch.equal(first.tokens_T, second.tokens_T)
    torch.testing.assert_close(first.draft_logp_T, second.draft_logp_T)


def test_the_native_layout_survives_a_round_trip_and_names_what_is_missing(tmp_path):
    head = tiny_head()
    save_head(head, tmp_path, torch.float32)
    again = load_head(tmp_path, num_target_layers=6)
    assert again.config == head.config
    assert all(torch.equal(head.state_dict()[name], tensor) for name, tensor in again.state_dict().items())
    from safetensors.torch import load_file, save_file

    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["fc.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"missing fc\.weight\.$"):
        load_head(tmp_path, num_target_layers=6)


def test_a_head_with_endless_values_is_refused(tmp_path):
    head = tiny_head()
    head.fc.weight[1, 2] = torch.inf
    save_head(head, tmp_path)
    with pytest.raises(ValueError, match=r"not finite in fc\.weight"):
        load_head(tmp_path, num_target_layers=6)


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("config.json", "{}", "no 'hidden_size'"),
        ("config.json", "{", "cannot be read"),
        ("config.json", "[1]", "cannot be read"),
        ("model.safetensors", "abc", "damaged, cut short"),
    ],
)
def test_a_broken_head_is_named_in_a_sentence_and_the_model_given_back(tmp_path, name, content, sentence):
    save_head(tiny_head(), tmp_path)
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=sentence):
        load_head(tmp_path, num_target_layers=6)
    model = tiny_model("olmoe")
    with pytest.raises(ValueError, match=sentence):
        Engine.from_model(model, drafter=tmp_path)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
