"""Draft heads in the layouts that people have: read from files written in each, run by each pass, against a plain fp64
head and transformers' own hidden states and text. The README's table of heads is what was tried here."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch

from moespec import DraftContext, DraftTree, GenerationConfig, TreeConfig
from moespec.drafters.compiled_pass import CompiledPass
from moespec.drafters.eagle3 import Eagle3Drafter
from moespec.drafters.head import Eagle3Head
from moespec.drafters.passes import HeadPass
from moespec.drafters.static_pass import StaticPass
from moespec.drafters.torch_pass import TorchPass
from moespec.graph import Graphs
from moespec.kv_cache import TreeCache
from moespec.step_router import NaturalRouter
from tests.moespec.heads import CASES, DRAFT_IDS, Case, attach, plain, target, write
from tests.plain_head import plain_tree
from tests.readme import assert_block

PROMPT = [5, 80, 13, 42, 7, 7, 61, 30, 2, 91]
NUM_TOKENS = 16
TREE = TreeConfig(total_tokens=14, depth=4, top_k=3, min_path_p=0)
PASSES: dict[str, Callable[[Eagle3Head, int], HeadPass]] = {
    "torch": TorchPass,
    "compiled": CompiledPass,
    "fixed shape": partial(StaticPass, graphs=Graphs(torch.device("cpu"))),
}


@pytest.fixture(scope="module")
def reference():
    """A model that no engine touches: (itself, the residuals entering its layers, its greedy text)."""
    model = target()
    ids_1N = torch.tensor([PROMPT])
    entering = model(ids_1N, output_hidden_states=True).hidden_states
    text = model.generate(ids_1N, do_sample=False, max_new_tokens=NUM_TOKENS)[0, len(PROMPT) :].tolist()
    return model, entering, text


def prove(case: Case, folder, reference) -> list[str]:
    """Try the head in every way; the names of the passes that it was tried on."""
    model, entering, text = reference
    weights = write(case, folder)
    engine = attach(target(), folder, tap_layers=case.given)
    # 1) The taps are transformers' hidden states of the layers named.
    assert engine.info.tap_layers == case.taps
    features_NF = torch.cat([entering[layer][0] for layer in case.taps], dim=-1)
    with torch.inference_mode(), engine.target.stepping(NaturalRouter(len(PROMPT))):
        ids_N, cache = torch.tensor(PROMPT), TreeCache(len(engine.target.layers))
        engine.target.forward(ids_N, torch.arange(len(PROMPT)), None, cache, keep=1)
        torch.testing.assert_close(engine.target.features(), features_NF, atol=1e-4, rtol=1e-4)
    # 2) Every pass drafts what the formulas say: state, tree, and what was seen below each node.
    expected = plain(case, weights, model)
    for make_pass in PASSES.values():
        check_pass(engine.drafter.head, make_pass, expected, features_NF, case)
    # 3) The engine writes what generate writes.
    *_, last = engine.generate(PROMPT, GenerationConfig(max_new_tokens=NUM_TOKENS), tree=TREE)
    assert last.summary.token_ids == text
    assert last.summary.lossless
    engine.close()
    return list(PASSES)


def check_pass(head: Eagle3Head, make_pass, expected, features_NF, case: Case) -> None:
    words = range(97) if case.drafts_all else DRAFT_IDS.tolist()
    tokens, features = PROMPT[1:], features_NF[:-1].double().numpy()
    state_1D = make_pass(head, 64).extend(tokens, features_NF[:-1], 0)
    wanted_1D = torch.tensor(expected.state(tokens, features, ()))[None].float()
    torch.testing.assert_close(state_1D, wanted_1D, atol=1e-3, rtol=1e-3)
    drafter = Eagle3Drafter(head, 64, make_pass(head, 64))
    drafter.observe(features_NF[:4])  # in two parts, as after two steps
    drafter.observe(features_NF[4:-1])
    tree = drafter.propose(DraftContext(PROMPT, TREE))
    tree = tree if tree.num_valid is None else tree.first_rows(int(tree.num_valid))

    def logp_below(path):  # of draft ids
        return expected.logp(tokens, features, tuple(words[draft] for draft in path))

    by_path = plain_tree(logp_below, TREE.total_tokens, TREE.depth, TREE.top_k)
    paths = paths_of(tree)
    drafted = {tuple(words[draft] for draft in path): logp for path, logp in by_path.items()}
    assert set(paths[1:]) == drafted.keys()
    for row, path in enumerate(paths):
        assert tree.draft_logp_T[row].item() == pytest.approx(drafted.get(path, 0.0), abs=2e-3)
        seen = [token for token in tree.alt_ids_TA[row].tolist() if token >= 0]
        if seen:
            below = logp_below(tuple(words.index(token) for token in path))
            best = below.argsort()[::-1][: len(seen)].tolist()
            assert seen == [words[draft] for draft in best]
            assert tree.alt_logp_TA[row].tolist() == pytest.approx(below[best].tolist(), abs=2e-3)
    assert sum(tree.alt_ids_TA[row, 0] >= 0 for row in range(len(paths))) >= TREE.depth


def paths_of(tree: DraftTree) -> list[tuple[int, ...]]:
    """The tokens from the root's child to each row."""
    paths: list[tuple[int, ...]] = [()]
    for token, parent in zip(tree.tokens_T.tolist()[1:], tree.parents_T.tolist()[1:], strict=True):
        paths.append((*paths[parent], token))
    return paths


def test_every_layout_is_read_as_its_own_runtime_reads_it_and_the_readme_says_so(tmp_path, reference):
    rows = []
    for number, case in enumerate(CASES):
        passes = prove(case, tmp_path / str(number), reference)
        rows.append([case.written, case.read, ", ".join(map(str, case.taps)), ", ".join(passes)])
    columns = ["a head written as", "what is read", "taps, of 6 layers", "tried on"]
    lines = [columns, ["---"] * len(columns), *rows]
    assert_block("heads", "\n".join(f"| {' | '.join(line)} |" for line in lines))
