"""Governors against brute force and in a world whose costs and acceptance are known."""

from __future__ import annotations

import itertools
import math
import random
from functools import cache

import pytest
import torch

from moespec import BudgetConfig, DraftTree, Engine, GenerationConfig, TreeConfig
from moespec.cost_table import CostTable, DraftPoint, Spread, StepPoint
from moespec.governors import CascadeLike, Evict, Outcome, Utility, parse_governor
from moespec.policies.parsing import parse_policy
from moespec.tree import most_likely_rows
from moespec.types import ancestor_mask
from tests.conftest import VOCAB, tiny_model
from tests.drafters import PlantingDrafter

NUM_EXPERTS, TOP_K = 64, 8


def table(row_ms: float = 0.05, expert_ms: float = 0.02, level_ms: float = 0.03, fixed_ms: float = 0.5) -> CostTable:
    """Costs that are affine in rows and experts read, where T rows use 8 + 2 (T - 1) experts, at most all."""

    def point(rows: int, budget: int | None) -> StepPoint:
        natural = min(NUM_EXPERTS, TOP_K + 2 * (rows - 1))
        read = min(natural, budget or NUM_EXPERTS)
        verify = Spread(*[fixed_ms + row_ms * rows + expert_ms * read] * 3)
        kept = (read / natural) ** 0.5
        return StepPoint(rows, budget, 9, verify, Spread(0, 0, 0), verify, natural, read, kept, 0.0)

    trees = itertools.product((2, 4, 8, 16, 32, 64), (8, 12, 16, 24, 32, 48, None))
    drafts = [DraftPoint(levels, width, 9, Spread(*[level_ms * levels] * 3)) for levels in (1, 8) for width in (3, 8)]
    points = [point(1, None), *(point(rows, budget) for rows, budget in trees)]
    return CostTable.of({}, (NUM_EXPERTS, TOP_K), (10, 50), points, drafts)


def random_tree(num_rows: int, seed: int) -> DraftTree:
    """Parents before children, in no order of likelihood."""
    rng = random.Random(seed)
    parents, depths, logp = [-1], [0], [0.0]
    for row in range(1, num_rows):
        parent = rng.randrange(row)
        parents.append(parent)
        depths.append(depths[parent] + 1)
        logp.append(logp[parent] + math.log(rng.uniform(0.05, 1.0)))
    parents_T = torch.tensor(parents)
    mask_TT = ancestor_mask(parents_T, max(depths))
    tokens_T = torch.arange(100, 100 + num_rows)
    return DraftTree(tokens_T, parents_T, torch.tensor(depths), torch.tensor(logp), mask_TT)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("num_rows", [1, 2, 5, 12])
def test_the_most_likely_rows_are_a_tree_of_their_own(seed, num_rows):
    tree = random_tree(12, seed)
    cut = most_likely_rows(tree, num_rows)
    best = sorted(range(12), key=lambda row: -float(tree.draft_logp_T[row]))[:num_rows]
    assert sorted(cut.tokens_T.tolist()) == sorted(100 + row for row in best)
    for row in range(num_rows):
        whole = int(cut.tokens_T[row]) - 100
        parent = int(tree.parents_T[whole])
        above = -1 if parent < 0 else cut.tokens_T.tolist().index(100 + parent)
        assert (int(cut.parents_T[row]), int(cut.depths_T[row])) == (above, int(tree.depths_T[whole]))
        seen = {100 + other for other in range(12) if tree.mask_TT[whole, other]}
        assert {int(cut.tokens_T[other]) for other in range(num_rows) if cut.mask_TT[row, other]} == seen
    assert cut.parents_T[0] == -1 and bool((cut.parents_T[1:] < torch.arange(1, num_rows)).all())


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("costs", [{}, {"row_ms": 0.4}, {"expert_ms": 0.2}, {"row_ms": 0.0, "expert_ms": 0.0}], ids=str)
def test_evict_cuts_where_tokens_per_ms_are_the_most(costs, seed):
    tree, known = random_tree(16, seed), table(**costs)
    cut, budget = Evict(known).choose(tree, BudgetConfig(budget=24))
    path_p = sorted((math.exp(logp) for logp in tree.draft_logp_T.tolist()), reverse=True)
    depth = int(tree.depths_T[-1])
    rates = {
        rows: sum(path_p[:rows]) / (known.predict_ms(rows, 24) + known.draft_ms(depth, 3)) for rows in range(1, 17)
    }
    assert rates[cut.num_rows] == pytest.approx(max(rates.values()))
    assert budget == BudgetConfig(budget=24)


