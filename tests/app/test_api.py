"""The named endpoints as `gradio_client` uses them, on a page that is served."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
from gradio_client import Client
from gradio_client.exceptions import AppError

from app.settings import Settings
from moespec import StepTrace
from tests.app.conftest import Studio, wait_until

PROMPT = "Tell me a short story."
LOSSLESS = Settings(budget=None, max_new_tokens=40, ignore_eos=True)
LONG = {"max_new_tokens": 2000, "ignore_eos": True}


@pytest.fixture(scope="module")
def client(studio):
    return Client(studio.address, verbose=False)


def steps_of(client: Client, *asked: Any) -> list[dict]:
    return [*client.submit(*asked, api_name="/generate")]


def alone(studio: Studio, settings: Settings, prompt: Any = PROMPT) -> list[StepTrace]:
    asked = settings.generation_config, settings.budget_config, settings.tree_config
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    return [*studio.service.engine.generate(messages, *asked)]


def test_a_lossless_answer_comes_in_steps_and_is_what_the_engine_writes(studio, client):
    expected = alone(studio, LOSSLESS)
    steps = steps_of(client, PROMPT, LOSSLESS.changed())
    summary = expected[-1].summary
    assert "".join(step["text"] for step in steps) == steps[-1]["summary"]["text"] == summary.text
    token_ids = [token for step in steps for token in step["token_ids"]]
    assert token_ids == steps[-1]["summary"]["token_ids"] == summary.token_ids
    assert [step["step"] for step in steps] == [step.step for step in expected]
    assert [step["summary"] is None for step in steps] == [True] * (len(steps) - 1) + [False]
    assert all(step["lossless"] for step in steps) and steps[-1]["summary"]["lossless"]
    trees = [step.tree for step in expected]
    drafted = [sum(depth > 0 for depth in tree.depths) if tree else 0 for tree in trees]
    assert [step["num_drafted"] for step in steps] == drafted


def test_counters_add_up_over_the_steps(client):
    steps = steps_of(client, PROMPT, LOSSLESS.changed())
    counters, written = steps[-1]["counters"], steps[1:]
    assert steps[0]["kind"] == "prefill" and steps[0]["counters"]["num_steps"] == 0
    assert counters["num_steps"] == len(written) == steps[-1]["summary"]["num_steps"]
    assert counters["num_tokens"] == 40
    for name in ("num_drafted", "num_accepted", "draft_ms", "verify_ms", "other_ms"):
        assert counters[name] == pytest.approx(sum(step[name] for step in written))
    assert 0 < counters["num_accepted"] < counters["num_drafted"]
    bonus = sum(len(step["token_ids"]) - step["num_accepted"] for step in written)
    assert bonus + counters["num_accepted"] + 1 == 40, "the first is the prompt's"
    assert counters["prompt_ms"] == steps[0]["t_ms"] > 0


def test_settings_messages_and_stop_texts_are_followed(studio, client):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": PROMPT}]
    settings = Settings(budget=20, max_new_tokens=60, ignore_eos=True, drafter="none")
    text = alone(studio, settings, messages)[-1].summary.text
    steps = steps_of(client, messages, settings.changed())
    assert "".join(step["text"] for step in steps) == text
    assert {step["kind"] for step in steps} == {"prefill", "plain"}
    word = text.split()[4]
    stopped = steps_of(client, messages, settings.changed(), [word])
    assert "".join(step["text"] for step in stopped) == text[: text.index(word)]
    assert stopped[-1]["summary"]["finish_reason"] == "stop"
    budgeted = steps_of(client, PROMPT, {"budget": 20, "max_new_tokens": 20})
    assert {step["budget"] for step in budgeted if step["kind"] == "tree"} == {20}
    assert all(step["experts_active"] <= 20 for step in budgeted)
    assert not budgeted[-1]["lossless"] and budgeted[-1]["mass_kept"] < 1


def test_what_is_not_named_is_as_the_page_begins(client):
    told = client.predict(api_name="/settings")
    assert Settings.from_json(told["defaults"]) == Settings()
    assert told["presets"]["Lossless"]["budget"] is None
    assert told["model"]["model_name"] == "embedded model"
    assert told["limits"]["max_new_tokens"] == told["allowed"]["max_new_tokens"]["maximum"] == 2048
    steps = steps_of(client, "Who are you?")
    assert {step["budget"] for step in steps if step["kind"] == "tree"} == {Settings.budget}


def test_what_is_said_to_be_allowed_is_and_nothing_beyond(studio, client):
    def is_taken(**values: Any) -> bool:
        try:
            studio.service.check(Settings.from_json(values))
            return True
        except ValueError:
            return False

    allowed = client.predict(api_name="/settings")["allowed"]
    for name, schema in allowed.items():
        little = 1 if "integer" in schema.get("type", ()) else 1e-6
        for end, beyond in (("minimum", -little), ("maximum", little)):
            if end in schema:
                assert is_taken(**{name: schema[end]}) and not is_taken(**{name: schema[end] + beyond}), name
        for end in (schema.get("exclusiveMinimum"), schema.get("exclusiveMaximum")):
            assert end is None or not is_taken(**{name: end}), name
        assert all(is_taken(**{name: value}) for value in schema.get("enum", [])), name
        assert "enum" not in schema or not is_taken(**{name: "another"})
    assert is_taken(budget=None) and is_taken(system="x" * allowed["system"]["maxLength"])


def test_advice_is_the_services_own(studio, client):
    assert client.predict(api_name="/advise") == json.loads(json.dumps(studio.service.advise().to_json()))


def test_nothing_else_of_the_page_is_offered(client):
    offered = client.view_api(return_format="dict")
    assert [*offered["named_endpoints"]] == ["/generate", "/settings", "/advise"]
    assert not offered["unnamed_endpoints"]


@pytest.mark.parametrize(
    ("asked", "sentence"),
    [
        (("",), "use a text, or a list of messages"),
        ((5,), "prompt=5 is not allowed"),
        (([{"role": "king", "content": "Hi"}],), "a chat message has a role"),
        (("word " * 9000,), "context is 4096"),
        ((PROMPT, {"budget": 3}), "budget=3 is outside 8 to 64"),
        ((PROMPT, {"budgets": 3}), "setting 'budgets' is not known"),
        ((PROMPT, [3]), "are no settings"),
        ((PROMPT, {"max_new_tokens": 2049}), "use 2048 or less"),
        ((PROMPT, {}, [""]), r"stop=\[''\] is not allowed"),
        ((PROMPT, {}, ["a", "b", "c", "d", "e"]), "up to 4 texts"),
    ],
)
def test_what_cannot_be_asked_is_refused_in_a_sentence(studio, client, asked, sentence):
    with pytest.raises(AppError, match=sentence):
        client.predict(*asked, api_name="/generate")
    assert studio.is_idle()


def test_a_failure_is_told_without_its_particulars(studio, client, monkeypatch):
    monkeypatch.setattr(studio.service.engine.target, "forward", lambda *args, **more: 1 / 0)
    with pytest.raises(AppError, match=r"The request failed \(ZeroDivisionError\): ask again"):
        client.predict(PROMPT, api_name="/generate")


def test_who_asks_too_often_is_told_so(studio, client, limit):
    limit(requests_per_minute=1)
    client.predict(PROMPT, {"max_new_tokens": 4}, api_name="/generate")
    with pytest.raises(AppError, match=r"1 answers a minute are one visitor's share: ask again in \d+ s"):
        Client(studio.address, verbose=False).predict(PROMPT, api_name="/generate")  # another session, the same address


def test_cancelling_ends_the_answer(studio, client, unhurried):
    job = client.submit(PROMPT, LONG, api_name="/generate")
    next(iter(job))
    assert not studio.is_idle()
    job.cancel()
    wait_until(studio.is_idle)


def test_a_connection_that_is_lost_ends_the_answer(studio, unhurried):
    call = f"{studio.address}/gradio_api/call/generate"
    event = httpx.post(call, json={"data": [PROMPT, LONG, None]}).json()["event_id"]
    with httpx.stream("GET", f"{call}/{event}", timeout=60) as answer:
        for line in answer.iter_lines():
            if line.startswith("data:"):
                break
        assert not studio.is_idle()
    wait_until(studio.is_idle)
