"""Contests: what links and forms hold, how runs take turns, and what is told of them, against the engine alone."""

from __future__ import annotations

import json
import statistics
import threading
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from app.race import Contest, Running, Slot, running, slot_of
from app.race.contest import CHAT, OWN, PLAIN, description, name_of
from app.race.outcome import Measured, middle, num_equal, spread
from app.recordings import Recordings
from app.service import Service
from app.settings import PRESETS, Settings
from moespec import TraceHeader

INFO: Any = SimpleNamespace(top_k=8, num_experts=64)
PROMPT = "Tell me a short story."
PLAINLY = Settings(budget=None, drafter="none", max_new_tokens=32)
LOSSLESS, TIGHT = Settings(budget=None, max_new_tokens=32), Settings(budget=8, max_new_tokens=32)


@pytest.fixture(scope="module")
def service():
    return Service()


@pytest.fixture(autouse=True)
def in_haste(monkeypatch):
    monkeypatch.setattr(running, "SETTLE_S", 0.0)
    monkeypatch.setattr(running, "SAY_S", 0.0)


def messages(prompt: str = PROMPT) -> list[dict]:
    return [{"role": "user", "content": prompt}]


def test_a_link_is_the_comparison_and_names_only_what_differs():
    contest = Contest("Größe <b>&?", (PLAINLY, Settings(), Settings(system="Be brief.", temperature=0.5)), 2)
    assert Contest.from_link(contest.to_link()) == contest
    named = json.loads(contest.to_link())
    assert named["of"][1] == {} and named["of"][2] == {"system": "Be brief.", "temperature": 0.5}
    assert (
        " " not in Contest("Hi", (PLAINLY, TIGHT)).to_link() and '"runs"' not in Contest("Hi", (PLAINLY,) * 2).to_link()
    )


@pytest.mark.parametrize(
    ("link", "sentence"),
    [
        ("", "is not JSON"),
        ('{"prompt":"Hi","of":[{', "only a part of it arrived"),
        ("[" * 5000, "is not JSON"),
        ("[]", "has no list of settings"),
        ('{"prompt":"Hi"}', "has no list of settings"),
        ('{"prompt":"Hi","of":"ab"}', "has no list of settings"),
        ('{"prompt":"Hi","of":[{},{}],"evil":1}', "'evil' is not known: use prompt, of, runs"),
        ('{"prompt":"Hi","of":[{},3]}', "are no settings"),
        ('{"prompt":"Hi","of":[{},{"budget":"<b>"}]}', "budget='<b>' is not allowed"),
        ('{"prompt":"Hi","of":[{}]}', "1 contestants cannot be compared: choose 2 to 4"),
        ('{"prompt":"Hi","of":[{},{},{},{},{}]}', "5 contestants cannot be compared: choose 2 to 4"),
        ('{"prompt":"  ","of":[{},{}]}', "The prompt is empty"),
        ('{"prompt":7,"of":[{},{}]}', "The prompt is empty"),
        ('{"of":[{},{}]}', "The prompt is empty"),
        (json.dumps({"prompt": "x" * 4001, "of": [{}, {}]}), "longer than 4000 characters"),
        ('{"prompt":"Hi","of":[{},{}],"runs":6}', "runs=6 is not allowed: use 1 to 5"),
        ('{"prompt":"Hi","of":[{},{}],"runs":true}', "runs=True is not allowed"),
        ('{"prompt":"Hi","of":[{},{}],"runs":[]}', r"runs=\[\] is not allowed"),
    ],
)
def test_a_link_that_is_none_is_a_sentence(link, sentence):
    with pytest.raises(ValueError, match=sentence):
        Contest.from_link(link)


def test_the_form_holds_any_settings_and_gives_them_back():
    asked = [
        *(Slot(kind).settings(64, INFO, Settings) for kind in (PLAIN, *PRESETS)),
        Settings(budget=20, policy="truncation", max_new_tokens=64),
        Settings(max_new_tokens=100, temperature=0.5, seed=7),
        Settings(),
    ]
    slots = [slot_of(settings, 64, INFO) for settings in asked]
    assert [slot.kind for slot in slots] == [PLAIN, *PRESETS, OWN, OWN, OWN]
    assert [slot.settings(64, INFO, Settings) for slot in slots] == asked
    assert json.loads(slots[-3].own) == {"budget": 20, "policy": "truncation"}
    assert slot_of(Settings(), 192, INFO) == Slot("Balanced")


