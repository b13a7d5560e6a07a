"""Requests side by side against transformers' own generate and against runs alone, whoever else is there."""

from __future__ import annotations

import json
import random

import pytest
import torch

from moespec import (
    EMBEDDED_TARGET,
    BudgetConfig,
    Control,
    Engine,
    ExpertPlan,
    GenerationConfig,
    Request,
    RouterScores,
    TreeConfig,
    TreeContext,
)
from moespec.trace_reading import read_step
from tests.moespec.batches import (
    LENGTHS,
    NEW_TOKENS,
    NUMBERS,
    Rounds,
    alone,
    answers,
    planted_engine,
    prompt,
    requests,
    texts_of,
)


@pytest.fixture(scope="module")
def embedded():
    engine = Engine.from_pretrained(EMBEDDED_TARGET)
    yield engine
    engine.close()


@pytest.mark.parametrize("max_requests", [8, 2])  # all at once; joining when others leave
def test_greedy_requests_write_what_generate_writes(family, max_requests):
    engine, expected = planted_engine(family)
    found = answers(engine, requests(), max_requests)
    assert texts_of(found) == expected
    assert all(steps[-1].summary.lossless and steps[-1].summary.tokens_per_step > 1.5 for steps in found)
    assert len(engine.seats) == min(max_requests, len(LENGTHS))


def test_an_eagle_head_drafts_for_all_what_it_drafts_for_each_alone(embedded):
    prompts = ["Tell me a short story.", "What is 12 + 30?", "What does river mean?", "Who are you?"]
    trees = [TreeConfig(), TreeConfig(24, 3, 3, 0), TreeConfig(1), TreeConfig(16, 5, 3, 0.3)]
    generation = GenerationConfig(max_new_tokens=30)
    asked = [Request(text, generation, tree=tree) for text, tree in zip(prompts, trees, strict=True)]
    expected, found = alone(embedded, asked), answers(embedded, asked)
    for ours, theirs in zip(found, expected, strict=True):
        assert [step.text for step in ours] == [step.text for step in theirs]
        for step, other in zip(ours[1:], theirs[1:], strict=True):
            assert (step.tree.token_ids, step.tree.parents) == (other.tree.token_ids, other.tree.parents)
    assert any(len(step.tree.token_ids) > 8 for steps in found for step in steps[1:])


def test_a_seed_gives_the_same_text_whoever_is_there(embedded):
    asked = [
        Request("Tell me a short story.", GenerationConfig(40, temperature=0.9, top_p=0.9, seed=seed))
        for seed in (1, 2, 1)
    ]
    found = texts_of(answers(embedded, asked))
    assert found == texts_of(alone(embedded, asked))
    assert found[0] == found[2] != found[1]


def test_a_budget_of_all_experts_is_bit_identical(family):
    found = []
    for budget in (None, 64):
        engine, _ = planted_engine(family)
        texts = texts_of(answers(engine, requests(budget=BudgetConfig(budget=budget))))
        caches = [engine.seats.take([]).conversation.cache for _ in NUMBERS]
        assert len(engine.seats) == len(NUMBERS)
        found.append((texts, [cache.layers[-1].keys[:, :, : cache.length] for cache in caches]))
    assert found[0][0] == found[1][0]
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found[0][1], found[1][1], strict=True))


SETTINGS = [{}, {"policy": "truncation", "protect_root": True}, {"score": "natural", "row_weight": "path"}]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_a_budget_for_each_request_writes_what_it_writes_alone(family, settings):
    engine, lossless = planted_engine(family)
    budget = BudgetConfig(budget=engine.info.top_k + 1, **settings)
    expected, found = alone(engine, requests(budget=budget)), answers(engine, requests(budget=budget))
    assert texts_of(found) == texts_of(expected)
    assert texts_of(found) != lossless, "the budget acted"
    for ours, theirs in zip(found, expected, strict=True):
        for name in ("experts_natural", "experts_kept", "experts_active", "settings", "lossless"):
            assert [getattr(step, name) for step in ours] == [getattr(step, name) for step in theirs]


@pytest.mark.parametrize("policy", ["substitution", "truncation"])
@pytest.mark.parametrize("tree", [TreeConfig(), TreeConfig(1)], ids=["trees", "plain"])
def test_a_budget_for_the_batch_bounds_what_a_layer_reads_for_all(family, policy, tree):
    engine, _ = planted_engine(family)
    budget = BudgetConfig(budget=engine.info.top_k + 1, policy=policy, scope="batch")
    together = Rounds(engine, 8)
    for number, request in enumerate(requests(budget=budget, tree=tree)):
        together.join(number, request)
    num_shared = 0
    for steps in together.rest():
        for layers in zip(*(step.layers for _, step in steps), strict=True):
            active, kept = set().union(*(layer.active for layer in layers)), layers[0].kept
            assert all(layer.kept == kept for layer in layers)
            if len(steps) == 1 and len(steps[0][1].tree.token_ids) == 1:
                assert kept == layers[0].natural, "a single row is never budgeted"
                continue
            num_shared += len(steps) > 1
            score = torch.tensor([layer.score for layer in layers], dtype=torch.float64).sum(dim=0)
            outside = sorted(set(range(len(score))) - set(kept))
            assert len(kept) == budget.budget and active <= set(kept)
            assert score[kept].min() >= score[outside].max() - 0.001  # a trace has four digits
        assert all(step.settings.effective_budget for _, step in steps if len(steps) > 1)
    assert num_shared > 10


