"""Visitors side by side: each gets the answer it would get alone, and what one does or suffers touches no other."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest

from app.main import _join_queue
from app.service import MAX_TOGETHER, Service
from moespec import BudgetConfig, GenerationConfig, StepTrace, TreeConfig

PROMPTS = ["Tell me a short story.", "What is 12 + 30?", "Who are you?", "What does river mean?"]
GENERATION = GenerationConfig(max_new_tokens=40, ignore_eos=True)


@pytest.fixture(scope="module")
def service():
    return Service()


class Visit(threading.Thread):
    """A visitor's answer, read by a thread of its own."""

    def __init__(
        self,
        service: Service,
        name: str,
        prompt: str,
        budget: BudgetConfig | None = None,
        generation: GenerationConfig = GENERATION,
    ) -> None:
        super().__init__(name=name, daemon=True)
        messages = [{"role": "user", "content": prompt}]
        self.place = service.enter(name)
        self._frames = service.stream(
            name, self.place.ticket, messages, generation, budget or BudgetConfig(12), TreeConfig()
        )
        self.steps: list[StepTrace] = []
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            for frame in self._frames:
                self.steps += frame
        except BaseException as error:
            self.error = error

    def wait_for(self, num_steps: int) -> None:
        began = time.monotonic()
        while len(self.steps) < num_steps and self.is_alive():
            assert time.monotonic() - began < 60
            time.sleep(0.005)


def begin(service: Service, visits: list[Visit]) -> None:
    """All at once: the engine is held until everybody has asked."""
    with service.engine.turn():
        for visit in visits:
            visit.start()
        while len(service._batch._waiting) < len(visits):
            time.sleep(0.005)


def finish(visits: list[Visit]) -> None:
    for visit in visits:
        visit.join(timeout=120)
        assert not visit.is_alive()


def alone(service: Service, prompt: str, budget: BudgetConfig, generation: GenerationConfig = GENERATION) -> str:
    *_, last = service.engine.generate([{"role": "user", "content": prompt}], generation, budget, TreeConfig())
    return last.summary.text


def test_visitors_share_steps_and_get_what_they_would_get_alone(service, monkeypatch):
    budgets = [BudgetConfig(12), BudgetConfig(12), BudgetConfig(), BudgetConfig(12)]
    expected = [alone(service, prompt, budget) for prompt, budget in zip(PROMPTS, budgets, strict=True)]
    sizes: list[int] = []
    verifier = service.engine.verifier
    own = verifier.verify_together

    def seen(drafts: list, *rest: Any) -> list:
        sizes.append(len(drafts))
        return own(drafts, *rest)

    monkeypatch.setattr(verifier, "verify_together", seen)
    visits = [Visit(service, f"visitor {n}", *asked) for n, asked in enumerate(zip(PROMPTS, budgets, strict=True))]
    begin(service, visits)
    finish(visits)
    assert ["".join(step.text for step in visit.steps) for visit in visits] == expected
    assert [visit.steps[-1].summary.text for visit in visits] == expected
    assert max(sizes) == 3, "those with the same budget"
    assert service._places == {}


def test_a_visitor_who_stops_goes_or_moves_a_budget_disturbs_no_other(service):
    long = GenerationConfig(max_new_tokens=1500, ignore_eos=True)
    expected = alone(service, PROMPTS[0], BudgetConfig(12))
    patient = Visit(service, "patient", PROMPTS[0])
    stopper, mover = (Visit(service, name, PROMPTS[3], BudgetConfig(12), long) for name in ("stopper", "mover"))
    leaver = Visit(service, "leaver", PROMPTS[2], BudgetConfig(12), long)
    visits = [patient, stopper, mover, leaver]
    begin(service, visits)
    mover.wait_for(2)
    service.update("mover", BudgetConfig(20), TreeConfig())
    service.stop("stopper")
    service.leave("leaver")
    for _ in range(1000):
        if mover.steps[-1].settings.budget == 20:
            break
        time.sleep(0.01)
    service.stop("mover")
    finish(visits)
    assert "".join(step.text for step in patient.steps) == expected
    assert {step.settings.budget for step in patient.steps} == {12}
    assert {step.settings.budget for step in mover.steps} == {12, 20}
    assert [visit.steps[-1].summary.finish_reason for visit in (stopper, mover, leaver)] == ["stopped"] * 3


def test_a_prompt_that_cannot_be_answered_is_its_visitors_alone(service):
    good, bad = Visit(service, "good", PROMPTS[1]), Visit(service, "bad", "word " * 9000)
    good.start()
    bad.start()
    finish([good, bad])
    assert isinstance(bad.error, ValueError) and "context is 4096" in str(bad.error)
    assert good.error is None and good.steps[-1].summary is not None


def test_a_failing_step_is_told_to_those_it_was_for_and_the_next_are_served(service, monkeypatch):
    visits = [Visit(service, f"visitor {n}", prompt) for n, prompt in enumerate(PROMPTS[:2])]
    with monkeypatch.context() as patch:
        patch.setattr(service.engine.target, "forward_trees", lambda *args: 1 / 0)
        begin(service, visits)
        finish(visits)
    assert all(isinstance(visit.error, ZeroDivisionError) for visit in visits)
    expected = alone(service, PROMPTS[1], BudgetConfig(12))
    again = Visit(service, "again", PROMPTS[1])
    again.start()
    finish([again])
    assert "".join(step.text for step in again.steps) == expected


def test_who_comes_when_enough_are_written_is_told_to_wait(service):
    requests: list[Any] = [SimpleNamespace(session_hash=f"visitor {n}") for n in range(MAX_TOGETHER + 1)]
    told = [_join_queue(service, request)[1]["message"] for request in requests]
    assert told[:-1] == ["Reading the prompt…"] * MAX_TOGETHER
    assert told[-1] == "4 answers are written at a time, and 4 came first. Yours comes after."
    assert service.num_beside("visitor 0") == 0, "none has begun"
    for request in requests:
        service.leave(request.session_hash)
