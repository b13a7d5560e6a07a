"""Requests side by side against transformers' own generate and against runs alone, whoever else is there."""

from __future__ import annotations

import json
import random

import pytest
import torch

from moespec import (
    EMBEDDED_TARGET,
    Batch,
    BudgetConfig,
    Control,
    DraftContext,
    DraftTree,
    Engine,
    ExpertPlan,
    GenerationConfig,
    Request,
    RouterScores,
    StepTrace,
    TreeConfig,
    TreeContext,
)
from moespec.trace_reading import read_step
from tests.conftest import VOCAB, tiny_model
from tests.drafters import PlantingDrafter
from tests.moespec.test_engine import reference_ids

NEW_TOKENS = 16
LENGTHS = (11, 3, 30, 1)  # of the prompts
NUMBERS = range(len(LENGTHS))


class SteadyDrafter(PlantingDrafter):
    """Proposes the same tree whenever it is asked the same: a budget's text depends on the trees."""

    def propose(self, context: DraftContext) -> DraftTree:
        self._rng.seed(str(context.token_ids))
        return super().propose(context)

    def fork(self) -> SteadyDrafter:
        reference, *further = self._references
        return SteadyDrafter(reference, self._vocab_size, known=self._known, further=further)


def prompt(number: int) -> torch.Tensor:
    return torch.randint(0, VOCAB, (LENGTHS[number],), generator=torch.Generator().manual_seed(10 + number))


def planted_engine(family: str) -> tuple[Engine, list[list[int]]]:
    """An engine whose drafter often knows how a prompt goes on, and how each does."""
    model = tiny_model(family)
    first, *further = (reference_ids(model, prompt(number), NEW_TOKENS) for number in NUMBERS)
    engine = Engine.from_model(tiny_model(family), drafter=SteadyDrafter(first, VOCAB, known=0.8, further=further))
    return engine, [text[length:] for text, length in zip((first, *further), LENGTHS, strict=True)]


def requests(num_tokens: int = NEW_TOKENS, **settings) -> list[Request]:
    return [Request(prompt(number), GenerationConfig(max_new_tokens=num_tokens), **settings) for number in NUMBERS]


def answers(engine: Engine, asked: list[Request], max_requests: int = 8) -> list[list[StepTrace]]:
    """The steps of each request."""
    found: list[list[StepTrace]] = [[] for _ in asked]
    for number, step in engine.generate_batch(asked, max_requests):
        found[number].append(step)
    return found


def alone(engine: Engine, asked: list[Request]) -> list[list[StepTrace]]:
    return [list(engine.generate(one.prompt, one.generation, one.budget, one.tree)) for one in asked]


def texts_of(found: list[list[StepTrace]]) -> list[list[int]]:
    return [steps[-1].summary.token_ids for steps in found]


class Rounds:
    """A batch that is driven call by call: who got what in each."""

    def __init__(self, engine: Engine, max_requests: int) -> None:
        self.batch = Batch(engine, max_requests)
        self.outcomes: dict[int, list[StepTrace | Exception]] = {}
        self._handed: list[tuple[int, StepTrace]] = []

    def join(self, number: int, request: Request) -> None:
        self.outcomes[number] = []
        self.batch.join(request, lambda outcome: self._hand(number, outcome))

    def _hand(self, number: int, outcome: StepTrace | Exception) -> None:
        self.outcomes[number].append(outcome)
        if isinstance(outcome, StepTrace) and outcome.kind != "prefill":
            self._handed.append((number, outcome))

    def step(self) -> list[tuple[int, StepTrace]]:
        """The steps of one call, the prompts' left out; the last call gives none."""
        while not self._handed and self.batch.step():
            pass
        handed, self._handed = self._handed, []
        return handed

    def rest(self) -> list[list[tuple[int, StepTrace]]]:
        return list(iter(self.step, []))


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


