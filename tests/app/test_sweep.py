"""A visitor's own sweep: what it tries, what it makes of answers, and that it takes one place and disturbs nobody."""

from __future__ import annotations

import json
import threading
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import gradio as gr
import pytest

from app.controls import Controls, values_of
from app.places import Series
from app.service import Service
from app.settings import Settings
from app.sweep import (
    NO_BUDGET,
    NOTHING_TO_TRY,
    ONE_ROW,
    PLAIN,
    PROMPTS,
    Spread,
    Trial,
    agreement,
    beside_note,
    found,
    spread_prompts,
    sweep_figure,
    sweep_table,
    to_try,
)
from app.tabs.chat import Chat
from app.tabs.sweep import Sweep

BASE = Settings(
    score="natural", row_weight="path", method="oea:k0=2", governor="evict", temperature=0.7, system="Be brief."
)


def test_every_setting_differs_from_no_budget_in_one_thing():
    tried = to_try(BASE, [16, 8], 32)
    assert list(tried) == [NO_BUDGET, PLAIN, "B = 8", "B = 16"]
    reference = tried[NO_BUDGET]
    assert reference.is_lossless and tried[PLAIN].is_lossless and reference.temperature == 0
    assert (reference.max_new_tokens, reference.system, reference.governor) == (32, "", "fixed")
    for name, settings in tried.items():
        differs = {key for key, value in settings.to_json().items() if value != reference.to_json()[key]}
        assert differs == {NO_BUDGET: set(), PLAIN: {"drafter"}}.get(name, {"budget"})
    assert tried["B = 8"].budget_config.score == "natural", "experts are ranked as in the chat"


@pytest.mark.parametrize(
    ("base", "budgets", "refusal"),
    [
        (BASE, [], NOTHING_TO_TRY),
        (replace(BASE, drafter="none"), [8], ONE_ROW),
        (replace(BASE, total_tokens=1), [8], ONE_ROW),
        (BASE, [0], "budget=0"),
    ],
)
def test_what_compares_nothing_is_refused(base, budgets, refusal):
    with pytest.raises(ValueError, match=refusal[:30]):
        to_try(base, budgets, 32)


def test_few_prompts_are_of_many_kinds():
    entries = [json.loads(line) for line in PROMPTS.read_text(encoding="utf-8").splitlines()]
    for count in (1, 4, 12):
        prompts = spread_prompts(count)
        chosen = [entry for entry in entries if entry["messages"] in prompts]
        sources = {entry["source"].partition(":")[0] for entry in chosen}
        assert len(prompts) == count and len({str(one) for one in prompts}) == count
        assert len(sources) >= min(count, 3)


@pytest.mark.parametrize(
    ("ours", "theirs", "share"),
    [
        ([1, 2, 3, 4], [1, 2, 3, 4], 1.0),
        ([1, 2, 9, 4], [1, 2, 3, 4], 0.5),
        ([9, 2, 3, 4], [1, 2, 3, 4], 0.0),
        ([1, 2], [1, 2, 3, 4], 0.5),  # it ended too early
        ([1, 2, 3, 4, 5], [1, 2, 3, 4], 0.8),  # and too late
    ],
)
def test_agreement_is_the_share_of_the_text_before_the_first_difference(ours, theirs, share):
    assert agreement(ours, theirs) == share


def trial(name: str, prompt: int, tokens: list[int], speed: float | None = 10.0, beside: bool = False) -> Trial:
    return Trial(name, prompt, tokens, speed, 2.0, None if name == PLAIN else 8.0, beside)


DEFAULT = Settings()
SETTINGS = to_try(DEFAULT, [8, 12], 32)
TRIALS = [
    trial(NO_BUDGET, 0, [1, 2, 3, 4], 10.0),
    trial("B = 8", 0, [1, 2, 3, 4], 30.0),
    trial(NO_BUDGET, 1, [5, 6, 7, 8], 20.0),
    trial("B = 8", 1, [5, 6, 9, 8], 10.0, beside=True),
    trial("B = 8", 2, [5], None),  # its unbudgeted answer is not there yet
]