def test_what_is_read_for_several_is_counted_once(family):
    engine, _ = planted_engine(family)
    together = Rounds(engine, 8)
    for number, request in enumerate(requests()):
        together.join(number, request)
    for steps in together.rest():
        by_layer = zip(*(step.layers for _, step in steps), strict=True)
        num_read = sum(len(set().union(*(layer.active for layer in layers))) for layers in by_layer)
        read_bytes = sum(step.expert_bytes for _, step in steps)
        assert read_bytes == pytest.approx(num_read * engine.target.bytes_per_expert, abs=len(steps))
        assert all(step.expert_bytes <= sum(step.experts_active) * engine.target.bytes_per_expert for _, step in steps)
        assert len({step.verify_ms for _, step in steps}) == 1, "the forward that they share"
        assert all(read_step(json.loads(json.dumps(step.to_json()))) == step for _, step in steps)


class Planner:
    """Keeps the routers' choice, and what it was asked about."""

    def __init__(self) -> None:
        self.asked: list[tuple[list[int] | None, list[int]]] = []

    def plan(self, scores: RouterScores, context: TreeContext) -> ExpertPlan:
        assert len(scores.logits_TE) == len(context.draft_logp_T) == len(context.depths_T)
        requests_T = context.requests_T
        self.asked.append((None if requests_T is None else requests_T.tolist(), context.depths_T.tolist()))
        return ExpertPlan(scores.natural_ids_TK, scores.natural_weights_TK)


@pytest.mark.parametrize("scope", ["request", "batch"])
def test_a_policy_of_ones_own_is_asked_for_each_or_for_all(family, scope):
    engine, expected = planted_engine(family)
    planner = Planner()
    asked = requests(budget=BudgetConfig(policy=planner, scope=scope))
    assert texts_of(answers(engine, asked)) == expected
    if scope == "request":
        assert all(requests_T is None and depths.count(0) == 1 for requests_T, depths in planner.asked)
    else:
        requests_T, depths = planner.asked[0]
        starts = [requests_T.index(number) for number in NUMBERS]
        assert requests_T == sorted(requests_T) and [row for row, depth in enumerate(depths) if depth == 0] == starts


def test_a_request_whose_budget_moves_changes_its_group(monkeypatch):
    engine, _ = planted_engine("qwen3_moe")
    groups: list[int] = []
    own = engine.verifier.verify_together

    def seen(drafts, *rest):
        groups.append(len(drafts))
        return own(drafts, *rest)

    monkeypatch.setattr(engine.verifier, "verify_together", seen)
    control = Control()
    asked = requests(budget=BudgetConfig(budget=4))
    asked[1] = Request(asked[1].prompt, asked[1].generation, asked[1].budget, control=control)
    together = Rounds(engine, 8)
    for number, request in enumerate(asked):
        together.join(number, request)
    together.step()
    assert groups == [4]
    control.update(budget=BudgetConfig())
    assert dict(together.step())[1].settings.budget is None
    assert sorted(groups[1:]) == [1, 3]
    control.update(budget=BudgetConfig(budget=4))
    steps = dict(together.step())
    assert groups[3:] == [4] and all(step.settings.budget == 4 for step in steps.values())
    assert not together.outcomes[1][-1].lossless


@pytest.mark.parametrize("seed", range(5))
def test_whatever_the_schedule_a_lossless_request_writes_its_own_text(seed):
    rng = random.Random(seed)
    engine, expected = planted_engine(rng.choice(["olmoe", "qwen3_moe", "mixtral"]))
    together, running, num_joined = Rounds(engine, rng.randint(2, 4)), {}, 0
    was_budgeted, was_stopped = set(), set()
    while num_joined < 10 or running:
        if num_joined < 10 and rng.random() < 0.5:
            which, control = rng.choice(NUMBERS), Control()
            generation = GenerationConfig(max_new_tokens=rng.randint(1, NEW_TOKENS))
            budget = BudgetConfig(budget=rng.choice([None, None, 4]), scope=rng.choice(["batch", "request"]))
            running[num_joined] = which, control, generation
            was_budgeted |= set() if budget.budget is None else {num_joined}
            together.join(num_joined, Request(prompt(which), generation, budget, control=control))
            num_joined += 1
        for number, (_, control, _) in running.items():
            if rng.random() < 0.05:
                control.stop()
                was_stopped.add(number)
            elif rng.random() < 0.05:
                control.update(budget=BudgetConfig(budget=4))
                was_budgeted.add(number)
        together.step()
        for number, (which, _, generation) in list(running.items()):
            outcomes = together.outcomes[number]
            if not outcomes or outcomes[-1].summary is None:
                continue
            del running[number]
            summary = outcomes[-1].summary
            assert summary.token_ids == [token for step in outcomes for token in step.token_ids]
            if number not in was_budgeted:
                assert summary.token_ids == expected[which][: len(summary.token_ids)] and summary.lossless
            if number not in was_stopped:
                assert summary.finish_reason == "length" and len(summary.token_ids) == generation.max_new_tokens
    assert was_budgeted and len(was_budgeted) < 10
    assert not engine.seats.any_taken
    assert texts_of(answers(engine, requests())) == expected