def test_all_write_alike_unless_own_settings_ask_otherwise():
    chat = Settings(budget=9, governor="evict", temperature=1.0, seed=5, system="Shout.", max_new_tokens=999)
    found = Slot(CHAT).settings(64, INFO, lambda: chat)
    assert found == Settings(budget=9, governor="evict", max_new_tokens=64)
    own = Slot(OWN, '{"temperature": 1, "seed": 5}').settings(64, INFO, Settings)
    assert (own.temperature, own.seed, own.max_new_tokens) == (1, 5, 64)
    assert Slot(OWN).settings(64, INFO, Settings) == Settings(max_new_tokens=64)
    for text in ("{budget: 3", "[" * 5000):
        with pytest.raises(ValueError, match="own settings are JSON"):
            Slot(OWN, text).settings(64, INFO, Settings)
    with pytest.raises(ValueError, match=r"names and values.*not \[3\]"):
        Slot(OWN, "[3]").settings(64, INFO, Settings)
    with pytest.raises(ValueError, match="'budgets' is not known"):
        Slot(OWN, '{"budgets": 3}').settings(64, INFO, Settings)


def test_the_reference_is_plain_decoding_or_lossless_or_the_first():
    assert Contest("Hi", (TIGHT, LOSSLESS, PLAINLY)).reference == 2
    assert Contest("Hi", (TIGHT, LOSSLESS)).reference == 1
    assert Contest("Hi", (TIGHT, Settings())).reference == 0
    assert Contest("Hi", (TIGHT, Settings(budget=None, governor="utility:floor=0.7"))).reference == 0


def test_contestants_are_named_by_what_they_ask_for():
    assert [name_of(one, INFO) for one in (PLAINLY, LOSSLESS, TIGHT, Settings(budget=21))] == [
        "Plain decoding", "Lossless", "Tight", OWN,
    ]  # fmt: skip
    assert description(PLAINLY) == "no budget · drafter none · max new tokens 32"
    assert description(Settings(method="oea:k0=2", top_k=4)) == "oea:k0=2 · top k 4"
    assert description(Settings()) == "budget 16"


def test_the_equal_beginning_is_counted_in_tokens():
    assert num_equal([1, 2, 3], [1, 2, 4]) == 2 and num_equal([1, 2], [1, 2, 3]) == 2
    assert num_equal([1, 2, 3], [1, 2, 3]) == 3 and num_equal([], [1]) == 0 and num_equal([2, 1], [1, 1]) == 0


class Timed(Measured):
    """A run of which only the figures are known."""

    def __init__(self, tokens_per_s: float | None, experts: float = 12.0) -> None:
        self._figures = {"tokens_per_s": tokens_per_s, "experts": experts}

    def figures(self) -> dict[str, float | None]:
        return self._figures


def test_medians_ranges_and_the_run_that_is_shown():
    runs = [Timed(30.0), Timed(10.0), Timed(20.0, 18.0)]
    assert middle(runs) is runs[2] and middle(runs[:2]) is runs[1] and middle(runs[:1]) is runs[0]
    assert spread(runs) == {"tokens_per_s": [20.0, 10.0, 30.0], "experts": [12.0, 12.0, 18.0]}
    assert spread([Timed(None)])["tokens_per_s"] is None and middle([Timed(None)]) is not None