def test_answers_are_summed_up_with_their_spread():
    reference, budgeted = found(SETTINGS, TRIALS)
    assert reference.name == NO_BUDGET and reference.agreement == Spread(1.0, 1.0, 1.0) and reference.num_same == 2
    assert reference.speed == Spread(15.0, 10.0, 20.0)
    assert budgeted.speed == Spread(20.0, 10.0, 30.0), "one token alone has no speed"
    assert budgeted.agreement == Spread(0.75, 0.5, 1.0) and budgeted.num_same == 1 and len(budgeted.trials) == 3
    assert found(SETTINGS, []) == []


def test_the_table_says_it_and_can_be_loaded():
    rows = sweep_table(found(SETTINGS, TRIALS))["rows"]
    assert [row["name"] for row in rows] == [NO_BUDGET, "B = 8"]
    speed, agreed, same, *_ = rows[1]["cells"]
    assert speed == {"text": "20 (10 to 30)", "low": 1 / 3, "at": 2 / 3, "high": 1.0}
    assert agreed == "75 % (50 % to 100 %)" and same == "1 of 3"
    assert [Settings.from_json(row["settings"]).budget for row in rows] == [None, 8]
    assert sweep_table(found(SETTINGS, [trial(PLAIN, 0, [1], None)]))["rows"][0]["cells"][:2] == ["–", "–"]


def test_the_figure_has_whiskers_from_the_lowest_to_the_highest_prompt():
    budgets = next(trace for trace in sweep_figure(found(SETTINGS, TRIALS)).data if trace.name == "budgets")
    assert (list(budgets.x), list(budgets.y), list(budgets.text)) == ([20.0], [0.75], ["B = 8"])
    assert (budgets.error_x.array[0], budgets.error_x.arrayminus[0]) == (10.0, 10.0)
    assert (budgets.error_y.array[0], budgets.error_y.arrayminus[0]) == (0.25, 0.25)
    assert Settings.from_json(json.loads(budgets.customdata[0])) == SETTINGS["B = 8"]


def test_speeds_measured_beside_others_are_said_to_be_so():
    assert beside_note(TRIALS[:3]) == ""
    assert beside_note(TRIALS).startswith(" 1 of 5 answers were written beside other visitors'")


# With the engine.


@pytest.fixture(scope="module")
def service():
    return Service()


@pytest.fixture
def sweep(service):
    with gr.Blocks():
        return Sweep(service, Controls())


def visitor(name: str) -> Any:
    return SimpleNamespace(session_hash=name, client=None, headers={})


def begin(sweep: Sweep, name: str, budgets: list[str], num_prompts: int = 2, settings: Settings = DEFAULT) -> Any:
    sweep._ask(visitor(name))
    return sweep._run(visitor(name), budgets, num_prompts, 24, json.dumps(values_of(settings)))


def test_a_sweep_measures_what_the_engine_writes_alone(sweep, service):
    *frames, (said, table, figure) = begin(sweep, "a", ["8"])
    assert [frame[0]["done"] for frame in frames] == [1, 2, 3, 4, 5, 6] and frames[0][0]["total"] == 6
    assert said["message"].startswith("Done. 6 of 6")
    tried = to_try(Settings(), [8], 24)
    texts = {}
    for name, one in tried.items():
        asked = one.generation_config, one.budget_config, one.tree_config
        for prompt, messages in enumerate(spread_prompts(2)):
            *_, last = service.engine.generate(messages, *asked)
            texts[name, prompt] = last.summary.token_ids
    assert texts[PLAIN, 0] == texts[NO_BUDGET, 0]
    for row in table["rows"]:
        same = sum(texts[row["name"], prompt] == texts[NO_BUDGET, prompt] for prompt in range(2))
        assert row["cells"][2] == f"{same} of 2"
    assert len(figure["value"].data) == 3
    assert service.queue.places == {} and sweep.stops == {}


def test_stopped_half_way_it_keeps_what_it_has(sweep, service):
    frames = begin(sweep, "b", ["8", "16"], num_prompts=4)
    next(frames)
    *_, kept = next(frames), next(frames)
    sweep._halt(visitor("b"))
    *_, (said, table, figure) = frames
    assert said["message"].startswith("Stopped. 3 of 16")
    assert (
        [row["name"] for row in table["rows"]]
        == [row["name"] for row in kept[1]["rows"]]
        == [NO_BUDGET, PLAIN, "B = 8"]
    )
    assert len(figure["value"].data) == 3 and service.queue.places == {}


