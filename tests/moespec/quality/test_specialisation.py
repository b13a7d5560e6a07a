"""Expert specialisation: definitions on hand-made tensors, measurement against fp64 passes over single sequences."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from itertools import pairwise

import pytest
import torch

from moespec import DraftContext, Engine, GenerationConfig, TreeConfig
from moespec.drafters.eagle3 import Eagle3Drafter
from moespec.drafters.ngram import NgramDrafter
from moespec.kv_cache import TreeCache
from moespec.quality.specialisation import (
    experts_for_share,
    independent_union,
    measure,
    overlap,
    share_of_top,
    tree_positions,
    usage_entropy,
)
from moespec.quality.trials import Text
from moespec.step_router import NaturalRouter
from tests.conftest import VOCAB, tiny_model
from tests.moespec.test_eagle3 import tiny_head

NUM_LAYERS, NUM_EXPERTS, TOP_K = 3, 12, 3  # of the tiny OLMoE
SIZES = (1, 2, 4, 8, 16, 32, 64)
CHECKED_SIZES = (1, 4, 64)
NUM_POSITIONS = 2


def quiet(line: str) -> None:
    pass


def tiny_drafter(sharpness: float) -> Eagle3Drafter:
    """A random head; its logits times `sharpness`: 0 is unsure of everything, a large one is sure."""
    shape = {"hidden_size": 32, "target_hidden_size": 32, "vocab_size": VOCAB, "draft_vocab_size": VOCAB}
    head = tiny_head(**shape, tap_layers=(0, 1, 2))
    head.lm_head.weight *= sharpness
    return Eagle3Drafter(head, max_context=512)


def tiny_engine(sharpness: float = 4.0) -> Engine:
    return Engine.from_model(tiny_model("olmoe"), drafter=tiny_drafter(sharpness))


def random_texts() -> list[Text]:
    generator = torch.Generator().manual_seed(3)
    sizes = {"first": ("b", 9), "second": ("a", 12), "third": ("b", 3)}
    return [
        Text(name, group, torch.randint(0, VOCAB, (size,), generator=generator).tolist())
        for name, (group, size) in sizes.items()
    ]


class Router64:
    """Router probabilities in double precision, from transformers' own forward of a fresh model."""

    def __init__(self) -> None:
        self._model = tiny_model("olmoe").double()
        self._model.set_experts_implementation("batched_mm")  # grouped products know no double precision
        self._seen: list[torch.Tensor] = []
        for layer in self._model.model.layers:
            layer.mlp.gate.register_forward_hook(lambda module, args, output: self._seen.append(output[0]))

    def rows(self, sequences: list[list[int]]) -> list[list[list[list[float]]]]:
        """[sequence][row][layer][expert] of sequences of one length, none of which sees another."""
        self._seen.clear()
        with torch.inference_mode():
            self._model(torch.tensor(sequences))
        probs_LTE = torch.stack([logits_TE.double().softmax(-1) for logits_TE in self._seen])
        return probs_LTE.transpose(0, 1).unflatten(0, (len(sequences), -1)).tolist()


def chosen(probs: list[float]) -> list[int]:
    return sorted(range(len(probs)), key=lambda expert: -probs[expert])[:TOP_K]


def use_of(rows: list[list[list[float]]]) -> list[tuple[list[float], list[float], set[int]]]:
    """Per layer: natural weight per expert (OLMoE does not renormalise), probability per expert, experts chosen."""
    found = []
    for layer in range(NUM_LAYERS):
        weight, mass, union = [0.0] * NUM_EXPERTS, [0.0] * NUM_EXPERTS, set()
        for row in rows:
            for expert, p in enumerate(row[layer]):
                mass[expert] += p
            for expert in chosen(row[layer]):
                weight[expert] += row[layer][expert]
                union.add(expert)
        found.append((weight, mass, union))
    return found


def entropy_of(weight: list[float]) -> float:
    shares = [w / sum(weight) for w in weight if w]
    return -sum(p * math.log(p) for p in shares) / math.log(len(weight))


def fewest_for(mass: list[float], share: float) -> int:
    held, wanted = 0.0, share * sum(mass)
    for count, value in enumerate(sorted(mass, reverse=True), start=1):
        held += value
        if held >= wanted:
            return count
    raise AssertionError("all experts hold all mass")


def held_by_top(weight: list[float], count: int) -> float:
    return sum(sorted(weight, reverse=True)[:count]) / sum(weight)


def tree_rows(router: Router64, drafter_engine: Engine, text: Text, root: int, config: TreeConfig):
    """Every row of the tree drafted at `root` as the last token of a sequence of its own, after a fresh read."""
    target, drafter = drafter_engine.target, drafter_engine.drafter
    token_ids = text.token_ids[: root + 1]
    with torch.inference_mode(), target.stepping(NaturalRouter(root)):
        cache = TreeCache(NUM_LAYERS)
        target.forward(torch.tensor(token_ids[:root]), torch.arange(root), None, cache, keep=1)
        drafter.truncate(0)
        drafter.observe(target.features())
        tree = drafter.propose(DraftContext(token_ids, config))
    paths = [token_ids]
    for row in range(1, tree.num_rows):
        paths.append([*paths[int(tree.parents_T[row])], int(tree.tokens_T[row])])
    levels = [[path for path in paths if len(path) == length] for length in sorted(set(map(len, paths)))]
    return [rows[-1] for level in levels for rows in router.rows(level)]


