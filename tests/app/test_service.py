"""Visitors side by side: each gets the answer it would get alone, and what one does or suffers touches no other."""

from __future__ import annotations

import itertools
import threading
import time
from dataclasses import replace
from typing import Any

import pytest

from app.places import Series
from app.service import Service
from app.settings import Settings
from app.stepping import FRAME_S
from moespec import StepTrace

PROMPTS = ["Tell me a short story.", "What is 12 + 30?", "Who are you?", "What does river mean?"]
SETTINGS = Settings(max_new_tokens=40, ignore_eos=True)
LONG = replace(SETTINGS, max_new_tokens=1500)


@pytest.fixture(scope="module")
def service():
    return Service()


def said(prompt: str) -> list[dict]:
    return [{"role": "user", "content": prompt}]


class Visit(threading.Thread):
    """A visitor's answer, read by a thread of its own."""

    def __init__(self, service: Service, name: str, prompt: str, settings: Settings = SETTINGS) -> None:
        super().__init__(name=name, daemon=True)
        self.place = service.queue.enter(name)
        self._frames = service.stream(name, self.place.ticket, said(prompt), settings)
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
        while len(service._serving.batch._waiting) < len(visits):
            time.sleep(0.005)


def finish(visits: list[Visit]) -> None:
    for visit in visits:
        visit.join(timeout=120)
        assert not visit.is_alive()


def alone(service: Service, prompt: str, settings: Settings = SETTINGS) -> str:
    asked = settings.generation_config, settings.budget_config, settings.tree_config
    *_, last = service.engine.generate(said(prompt), *asked)
    return last.summary.text


def test_visitors_share_steps_and_get_what_they_would_get_alone(service, monkeypatch):
    asked = [SETTINGS, SETTINGS, replace(SETTINGS, budget=None), SETTINGS]
    expected = [alone(service, *pair) for pair in zip(PROMPTS, asked, strict=True)]
    sizes: list[int] = []
    verifier = service.engine.verifier
    own = verifier.verify_together

    def seen(drafts: list, *rest: Any) -> list:
        sizes.append(len(drafts))
        return own(drafts, *rest)

    monkeypatch.setattr(verifier, "verify_together", seen)
    visits = [Visit(service, f"visitor {n}", *pair) for n, pair in enumerate(zip(PROMPTS, asked, strict=True))]
    begin(service, visits)
    finish(visits)
    assert ["".join(step.text for step in visit.steps) for visit in visits] == expected
    assert [visit.steps[-1].summary.text for visit in visits] == expected
    assert max(sizes) == 3, "those with the same budget"
    assert service.queue.places == {}


def test_a_visitor_who_stops_goes_or_moves_a_budget_disturbs_no_other(service):
    expected = alone(service, PROMPTS[0])
    patient = Visit(service, "patient", PROMPTS[0])
    stopper, mover = (Visit(service, name, PROMPTS[3], LONG) for name in ("stopper", "mover"))
    leaver = Visit(service, "leaver", PROMPTS[2], LONG)
    visits = [patient, stopper, mover, leaver]
    begin(service, visits)
    mover.wait_for(2)
    service.update("mover", replace(LONG, budget=20))
    service.queue.stop("stopper")
    service.queue.leave("leaver")
    for _ in range(1000):
        if mover.steps[-1].settings.budget == 20:
            break
        time.sleep(0.01)
    service.queue.stop("mover")
    finish(visits)
    assert "".join(step.text for step in patient.steps) == expected
    assert {step.settings.budget for step in patient.steps} == {16}
    assert {step.settings.budget for step in mover.steps} == {16, 20}
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
    expected = alone(service, PROMPTS[1])
    again = Visit(service, "again", PROMPTS[1])
    again.start()
    finish([again])
    assert "".join(step.text for step in again.steps) == expected


def test_one_answer_per_visitor_and_leaving_frees_the_place(service):
    places = [service.queue.enter(name) for name in ("first", "second")]
    assert [place.num_before for place in places] == [0, 1]
    with pytest.raises(ValueError, match="still being written"):
        service.queue.enter("first")
    service.queue.leave("second")
    rest = said("Hi"), replace(LONG, budget=None)
    steps = service.stream("first", places[0].ticket, *rest)
    next(steps)
    service.queue.stop("first")
    assert list(steps)[-1][-1].summary.finish_reason == "stopped"
    again = service.queue.enter("first")
    assert again.num_before == 0
    assert list(service.stream("first", places[0].ticket, *rest)) == [], "an answer that was taken back"
    assert service.queue.expects("first", again.ticket), "and the one asked for since keeps its place"
    service.queue.leave("first")
    assert list(service.stream("first", again.ticket, *rest)) == []