def test_stop_ends_the_answer_that_is_being_written(sweep, service):
    frames = begin(sweep, "c", ["8"])
    own = service.stream

    def stopped_in_the_middle(*args: Any) -> Any:
        for number, steps in enumerate(own(*args)):
            if number == 0:
                sweep._halt(visitor("c"))
            yield steps

    service.stream = stopped_in_the_middle
    try:
        ((said, table, figure),) = frames
    finally:
        del service.stream
    assert said["message"] == "Stopped." and table == figure == gr.skip(), "what an earlier sweep measured stays"


def test_stopped_or_left_before_its_turn_it_writes_nothing(sweep):
    for leave in (sweep._halt, sweep._gone):
        frames = begin(sweep, "d", ["8"])
        leave(visitor("d"))
        ((said, *rest),) = frames
        assert said["message"] == "Stopped." and rest == [gr.skip()] * 2 and sweep.stops == {}


def test_closing_it_gives_the_place_back(sweep, service):
    frames = begin(sweep, "e", ["8"])
    next(frames)
    frames.close()
    assert service.queue.places == {} and sweep.stops == {}


def test_a_visitor_has_one_place_for_chat_and_sweep(sweep, service):
    place = service.queue.enter("f")
    ((said, *rest),) = begin(sweep, "f", ["8"])
    assert "still being written" in said["message"] and rest == [gr.skip()] * 2
    assert service.queue.expects("f", place.ticket), "the chat's answer keeps its place"
    service.queue.leave("f")


def test_a_chat_beside_ones_own_sweep_is_told_of_it_and_clearing_it_ends_none(sweep, service):
    place = service.queue.enter("g", series=Series())
    with pytest.raises(ValueError, match="comparison or sweep is still running"):
        service.queue.enter("g")
    Chat._give_up(SimpleNamespace(service=service), visitor("g"))
    assert service.queue.expects("g", place.ticket)
    service.queue.leave("g")


def test_an_emptied_field_is_a_sentence(sweep):
    ((said, *rest),) = sweep._run(visitor("h"), ["8"], None, 16, json.dumps(values_of(DEFAULT)))
    assert "A number is missing" in said["message"] and rest == [gr.skip()] * 2


def test_settings_that_cannot_run_are_a_sentence(sweep):
    for budgets, settings, sentence in (
        ([], Settings(), NOTHING_TO_TRY),
        (["8"], Settings(drafter="none"), ONE_ROW),
        (["65"], Settings(), "outside 8 to 64"),
    ):
        ((said, *_),) = begin(sweep, "g", budgets, settings=settings)
        assert sentence in said["message"]


def test_a_failing_engine_is_a_sentence_and_keeps_what_there_is(sweep, service, monkeypatch):
    frames = begin(sweep, "h", ["8"])
    next(frames)
    monkeypatch.setattr(service, "stream", lambda *args: 1 / 0)
    *_, (said, table, _) = frames
    assert "failed (ZeroDivisionError)" in said["message"] and "1 of 6" in said["message"]
    assert len(table["rows"]) == 1 and service.queue.places == {}


def test_others_chats_go_on_beside_it_and_it_says_so(sweep, service):
    settings = Settings(max_new_tokens=600, ignore_eos=True)
    messages = [{"role": "user", "content": "Tell me a short story."}]
    place = service.queue.enter("other")
    begun, texts = threading.Event(), []

    def chat() -> None:
        for steps in service.stream("other", place.ticket, messages, settings):
            texts.append("".join(step.text for step in steps))
            begun.set()

    thread = threading.Thread(target=chat, daemon=True)
    thread.start()
    assert begun.wait(60)
    *_, (said, _, _) = begin(sweep, "i", ["8"], num_prompts=1)
    thread.join(120)
    assert "were written beside other visitors'" in said["message"]
    asked = settings.generation_config, settings.budget_config, settings.tree_config
    *_, last = service.engine.generate(messages, *asked)
    assert "".join(texts) == last.summary.text