def roots_of(text: Text) -> list[int]:
    """The middles of as many equal parts of what lies between the first and the last token, each once."""
    inner = range(1, len(text.token_ids) - 1)
    return sorted({inner[int((n + 0.5) / NUM_POSITIONS * len(inner))] for n in range(NUM_POSITIONS)})


@pytest.fixture(scope="module")
def engine():
    attached = tiny_engine()
    yield attached
    attached.close()


@pytest.fixture(scope="module")
def measured(engine):
    return measure(engine, random_texts(), NUM_POSITIONS, quiet)


@pytest.fixture(scope="module")
def router():
    return Router64()


@pytest.fixture(scope="module")
def trees(router):
    """By tree asked for, the (group, rows) of every tree."""
    engine = tiny_engine()
    configs = {size: TreeConfig(total_tokens=size, depth=6, top_k=6, min_path_p=0) for size in CHECKED_SIZES}
    configs["default"] = TreeConfig()
    found = {
        name: [
            (text.group, tree_rows(router, engine, text, root, config))
            for text in random_texts()
            for root in roots_of(text)
        ]
        for name, config in configs.items()
    }
    engine.close()
    return found


def test_entropy_is_one_for_even_use_and_zero_for_one_expert():
    usage_LE = torch.tensor([[5.0, 5, 5, 5], [0, 3, 0, 0], [2, 0, 2, 0]], dtype=torch.float64)
    assert usage_entropy(usage_LE).tolist() == pytest.approx([1, 0, 0.5])


def test_overlap_is_one_with_itself_whatever_the_scale_and_zero_without_a_common_expert():
    p_LE = torch.tensor([[1.0, 1, 0, 0], [1, 1, 0, 0], [3, 1, 0, 0]])
    q_LE = torch.tensor([[7.0, 7, 0, 0], [0, 0, 2, 1], [0, 1, 1, 2]])
    assert overlap(p_LE, q_LE).tolist() == pytest.approx([1, 0, 0.25])
    assert overlap(q_LE, p_LE).tolist() == pytest.approx([1, 0, 0.25])


def test_shares_of_the_top_and_the_fewest_for_a_share():
    mass_LE = torch.tensor([[1.0, 5, 2, 2], [1, 1, 1, 1]], dtype=torch.float64)
    assert share_of_top(mass_LE, 1).tolist() == pytest.approx([0.5, 0.25])
    assert share_of_top(mass_LE, 3).tolist() == pytest.approx([0.9, 0.75])
    assert share_of_top(mass_LE, 4).tolist() == pytest.approx([1, 1])
    assert experts_for_share(mass_LE, 0.8).tolist() == [3, 4]
    assert experts_for_share(mass_LE, 0.5 - 1e-9).tolist() == [1, 2]


def test_the_independent_union_is_what_random_rows_use_on_average():
    generator = torch.Generator().manual_seed(0)
    noise_NTE = torch.rand(4000, 5, NUM_EXPERTS, generator=generator)
    ids_NTK = noise_NTE.topk(TOP_K, dim=-1).indices
    unions = torch.zeros(4000, NUM_EXPERTS).scatter_(1, ids_NTK.flatten(1), 1.0).sum(dim=1)
    error = float(unions.std()) / math.sqrt(4000)
    assert independent_union(NUM_EXPERTS, TOP_K, 5) == pytest.approx(float(unions.mean()), abs=4 * error)
    assert independent_union(NUM_EXPERTS, TOP_K, 1) == pytest.approx(TOP_K)


@pytest.mark.parametrize(("num_tokens", "num_positions"), [(3, 1), (3, 9), (10, 4), (200, 4), (7, 5)])
def test_positions_have_a_token_on_either_side_and_are_spread_evenly(num_tokens, num_positions):
    roots = tree_positions(num_tokens, num_positions)
    assert len(roots) == min(num_positions, num_tokens - 2)
    assert roots[0] >= 1 and roots[-1] <= num_tokens - 2
    gaps = [later - earlier for earlier, later in pairwise(roots)]
    assert not gaps or max(gaps) - min(gaps) <= 1
    assert abs((roots[0] - 1) - (num_tokens - 2 - roots[-1])) <= 1, "as much is left out before as behind"