def test_runs_take_turns_one_at_a_time_and_write_what_they_would_alone(service, monkeypatch):
    told: list[tuple] = []
    begin = service.engine.run_at

    def seen(seat, token_ids, request):
        told.append((request.budget.budget, request.tree.total_tokens, request.generation.max_new_tokens))
        assert len(service.stepper.batches[0]._members) == 0, "never at once"
        return begin(seat, token_ids, request)

    monkeypatch.setattr(service.engine, "run_at", seen)
    contest = Contest(PROMPT, (PLAINLY, LOSSLESS, TIGHT), 2)
    under_way = Running(service, "visitor", contest)
    sayings = list(under_way.run())
    order = [(None, 1), (None, 16), (8, 16)]
    assert [one[:2] for one in told] == order * 3, "a warm-up, then round by round"
    assert [one[2] for one in told] == [16] * 3 + [32] * 6
    assert sayings[0] == "Warming up, 1 of 3: Plain decoding…"
    assert any(one.startswith("Round 2 of 2, 3 of 3: Tight…") and one.endswith(" tokens") for one in sayings)
    assert [len(runs) for runs in under_way.results] == [2, 2, 2] and under_way.num_finished == under_way.num_runs == 6
    for settings, runs in zip(contest.contestants, under_way.results, strict=True):
        asked = settings.generation_config, settings.budget_config, settings.tree_config
        *_, last = service.engine.generate(messages(), *asked)
        assert [run.token_ids for run in runs] == [last.summary.token_ids] * 2
        assert not any(run.is_shared for run in runs)
    assert service.queue.places == {}
    check_frame(under_way)


def check_frame(under_way: Running) -> None:
    """What is told, from the steps anew."""
    recordings = Recordings()
    frame = json.loads(json.dumps(under_way.frame(recordings)))
    assert Contest.from_link(frame["link"]) == under_way.contest and frame["reference"] == 0
    plain, lossless, tight = frame["lanes"]
    assert [lane["name"] for lane in frame["lanes"]] == ["Plain decoding", "Lossless", "Tight"]
    assert plain["is_same"] and lossless["is_same"] and lossless["equal"] == 32
    ours, theirs = (recordings.of(lane["run"]).steps[-1].summary.token_ids for lane in (tight, plain))
    parts_at = next((n for n in range(32) if ours[n] != theirs[n]), 32)
    assert tight["equal"] == parts_at and tight["is_same"] == (parts_at == 32)
    assert [lane["lossless"] for lane in frame["lanes"]] == [True, True, False]
    for lane, runs in zip(frame["lanes"], under_way.results, strict=True):
        assert (lane["num_runs"], lane["num_texts"], lane["num_shared"], lane["ending"]) == (2, 1, 0, "at its maximum")
        speeds = [run.steps[-1].summary.tokens_per_s for run in runs]
        assert lane["figures"]["tokens_per_s"] == [statistics.median(speeds), min(speeds), max(speeds)]
        steps = recordings.of(lane["run"]).steps
        assert steps[-1].summary.tokens_per_s == min(speeds), "of two the slower is shown"
        assert [one[2] for one in lane["steps"]] == [step.pieces for step in steps]
        assert [one[0] for one in lane["steps"]] == pytest.approx([s.t_ms - steps[0].t_ms for s in steps], abs=0.01)
        guessed = sum(origin > 0 for step in steps for origin in step.origins)
        assert sum(one[1] for one in lane["steps"]) == guessed
        assert lane["figures"]["accepted"][0] == pytest.approx(guessed / (len(steps) - 1))
        num_bytes = sum(step.expert_bytes for step in steps[1:])
        assert lane["figures"]["bytes"][0] == pytest.approx(num_bytes / 31), "the first token is the prompt's"
    assert plain["figures"]["experts"][0] == 8 and tight["figures"]["experts"][0] <= 8
    assert lossless["figures"]["experts"][0] == pytest.approx(under_way.results[1][0].steps[-1].summary.experts_active)
    assert tight["figures"]["mass"][0] < 1 == plain["figures"]["mass"][0]


def test_an_answer_of_one_token_has_no_figures_and_no_error(service):
    one = replace(LOSSLESS, max_new_tokens=1)
    under_way = Running(service, "visitor", Contest(PROMPT, (one, one), 1))
    assert list(under_way.run())[-1] == "2 of 2: Lossless… 1 token"
    lanes = under_way.frame()["lanes"]
    assert lanes[0]["figures"]["tokens_per_s"] is None and lanes[1]["equal"] == 1


