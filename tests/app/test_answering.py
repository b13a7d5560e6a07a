"""What a visitor of the chat is told before, while and after their answer is written, by frames, without a browser."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from app.controls import values_of
from app.live import notice
from app.messages import plain
from app.recordings import Recordings
from app.service import Service
from app.settings import Settings
from app.stepping import MAX_TOGETHER
from app.tabs.answering import Answering


@pytest.fixture(scope="module")
def service():
    return Service()


def said(prompt: str) -> list[dict]:
    return [{"role": "user", "content": prompt}]


def test_who_comes_when_enough_are_written_is_told_to_wait(service):
    names, recordings = [f"visitor {n}" for n in range(MAX_TOGETHER + 1)], Recordings()
    answering, held = Answering(service, recordings, {}), json.dumps(values_of(Settings()))
    told = [answering.join(name, "", [], held)[1] for name in names]
    assert [one["message"] for one in told[:-1]] == ["Reading the prompt…"] * MAX_TOGETHER
    assert all(recordings.is_promised(one["run"]) for one in told[:-1])
    assert told[-1] == notice("waiting", "4 answers are written at a time, and 4 came first. Yours comes after.")
    assert service.queue.num_beside("visitor 0") == 0, "none has begun"
    for name in names:
        service.queue.leave(name)


def test_a_browser_that_lags_behind_its_answer_loses_nothing_of_the_conversation(service):
    """What it shows is older than what is written, before the first word, in the middle and after the end."""
    recordings, request = Recordings(), SimpleNamespace(session_hash="visitor")
    answering, held = (
        Answering(service, recordings, {}),
        json.dumps(values_of(Settings(max_new_tokens=60, ignore_eos=True))),
    )
    question = said("What is 12 + 30?")
    ticket, _ = answering.join("visitor", "", question, held)
    assert plain(answering.view("visitor", [], markdown=True)) == question
    frames = answering.answer(request, ticket)
    next(frames)
    _, written = plain(answering.view("visitor", question, markdown=False))
    *_, last = frames
    whole = plain(last[0])
    assert whole[:-1] == question and whole[-1]["content"].startswith(written["content"]) and written["content"]
    behind = [*question, whole[-1] | {"content": whole[-1]["content"][:5]}]
    assert answering.caught_up("visitor", behind) == plain(answering.view("visitor", behind, markdown=False)) == whole
    for other in ([], question, [*said("Hi"), behind[-1]], [*question, behind[-1] | {"content": "No."}]):
        assert answering.caught_up("visitor", other) == other
    assert answering.caught_up("another", behind) == behind
