"""Requests side by side when one is refused, fails or leaves: what the others write stays theirs."""

from __future__ import annotations

import pytest
import torch

from moespec import (
    Batch,
    BudgetConfig,
    DraftContext,
    DraftTree,
    Engine,
    GenerationConfig,
    Request,
    StepTrace,
)
from tests.conftest import VOCAB, tiny_model
from tests.drafters import PlantingDrafter
from tests.moespec.batches import (
    LENGTHS,
    NEW_TOKENS,
    NUMBERS,
    Rounds,
    SteadyDrafter,
    alone,
    answers,
    planted_engine,
    prompt,
    requests,
    texts_of,
)
from tests.moespec.runs import reference_ids


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