def test_a_prompt_that_cannot_be_used_is_refused_and_nobody_else_notices():
    engine, expected = planted_engine("olmoe")
    with pytest.raises(ValueError, match="request 1 cannot be answered: token id 999 is outside the vocabulary of 97"):
        engine.generate_batch([Request([1]), Request([999])])
    together = Rounds(engine, 8)
    together.join(0, requests()[0])
    together.step()
    with pytest.raises(ValueError, match="the prompt is empty"):
        together.join(1, Request([]))
    together.rest()
    assert together.outcomes[0][-1].summary.token_ids == expected[0]
    with pytest.raises(ValueError, match="max_requests=0 is not allowed"):
        Batch(engine, 0)


class Stumbling(SteadyDrafter):
    """Fails at the third proposal for the second prompt, at its prompt, or where it is told of its rows."""

    where = "propose"

    def fork(self) -> Stumbling:
        fork = Stumbling(self._references[0], self._vocab_size, known=self._known, further=self._references[1:])
        fork.where = self.where
        return fork

    def propose(self, context: DraftContext) -> DraftTree:
        self.is_second = context.token_ids[: LENGTHS[1]] == prompt(1).tolist()
        if self.is_second and self.where == "propose" and len(context.token_ids) > LENGTHS[1] + 2:
            raise ZeroDivisionError("while drafting")
        return super().propose(context)

    def observe(self, features_NF: torch.Tensor | None) -> None:
        if self.where == "observe" and getattr(self, "is_second", False):
            self.where = "nowhere"
            raise ZeroDivisionError("while told")


@pytest.mark.parametrize("where", ["propose", "observe"])
def test_who_fails_alone_ends_alone(where):
    engine, expected = planted_engine("qwen3_moe")
    engine = Engine.from_model(tiny_model("qwen3_moe"), drafter=Stumbling(*vars_of(engine.drafter)))
    engine.drafter.where = where
    found: dict[int, StepTrace] = {}
    with pytest.raises(ZeroDivisionError):
        for number, step in engine.generate_batch(requests()):
            found[number] = step
    assert found.pop(1).summary is None
    assert {number: step.summary.token_ids for number, step in found.items()} == {
        number: expected[number] for number in (0, 2, 3)
    }
    assert not engine.seats.any_taken
    engine.drafter.where = "nowhere"


def vars_of(drafter: PlantingDrafter) -> tuple:
    reference, *further = drafter._references
    return reference, VOCAB, 0, 0.8, further


@pytest.mark.parametrize("family", ["olmoe", "qwen3_moe"])
def test_a_failing_forward_ends_those_that_share_it(family, monkeypatch):
    engine, expected = planted_engine(family)
    asked = requests()
    asked[2] = Request(prompt(2), asked[2].generation, BudgetConfig(budget=64))  # no policy acts: one of the group
    asked[3] = Request(prompt(3), asked[3].generation, BudgetConfig(budget=5))
    together = Rounds(engine, 8)
    for number, request in enumerate(asked):
        together.join(number, request)
    together.step()
    with monkeypatch.context() as patch:
        patch.setattr(engine.target, "forward_trees", lambda *args: 1 / 0)
        together.step()
    for number in range(3):
        assert isinstance(together.outcomes[number][-1], ZeroDivisionError)
    together.rest()
    assert together.outcomes[3][-1].summary.finish_reason == "length"
    assert not engine.seats.any_taken
    assert texts_of(answers(engine, requests())) == expected