def test_stop_ends_with_what_is_finished(service):
    long = replace(LOSSLESS, max_new_tokens=1500, ignore_eos=True)
    under_way = Running(service, "visitor", Contest(PROMPT, (PLAINLY, long), 3))
    for saying in under_way.run():
        if saying.startswith("Round 1 of 3, 2 of 2") and saying.endswith("tokens"):
            under_way.stop()
    assert [len(runs) for runs in under_way.results] == [1, 0] and under_way.num_finished == 1
    lanes = under_way.frame()["lanes"]
    assert "steps" in lanes[0] and "steps" not in lanes[1]
    assert service.queue.places == {}


def test_stop_before_anything_has_begun_runs_nothing(service):
    under_way = Running(service, "visitor", Contest(PROMPT, (PLAINLY, LOSSLESS), 1))
    under_way.stop()
    assert list(under_way.run()) == [] and under_way.num_finished == 0


def test_a_comparison_that_is_left_frees_its_place(service):
    long = replace(LOSSLESS, max_new_tokens=1500, ignore_eos=True)
    sayings = Running(service, "visitor", Contest(PROMPT, (long, long), 1)).run()
    while not next(sayings).endswith("tokens"):
        pass
    sayings.close()
    assert service.queue.places == {}


def test_what_cannot_run_is_named_before_anything_does(service):
    with pytest.raises(ValueError, match=r"^B: budget=7 is outside 8 to 64"):
        Running(service, "visitor", Contest(PROMPT, (PLAINLY, Settings(budget=7)))).check()
    with pytest.raises(ValueError, match=r"^A: .*context"):
        Running(service, "visitor", Contest("q z x " * 660, (Settings(system="q z x " * 660), PLAINLY))).check()


def other_answer(service: Service) -> tuple[threading.Thread, threading.Event]:
    """Another visitor's answer, being written until the event is set."""
    place, begun, enough = service.queue.enter("other"), threading.Event(), threading.Event()
    settings = replace(LOSSLESS, max_new_tokens=2048, ignore_eos=True)

    def write() -> None:
        for _ in service.stream("other", place.ticket, messages("Who are you?"), settings):
            begun.set()
            if enough.is_set():
                service.queue.stop("other")

    writer = threading.Thread(target=write, daemon=True)
    writer.start()
    assert begun.wait(60)
    return writer, enough


def test_others_answers_are_waited_for(service, monkeypatch):
    monkeypatch.setattr(running, "POLL_S", 0.01)
    writer, enough = other_answer(service)
    under_way = Running(service, "visitor", Contest(PROMPT, (PLAINLY, TIGHT), 1))
    sayings = under_way.run()
    assert next(sayings) == (
        "Warming up, 1 of 2: Plain decoding… waiting for 1 other visitor: the machine must be idle"
    )
    enough.set()
    writer.join(60)
    list(sayings)
    assert [run.is_shared for runs in under_way.results for run in runs] == [False, False]


def test_ones_own_answer_that_comes_between_two_runs_is_waited_for(service, monkeypatch):
    monkeypatch.setattr(running, "POLL_S", 0.01)
    under_way = Running(service, "visitor", Contest(PROMPT, (PLAINLY, TIGHT), 1))
    sayings = under_way.run()
    assert next(sayings) == "Warming up, 1 of 2: Plain decoding…"
    place = service.queue.enter("visitor")
    assert next(sayings).endswith("waiting for your answer in the chat")
    service.queue.leave("visitor", place.ticket)
    list(sayings)
    assert under_way.num_finished == 2


def test_what_is_written_beside_others_after_all_says_so(service, monkeypatch):
    monkeypatch.setattr(running, "PATIENCE_S", 0.0)
    writer, enough = other_answer(service)
    under_way = Running(service, "visitor", Contest(PROMPT, (TIGHT, replace(TIGHT, max_new_tokens=16)), 1))
    list(under_way.run())
    enough.set()
    writer.join(60)
    assert [lane["num_shared"] for lane in under_way.frame()["lanes"]] == [1, 1]


def test_a_run_that_was_cut_short_is_not_finished():
    header: Any = TraceHeader({}, 0, {}, {}, None, "")
    assert not Measured(header).is_finished
    cut: Any = SimpleNamespace(summary=SimpleNamespace(finish_reason="stopped"))
    assert not Measured(header, [cut]).is_finished