def test_domains_are_used_as_single_sequences_in_double_precision_say(measured, router):
    texts = random_texts()
    assert [(d.domain, d.num_texts, d.num_tokens) for d in measured.domains] == [("b", 2, 12), ("a", 1, 12)]
    by_domain = {
        figures: use_of(
            [row for text in texts if wanted in (text.group, None) for row in router.rows([text.token_ids])[0]]
        )
        for figures, wanted in (("b", "b"), ("a", "a"), ("all", None))
    }
    for figures in (*measured.domains, measured.everything):
        use = by_domain[figures.domain]
        assert figures.entropy_L == pytest.approx([entropy_of(weight) for weight, _, _ in use], abs=1e-5)
        assert figures.num_dead_L == [NUM_EXPERTS - len(union) for _, _, union in use]
    assert any(measured.domains[1].num_dead_L), "12 tokens leave some expert out, or dead ones are not tested"
    for layer, matrix in enumerate(measured.overlap_LDD):
        b, a = ([w / sum(by_domain[d][layer][0]) for w in by_domain[d][layer][0]] for d in "ba")
        common = sum(map(min, b, a))
        assert matrix[0] == pytest.approx([1, common], abs=1e-5) and matrix[1] == pytest.approx([common, 1], abs=1e-5)


def test_unions_are_those_of_trees_drafted_after_a_fresh_read(measured, trees):
    assert [figures.rows_asked for figures in measured.unions] == list(SIZES)
    for figures in measured.unions:
        expected = NUM_EXPERTS * (1 - (1 - TOP_K / NUM_EXPERTS) ** figures.rows_asked)
        assert figures.rows_drafted == figures.rows_asked and figures.independent == pytest.approx(expected)
        if figures.rows_asked not in CHECKED_SIZES:
            continue
        rows = [rows for _, rows in trees[figures.rows_asked]]
        assert [len(tree) for tree in rows] == [figures.rows_asked] * len(rows)
        unions = [[len(union) for _, _, union in use_of(tree)] for tree in rows]
        assert figures.union_L == pytest.approx([statistics.mean(layer) for layer in zip(*unions, strict=True)])
    assert measured.unions[0].union_L == [TOP_K] * NUM_LAYERS


def test_default_trees_hold_their_mass_as_counted_by_hand(measured, trees):
    budgeted = [(group, use_of(rows)) for group, rows in trees["default"] if len(rows) > 1]
    num_trees = Counter(group for group, _ in budgeted)
    assert set(num_trees) == {"a", "b"}, "without trees this test shows nothing"
    assert measured.num_root_only == len(trees["default"]) - len(budgeted)
    for figures in (*measured.domains, measured.everything):
        mine = [use for group, use in budgeted if figures.domain in (group, "all")]
        assert figures.num_trees == len(mine)
        expected = [statistics.mean(fewest_for(use[layer][1], 0.9) for use in mine) for layer in range(NUM_LAYERS)]
        assert figures.experts_for_mass_L == pytest.approx(expected)
    # An eighth and three sixteenths of 12 experts are fewer than the top 3.
    assert [top.num_experts for top in measured.tops] == [3, 4, 6, 9]
    for top in measured.tops:
        for place, found in enumerate((top.natural_weight_L, top.router_mass_L)):
            expected = [
                statistics.mean(held_by_top(use[layer][place], top.num_experts) for _, use in budgeted)
                for layer in range(NUM_LAYERS)
            ]
            assert found == pytest.approx(expected, abs=1e-5)


def test_a_drafter_that_is_never_sure_leaves_no_figures_of_default_trees():
    engine = tiny_engine(sharpness=0.0)
    found = measure(engine, random_texts()[:2], 1, quiet)
    assert found.num_root_only == 2 and found.tops == []
    assert all(figures.experts_for_mass_L is None for figures in (*found.domains, found.everything))
    assert [figures.rows_drafted for figures in found.unions] == list(SIZES), "these trees are not pruned"
    engine.close()


def test_the_engine_writes_on_as_if_nothing_had_been_measured(engine, measured):
    untouched = tiny_engine()
    written = []
    for writer in (engine, untouched):
        *_, last = writer.generate(random_texts()[1].token_ids, GenerationConfig(max_new_tokens=12))
        written.append(last.summary.token_ids)
    assert written[0] == written[1]
    untouched.close()


@pytest.mark.parametrize("drafter", [None, NgramDrafter()])
def test_without_trees_there_is_one_sentence(drafter):
    engine = Engine.from_model(tiny_model("olmoe"), drafter=drafter)
    with pytest.raises(ValueError, match="drafts no trees") as refusal:
        measure(engine, random_texts(), NUM_POSITIONS, quiet)
    assert "\n" not in str(refusal.value)
    engine.close()


@pytest.mark.parametrize(
    ("texts", "num_positions", "sentence"),
    [
        ([], 2, "positions=2 in 0 texts"),
        (random_texts(), 0, "positions=0 in 3 texts"),
        ([Text("short", "a", [1, 2])], 2, "text short has 2 tokens: trees are drafted in 3 to 504"),
        ([Text("long", "a", [1] * 505)], 2, "text long has 505 tokens"),
    ],
)
def test_what_cannot_be_measured_is_refused(engine, texts, num_positions, sentence):
    with pytest.raises(ValueError, match=sentence):
        measure(engine, texts, num_positions, quiet)