def test_a_forward_that_fails_in_its_middle_leaves_no_half_written_cache(monkeypatch):
    engine, expected = planted_engine("olmoe")
    steps = engine.generate_batch(requests())
    for _ in range(12):
        next(steps)
    last = engine.target.layers[-1].mlp
    with monkeypatch.context() as patch:
        patch.setattr(last, "forward", lambda x: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            list(steps)
    assert texts_of(answers(engine, requests())) == expected


def test_closing_half_way_and_an_interrupt_leave_the_engine_usable(monkeypatch):
    engine, expected = planted_engine("mixtral")
    steps = engine.generate_batch(requests())
    for _ in range(9):
        next(steps)
    steps.close()
    assert not engine.seats.any_taken
    steps = engine.generate_batch(requests())
    for _ in range(9):
        next(steps)

    def interrupted(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(engine.target, "forward_trees", interrupted)
        with pytest.raises(KeyboardInterrupt):
            list(steps)
    assert not engine.seats.any_taken
    assert texts_of(answers(engine, requests())) == expected


def test_a_run_alone_between_two_steps_of_a_batch_disturbs_nobody():
    engine, expected = planted_engine("qwen3_moe")
    found: dict[int, StepTrace] = {}
    for number, step in engine.generate_batch(requests()):
        found[number] = step
        if number == 2 and step.step in (1, 3):
            assert texts_of(alone(engine, requests()[:1])) == [expected[0]]
    assert [found[number].summary.token_ids for number in NUMBERS] == expected


def test_a_step_while_a_run_of_the_same_thread_is_open_is_refused():
    engine, _ = planted_engine("olmoe")
    run = engine.generate(prompt(0))
    next(run)
    with pytest.raises(RuntimeError, match="earlier generation is not finished"):
        list(engine.generate_batch(requests()))
    run.close()


def test_conversations_are_found_again_and_memory_is_reused():
    engine, _ = planted_engine("olmoe")
    first = answers(engine, requests())
    caches = {id(cache) for cache in caches_of(engine)}
    turns = [
        Request([*prompt(n).tolist(), *steps[-1].summary.token_ids, 5, 6], GenerationConfig(max_new_tokens=4))
        for n, steps in enumerate(first)
    ]
    lengths: list[int] = []
    own = engine.target.forward
    engine.target.forward = lambda ids_T, *rest, **more: lengths.append(len(ids_T)) or own(ids_T, *rest, **more)
    expected = [reference_ids(tiny_model("olmoe"), torch.tensor(turn.prompt), 4)[len(turn.prompt) :] for turn in turns]
    assert texts_of(answers(engine, turns[::-1])) == expected[::-1]
    assert lengths[: len(turns)] == [4] * len(turns), (
        "of each prompt only what is new, the last token before it, and one"
    )
    assert {id(cache) for cache in caches_of(engine)} == caches


def caches_of(engine: Engine) -> list:
    taken = [engine.seats.take([]) for _ in range(len(engine.seats))]
    for seat in taken:
        engine.seats.leave(seat)
    return [seat.conversation.cache for seat in taken]


def test_a_drafter_of_ones_own_without_a_fork_serves_one_at_a_time():
    class Lonely:
        name, tap_layers = "lonely", ()

        def __init__(self, drafter: SteadyDrafter) -> None:
            self.propose, self.observe, self.truncate = drafter.propose, drafter.observe, drafter.truncate

    engine, expected = planted_engine("olmoe")
    engine = Engine.from_model(tiny_model("olmoe"), drafter=Lonely(engine.drafter))
    found = {}
    with pytest.raises(ValueError, match=r"the drafter lonely serves one conversation at a time: it has no fork\(\)."):
        for number, step in engine.generate_batch(requests()):
            found[number] = step
    assert found[0].summary.token_ids == expected[0] and list(found) == [0]
    assert texts_of(answers(engine, requests(), max_requests=1)) == expected


def test_weights_that_change_are_followed_once_nobody_is_under_way():
    model, other = tiny_model("qwen3_moe"), tiny_model("qwen3_moe", seed=1)
    engine = Engine.from_model(model)
    together = Rounds(engine, 8)
    together.join(0, requests()[0])
    together.step()
    with torch.no_grad():
        for mine, new in zip(model.parameters(), other.parameters(), strict=True):
            mine.copy_(new)
    before = [reference_ids(tiny_model("qwen3_moe"), prompt(n), NEW_TOKENS)[LENGTHS[n] :] for n in NUMBERS]
    together.join(1, requests()[1])
    together.rest()
    assert [together.outcomes[n][-1].summary.token_ids for n in (0, 1)] == before[:2]
    after = [reference_ids(model, prompt(n), NEW_TOKENS)[LENGTHS[n] :] for n in NUMBERS]
    assert texts_of(answers(engine, requests())) == after != before