class World:
    """Steps of known cost: every drafted row is accepted with the probability that its drafter gives it.

    A tree is a chain; `p` is each row's probability given its parent. `true_p` where the drafter is wrong of itself.
    """

    def __init__(self, known: CostTable, p: float, true_p: float | None = None, slowness: float = 1.0) -> None:
        self.table, self.p, self.true_p, self.slowness = known, p, p if true_p is None else true_p, slowness
        self.rng = random.Random(0)

    def run(self, governor, num_steps: int, asked: TreeConfig, budget: BudgetConfig | None = None) -> dict[str, float]:
        """Tokens per ms, mean rows, and the shares of steps that were plain and of mass that was kept."""
        tokens = ms = rows = plain = 0.0
        masses, budget = [], budget or BudgetConfig()
        for _ in range(num_steps):
            config, used = governor.settings(asked, budget)
            depth = min(config.total_tokens - 1, config.depth)
            if config.min_path_p:
                depth = min(depth, self._num_kept(config.min_path_p))
            num_rows, draft_ms, rest_ms, mass = 1, 0.0, self.table.plain_ms, 1.0
            if depth > 0:
                cut, used = governor.choose(self._chain(depth), used)
                num_rows, mass = cut.num_rows, 1.0
                if num_rows > 1:
                    mass = self.table.mass_kept(num_rows, used.budget)
                    masses.append(mass)
                rest_ms, draft_ms = self.table.predict_ms(num_rows, used.budget), self.table.draft_ms(depth, 3)
            num_tokens = 1
            while num_tokens < num_rows and self.rng.random() < self.true_p:
                num_tokens += 1
            slow = self.slowness
            governor.observe(Outcome(range(num_tokens), num_tokens, draft_ms * slow, rest_ms * slow, mass))
            tokens, ms = tokens + num_tokens, ms + draft_ms + rest_ms
            rows, plain = rows + num_rows, plain + (num_rows == 1)
        kept = sum(masses) / len(masses) if masses else 1.0
        return {"rate": tokens / ms, "rows": rows / num_steps, "plain": plain / num_steps, "mass": kept}

    def _num_kept(self, least: float) -> int:
        """Draft tokens as likely as that, each but the first below one twice as likely."""
        kept = 0
        while self.p ** (kept + 1) >= least - 1e-9 and (kept == 0 or self.p**kept >= 2 * least - 1e-9):
            kept += 1
        return kept

    @cache  # noqa: B019  (a few trees of a few worlds)
    def _chain(self, depth: int) -> DraftTree:
        rows_T = torch.arange(depth + 1)
        mask_TT = torch.ones(depth + 1, depth + 1, dtype=torch.bool).tril()
        return DraftTree(rows_T, rows_T - 1, rows_T, rows_T * math.log(self.p), mask_TT)


class Fixed:
    """A chain of one length, verified whole."""

    def __init__(self, num_rows: int) -> None:
        self.num_rows = num_rows

    def settings(self, tree, budget):
        return TreeConfig(self.num_rows, 16, 1, 0), budget

    def choose(self, tree, budget):
        return tree, budget

    def observe(self, outcome):
        pass


ASKED = TreeConfig(16, 16, 1, 0)
WORLDS = {
    "sure": {"p": 0.9},
    "unsure": {"p": 0.5},
    "dear rows": {"p": 0.7, "row_ms": 0.4},
    "hopeless": {"p": 0.15, "row_ms": 0.6, "level_ms": 0.3},
    "boasting": {"p": 0.9, "true_p": 0.05, "row_ms": 0.3},
    "slow": {"p": 0.7, "slowness": 3.0},
}