def test_a_place_is_its_tickets_alone_and_stop_gives_up_one_that_waits(service):
    first = service.queue.enter("first")
    assert service.queue.expects("first", first.ticket)
    service.queue.stop("first")  # its answer has not begun
    assert not service.queue.expects("first", first.ticket)
    again = service.queue.enter("first")
    assert not service.queue.expects("first", first.ticket) and service.queue.expects("first", again.ticket)
    service.queue.leave("first", first.ticket)  # late news of the answer before
    assert service.queue.expects("first", again.ticket)
    service.queue.leave("first")
    for number in range(service.limits.num_places):
        service.queue.enter(f"visitor {number}")
    with pytest.raises(ValueError, match="are waiting already"):
        service.queue.enter("one too many")
    for number in range(service.limits.num_places):
        service.queue.leave(f"visitor {number}")


def test_old_turns_are_dropped_and_a_message_too_long_is_refused(service):
    turn = [*said("word " * 900), {"role": "assistant", "content": "Yes."}]
    (last,) = said("What is 2 + 2?")
    settings = Settings(max_new_tokens=64)
    kept = service.fit([*turn * 8, last], settings)
    assert kept[-1] == last and kept[0]["role"] == "user" and len(kept) < 17
    assert len(service.engine.encode(kept)) + 64 <= service.info.max_context
    briefed = service.fit([*turn * 8, last], replace(settings, system="word " * 700))
    assert len(briefed) < len(kept), "a system prompt takes room and stays"
    with pytest.raises(ValueError, match="context"):
        service.fit(said("word " * 9000), settings)
    unanswered = said("word " * 3000)  # stopped before its answer began
    assert service.fit([*unanswered, last], replace(settings, max_new_tokens=1500)) == [last]


def test_a_system_prompt_is_what_the_model_reads_first(service):
    briefed = replace(SETTINGS, system="Answer in French.", budget=None)
    visit = Visit(service, "briefed", PROMPTS[1], briefed)
    visit.start()
    finish([visit])
    messages = [{"role": "system", "content": "Answer in French."}, *said(PROMPTS[1])]
    assert visit.steps[-1].summary.prompt_token_ids == service.engine.encode(messages)
    assert service.header(said(PROMPTS[1]), briefed).prompt == messages


def test_a_model_that_cannot_be_loaded_is_one_sentence(tmp_path):
    with pytest.raises(ValueError, match=str(tmp_path)):
        _ = Service(tmp_path).engine


def test_no_step_is_made_while_the_machine_is_measured(service, monkeypatch):
    seen: list[bool] = []
    monkeypatch.setattr(service, "_advice", {})
    monkeypatch.setattr("moespec.advise.advise", lambda target: seen.append(service.engine._lock.locked()))
    service.advise()
    assert seen == [True]


def test_settings_the_model_cannot_be_asked_with_are_refused(service):
    service.queue.enter("visitor")
    with pytest.raises(ValueError, match="outside 8 to 64"):
        service.update("visitor", Settings(budget=7))
    with pytest.raises(ValueError, match="outside 8 to 64"):
        service.check(Settings(budget=65))
    service.queue.leave("visitor")
    place = service.queue.enter("visitor")
    with pytest.raises(ValueError, match="outside 8 to 64"):
        next(service.stream("visitor", place.ticket, said("Hi"), Settings(budget=65)))
    assert not service.queue.expects("visitor", place.ticket)


def test_a_governor_decides_the_trees_and_the_text_stays_the_models_own(service):
    governed = Visit(service, "governed", PROMPTS[0], replace(SETTINGS, budget=None, governor="cascade-like"))
    governed.start()
    finish([governed])
    assert governed.error is None
    expected = alone(service, PROMPTS[0], replace(SETTINGS, budget=None))
    assert "".join(step.text for step in governed.steps) == expected
    assert len({tuple(step.settings.tree) for step in governed.steps}) > 1


def test_nobodys_controls_and_stops_touch_an_answer_of_a_series(service):
    series = Series()
    place = service.queue.enter("visitor", series=series)
    frames = service.stream("visitor", place.ticket, said(PROMPTS[3]), LONG)
    next(frames)
    service.update("visitor", replace(LONG, budget=40))
    service.queue.stop("visitor")
    steps = [step for _ in range(3) for step in next(frames)]
    assert {step.settings.budget for step in steps} == {16} and steps[-1].summary is None
    service.queue.stop("visitor", series)
    assert list(frames)[-1][-1].summary.finish_reason == "stopped"


def test_steps_are_told_as_they_are_made_and_come_twenty_times_a_second(service):
    """Who reads is woken that often, however quick steps are, and misses none."""
    told: list[StepTrace] = []
    place = service.queue.enter("visitor")
    settings = replace(SETTINGS, max_new_tokens=200)
    frames, came_s = [], []
    for frame in service.stream("visitor", place.ticket, said(PROMPTS[3]), settings, tell=told.append):
        assert told[-1].step >= frame[-1].step, "nobody reads what was not told"
        frames.append(frame)
        came_s.append(time.monotonic())
    assert [step for frame in frames for step in frame] == told and told[-1].summary is not None
    *between, _ = [later - earlier for earlier, later in itertools.pairwise(came_s)]  # the end comes at once
    assert min(between) > 0.9 * FRAME_S
