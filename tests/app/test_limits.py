"""What one visitor may ask for: where it is read from, who counts as one visitor, and what the refused are told."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from app.limits import Limits, TooManyError, Visits
from app.places import Series
from app.queue import UNUSED_S
from app.service import Service
from app.settings import Settings

SPACE = {"SPACE_ID": "someone/studio"}


def test_limits_come_from_the_environment_and_requests_are_limited_in_a_space_alone():
    assert Limits.from_environment({}) == Limits() == Limits(2048, None, 12, False)
    in_space = Limits.from_environment(SPACE)
    assert (in_space.requests_per_minute, in_space.is_behind_proxy) == (30, True)
    named = {"MOESPEC_MAX_TOKENS": "100", "MOESPEC_REQUESTS_PER_MINUTE": " 5 ", "MOESPEC_PLACES": "3"}
    assert Limits.from_environment(named) == Limits(100, 5, 3, False)
    assert Limits.from_environment(SPACE | {"MOESPEC_REQUESTS_PER_MINUTE": "None"}).requests_per_minute is None
    assert Limits.from_environment({"MOESPEC_PLACES": ""}).num_places == 12


@pytest.mark.parametrize("name", ["MOESPEC_MAX_TOKENS", "MOESPEC_REQUESTS_PER_MINUTE", "MOESPEC_PLACES"])
@pytest.mark.parametrize("text", ["many", "0", "-3", "2.5"])
def test_a_variable_that_is_no_number_is_refused_by_name(name, text):
    with pytest.raises(ValueError, match=f"{name}='{text}' is no whole number of 1 or more"):
        Limits.from_environment({name: text})


def test_who_asks_too_often_is_told_when_to_come_back():
    visits = Visits()
    for now_s in (0.0, 10.0):
        visits.admit("first", 2, now_s)
    with pytest.raises(TooManyError, match=r"2 answers a minute are one visitor's share: ask again in 38 s") as refused:
        visits.admit("first", 2, 22.5)
    assert refused.value.retry_after_s == 38
    visits.admit("second", 2, 22.5)
    visits.admit("first", 2, 22.5 + 38)  # being refused has cost nothing
    with pytest.raises(TooManyError, match="ask again in 10 s"):
        visits.admit("first", 2, 60.5)
    visits.admit("second", 2, 1000.0)
    assert [*visits._times_s] == ["second"], "who has not come for a minute is forgotten"


@pytest.mark.parametrize(
    ("forwarded", "visitor"),
    [
        ("8.8.8.8", "8.8.8.8"),
        ("1.1.1.1, 8.8.8.8", "8.8.8.8"),  # the first was sent by the visitor
        ("8.8.8.8, 10.0.0.7", "8.8.8.8"),  # the last is the host's own
        ("2606:4700::1111", "2606:4700::1111"),
        ("nonsense", "10.1.2.3"),
        ("", "10.1.2.3"),
    ],
)
def test_behind_a_proxy_a_visitor_is_who_it_names(forwarded, visitor):
    request = SimpleNamespace(client=SimpleNamespace(host="10.1.2.3"), headers={"x-forwarded-for": forwarded})
    assert Limits(is_behind_proxy=True).visitor(request) == visitor
    assert Limits().visitor(request) == "10.1.2.3", "nobody else is believed"


def test_the_service_counts_visitors_not_sessions_and_the_refused_wait_for_nothing():
    service = Service(limits=Limits(requests_per_minute=2, num_places=3))
    service.queue.enter("tab 1", "visitor")
    service.queue.enter("tab 2", "visitor")
    with pytest.raises(TooManyError, match="one visitor's share"):
        service.queue.enter("tab 3", "visitor")
    service.queue.enter("a session of the page")
    with pytest.raises(TooManyError, match="3 visitors are waiting already: try again in a minute") as full:
        service.queue.enter("another")
    assert full.value.retry_after_s == 60
    service.queue.leave("tab 1")
    for _ in range(2):
        service.queue.enter("another")  # being refused has cost nothing
        service.queue.leave("another")
    with pytest.raises(TooManyError):
        service.queue.enter("another")
    assert len(service.queue.places) == 2


def test_an_answer_longer_than_allowed_is_refused_before_anything_is_computed(studio, monkeypatch):
    service = studio.service
    monkeypatch.setattr(service, "limits", Limits(max_new_tokens=100))
    settings = Settings(max_new_tokens=101)
    place = service.queue.enter("long")
    with pytest.raises(ValueError, match="max_new_tokens=101 is more than an answer may have here: use 100 or less"):
        next(service.stream("long", place.ticket, [{"role": "user", "content": "Hi"}], settings))
    assert studio.is_idle()


def test_a_series_is_counted_once():
    service, series = Service(limits=Limits(requests_per_minute=2)), Series()
    series.engine = service.engine
    service.queue.enter("visitor")
    service.queue.leave("visitor")
    for _ in range(3):
        service.queue.enter("visitor", series=series)
        service.queue.leave("visitor")
    service.queue.enter("visitor")
    service.queue.leave("visitor")
    with pytest.raises(TooManyError, match="2 answers a minute"):
        service.queue.enter("visitor")
    series.engine = object()
    with pytest.raises(ValueError, match="Another model has taken over"):
        service.queue.enter("visitor", series=series)


def test_a_place_that_nobody_came_for_is_given_up(monkeypatch):
    service = Service(limits=Limits(num_places=1))
    place = service.queue.enter("gone")
    with pytest.raises(TooManyError, match="are waiting already"):
        service.queue.enter("visitor")
    place.taken_s -= UNUSED_S + 1
    service.queue.enter("visitor")
    assert not service.queue.expects("gone", place.ticket)