def world(name: str) -> World:
    values = dict(WORLDS[name])
    own = {key: values.pop(key) for key in ("p", "true_p", "slowness") if key in values}
    return World(table(**values), **own)


@cache
def fixed_rate(name: str, num_rows: int) -> float:
    return world(name).run(Fixed(num_rows), 4000, ASKED)["rate"]


@pytest.mark.parametrize("name", WORLDS)
def test_utility_is_as_fast_as_the_best_fixed_length_and_never_slower_than_plain(name):
    known = world(name).table
    fixed = {rows: fixed_rate(name, rows) for rows in (1, 2, 3, 4, 6, 8, 12, 16)}
    found = world(name).run(Utility(known), 4000, ASKED)
    assert found["rate"] >= 0.95 * max(fixed.values())
    assert found["rate"] >= 0.95 / known.plain_ms


@pytest.mark.parametrize("name", ["hopeless", "boasting"])
def test_utility_pauses_where_speculation_does_not_pay(name):
    assert world(name).run(Utility(world(name).table), 4000, ASKED)["plain"] > 0.9


@pytest.mark.parametrize("floor", [0.6, 0.8, 0.95])
def test_utility_keeps_its_floor_under_the_smallest_budget_that_does(floor):
    known = table(expert_ms=0.3)
    governor = Utility(known, floor)
    found = World(known, 0.8).run(governor, 300, ASKED)
    assert floor <= found["mass"] <= floor + 0.1
    _, budget = governor.choose(World(known, 0.8)._chain(12), BudgetConfig())
    kept = {b: known.mass_kept(13, b) for b in range(TOP_K, NUM_EXPERTS)}
    assert budget.budget == min(b for b, mass in kept.items() if mass >= floor)


@pytest.mark.parametrize(("first", "then"), [("hopeless", 0.9), ("boasting", 0.8)])
def test_utility_finds_back_to_drafting_when_text_becomes_easy(first, then):
    """What was learnt of hard text must not hold for the easy text behind it."""
    hard, known = world(first), world(first).table
    governor, easy = Utility(known), World(known, then)
    hard.run(governor, 600, ASKED)
    easy.run(governor, 400, ASKED)
    found = easy.run(governor, 1000, ASKED)
    best = max(World(known, then).run(Fixed(rows), 4000, ASKED)["rate"] for rows in (1, 2, 3, 4, 6, 8, 12, 16))
    assert found["rate"] >= 0.9 * best


class Counted(Utility):
    """Counts the steps that it learns of."""

    num_learnt = 0

    def _learn_of(self, seen):
        self.num_learnt += 1
        super()._learn_of(seen)


def test_utility_learns_of_ever_fewer_steps_while_its_plan_stays_and_of_more_when_another_tree_is_asked_for():
    """In a world that is the same at every step. Looks at trees grown further are learnt of, too: one in 64."""
    governor, known = Counted(world("sure").table), world("sure")
    learnt = []
    for num_steps, asked in ((400, ASKED), (240, ASKED), (24, TreeConfig(4, 3, 1, 0))):
        before = governor.num_learnt
        known.run(governor, num_steps, asked)
        learnt.append((governor.num_learnt - before) / num_steps)
    first, settled, other = learnt
    assert 1 / 28 < settled < 1 / 12 < other
    assert first > settled


def test_utility_stays_within_the_tree_that_is_asked_for():
    governor, asked = Utility(table()), TreeConfig(8, 4, 2, 0.3)
    for _ in range(200):
        config, _ = governor.settings(asked, BudgetConfig())
        assert config.min_path_p >= 0.3 and config.total_tokens <= 8 and config.top_k <= 2 and config.depth == 4
        governor.observe(Outcome([0], 1, 0.1, 1.0, 1.0))


def test_utility_judges_nothing_while_a_root_is_asked_for():
    known = table()
    governor, easy = Utility(known), World(known, 0.9)
    easy.run(governor, 300, TreeConfig(1))
    assert easy.run(governor, 60, ASKED)["plain"] < 0.1


def test_utility_without_a_floor_leaves_the_budget_as_it_is_asked():
    _, budget = Utility(table()).choose(random_tree(12, 0), BudgetConfig(coverage=0.7))
    assert budget == BudgetConfig(coverage=0.7)


def test_utility_corrects_a_table_that_promises_too_much_mass():
    governor, known = Utility(table(), 0.8), World(table(), 0.9)
    for _ in range(300):
        _, budget = governor.settings(ASKED, BudgetConfig())
        cut, budget = governor.choose(known._chain(12), budget)
        promised = known.table.mass_kept(cut.num_rows, budget.budget)
        governor.observe(Outcome(range(3), 3, 0.0, 1.5, promised - 0.1))
    assert promised >= 0.89


@pytest.mark.parametrize("name", WORLDS)
def test_cascade_settles_on_the_length_with_the_most_utility(name):
    """Of the lengths it tries; its test phases, a fifth of all steps, cost what they cost."""
    rates = {rows: fixed_rate(name, rows) for rows in (1, 2, 4, 8, 16)}
    found = world(name).run(CascadeLike(), 8000, ASKED)
    assert found["rate"] >= 0.8 * max(rates.values())
    if max(rates, key=rates.get) == 1:
        assert found["plain"] > 0.7


@pytest.mark.parametrize("make", [lambda: Evict(table()), CascadeLike, lambda: Utility(table())])
def test_governed_runs_write_what_generate_writes(family, make):
    model = tiny_model(family)
    prompt = torch.arange(11)
    output = model.generate(prompt[None], do_sample=False, max_new_tokens=48)[0].tolist()
    engine = Engine.from_model(tiny_model(family), drafter=PlantingDrafter(output, VOCAB))
    generation = GenerationConfig(max_new_tokens=48)
    fixed = [len(step.tree.parents) for step in engine.generate(prompt, generation) if step.tree]
    steps = list(engine.generate(prompt, generation, governor=make()))
    assert steps[-1].summary.token_ids == output[11:]
    assert steps[-1].summary.lossless
    assert [len(step.tree.parents) for step in steps if step.tree] != fixed  # it did decide


def test_a_floor_makes_a_run_lossy_and_says_so():
    class Steady(Utility):
        """Whose steps all take as long, whatever else the machine does."""

        def observe(self, outcome):
            super().observe(outcome._replace(draft_ms=0.0, rest_ms=1.0))

    model = tiny_model("olmoe")
    output = model.generate(torch.arange(11)[None], do_sample=False, max_new_tokens=24)[0].tolist()
    engine = Engine.from_model(tiny_model("olmoe"), drafter=PlantingDrafter(output, VOCAB))
    steps = list(engine.generate([*range(11)], GenerationConfig(max_new_tokens=24), governor=Steady(table(), 0.3)))
    assert any(step.settings.effective_budget and step.mass_kept < 1 for step in steps)
    assert not steps[-1].summary.lossless


@pytest.mark.parametrize("text", ["evict", "cascade-like", "utility", "utility:floor=0.9"])
def test_governors_go_by_their_names(text):
    assert parse_governor(text, table).name == text


def test_fixed_settings_are_no_governor():
    assert parse_governor("fixed", lambda: pytest.fail("nothing is measured for it")) is None


@pytest.mark.parametrize("text", ["", "fast", "evict:floor=1", "utility:floor=", "utility:floor=x", "utility:floor=2"])
def test_what_is_no_governor_is_refused(text):
    with pytest.raises(ValueError, match=r"is not known|is not a number|is not allowed"):
        parse_governor(text, table)


def test_a_floor_is_refused_with_a_policy_that_has_no_budget():
    with pytest.raises(ValueError, match="use substitution or truncation with it"):
        Utility(table(), 0.8).settings(TreeConfig(), parse_policy("top-s:s=2"))
    Utility(table()).settings(TreeConfig(), parse_policy("top-s:s=2"))  # without one it leaves the policy alone
