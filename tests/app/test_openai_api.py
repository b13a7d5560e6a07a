"""The OpenAI-compatible routes as OpenAI's own client uses them, on a page that is served."""

from __future__ import annotations

import json
import threading
from typing import Any

import httpx
import openai
import pytest
from gradio_client import Client
from gradio_client.exceptions import AppError
from openai import OpenAI

from app.service import Service
from app.settings import Settings
from app.stepping import Stepper
from moespec import Batch, GenerationConfig, RunSummary
from tests.app.conftest import Studio, serving, wait_until

MODEL = "embedded-model"
PROMPT = "Tell me a short story."
OURS = {"budget": None, "ignore_eos": True, "max_new_tokens": 40}
LONG = {"ignore_eos": True, "max_new_tokens": 2000}


def client_of(studio: Studio) -> OpenAI:
    return OpenAI(base_url=f"{studio.address}/v1", api_key="any", max_retries=0)


@pytest.fixture(scope="module")
def client(studio):
    return client_of(studio)


def said(text: str) -> list[dict]:
    return [{"role": "user", "content": text}]


def ask(client: OpenAI, prompt: str | list = PROMPT, ours: dict | None = None, **asked: Any) -> Any:
    messages = said(prompt) if isinstance(prompt, str) else prompt
    body = {} if ours is None else {"moespec": ours}
    return client.chat.completions.create(**{"model": MODEL, "messages": messages, "extra_body": body} | asked)


def alone(studio: Studio, prompt: str | list = PROMPT, settings: Settings | None = None, **more: Any) -> RunSummary:
    settings = settings or Settings.from_json(OURS)
    generation = GenerationConfig(**vars(settings.generation_config) | more)
    messages = said(prompt) if isinstance(prompt, str) else prompt
    asked = generation, settings.budget_config, settings.tree_config
    *_, last = studio.service.engine.generate(messages, *asked)
    return last.summary


def test_the_model_is_listed_with_what_it_is(client):
    (model,) = client.models.list().data
    assert model == client.models.retrieve(model.id)
    assert model.id == MODEL and model.moespec["num_experts"] == 64 and model.moespec["max_context"] == 4096
    with pytest.raises(openai.NotFoundError, match=f"The model 'gpt/x' is not here: use '{MODEL}'"):
        client.models.retrieve("gpt/x")


def test_a_lossless_answer_is_what_the_engine_writes(studio, client):
    expected, answer = alone(studio), ask(client, ours=OURS)
    (choice,) = answer.choices
    assert choice.message.content == expected.text and choice.message.role == "assistant"
    assert choice.finish_reason == "length"
    assert answer.object == "chat.completion" and answer.model == MODEL
    usage, own = answer.usage, answer.moespec
    assert usage.prompt_tokens == len(expected.prompt_token_ids)
    assert usage.completion_tokens == 40 and usage.total_tokens == usage.prompt_tokens + 40
    details, counters = usage.completion_tokens_details, own["counters"]
    assert details.accepted_prediction_tokens == counters["num_accepted"] > 0
    assert details.accepted_prediction_tokens + details.rejected_prediction_tokens == counters["num_drafted"]
    assert own["lossless"] is True and own["mass_kept"] == 1
    assert own["experts_natural"] == pytest.approx(expected.experts_natural)


def test_a_streamed_answer_is_the_same_with_its_usage_last(studio, client):
    asked = {"stream": True, "stream_options": {"include_usage": True}}
    *chunks, end, last = ask(client, ours=OURS, **asked)
    assert "".join(chunk.choices[0].delta.content for chunk in chunks) == alone(studio).text
    assert chunks[0].choices[0].delta.role == "assistant" and len(chunks) > 2
    assert {chunk.choices[0].finish_reason for chunk in chunks} == {None}
    assert end.choices[0].finish_reason == "length" and end.moespec["lossless"] is True
    assert last.choices == [] and last.usage.completion_tokens == 40
    assert last.usage.completion_tokens_details.accepted_prediction_tokens == end.moespec["counters"]["num_accepted"]
    assert all(chunk.usage is None for chunk in (*chunks, end))
    assert len({chunk.id for chunk in (*chunks, end, last)}) == 1
    *_, without = ask(client, ours=OURS, stream=True)
    assert without.choices[0].finish_reason == "length" and without.usage is None


def test_under_a_budget_it_says_that_it_is_lossy(client):
    answer = ask(client, ours={"budget": 16})
    assert answer.moespec["lossless"] is False and answer.moespec["experts_active"] <= 16
    assert answer.moespec["settings"]["budget"] == 16 and answer.moespec["mass_kept"] < 1
    assert ask(client).moespec["settings"]["budget"] == Settings.budget, "not named: as the page begins"


def test_openais_own_names_are_followed(studio, client):
    greedy = {"budget": None}
    expected = alone(studio, settings=Settings(budget=None, max_new_tokens=30, temperature=0.8, top_p=0.9, seed=7))
    drawn = {"temperature": 0.8, "top_p": 0.9, "seed": 7}
    assert ask(client, ours=greedy, max_tokens=30, **drawn).choices[0].message.content == expected.text
    short = ask(client, ours=greedy | {"max_new_tokens": 50}, max_tokens=40, max_completion_tokens=9)
    assert short.usage.completion_tokens == 9 and short.choices[0].finish_reason == "length"
    whole = alone(studio, settings=Settings(budget=None)).text
    word = whole.split()[5]
    stopped = ask(client, ours=greedy, stop=["no such text", word]).choices[0]
    assert stopped.message.content == whole[: whole.index(word)] != "" and stopped.finish_reason == "stop"
    ended = ask(client, "What is 12 + 30?", ours=greedy).choices[0]
    assert ended.finish_reason == "stop"


def test_without_a_seed_each_answer_draws_its_own_and_says_which(client):
    asked = {"temperature": 1.0, "max_tokens": 4}
    seeds = [ask(client, **asked).moespec["settings"]["seed"] for _ in range(2)]
    assert seeds[0] != seeds[1]
    assert ask(client, seed=3, **asked).moespec["settings"]["seed"] == 3
    assert ask(client, ours={"seed": 4}, **asked).moespec["settings"]["seed"] == 4


def test_system_messages_and_parts_of_text_are_read(studio, client):
    messages = [{"role": "system", "content": "Answer in French."}, *said(PROMPT)]
    expected = alone(studio, messages)
    parts = [{"type": "text", "text": PROMPT[:5]}, {"type": "text", "text": PROMPT[5:]}]
    for first in ("system", "developer"):
        asked = [{"role": first, "content": "Answer in French."}, {"role": "user", "content": parts}]
        answer = ask(client, asked, ours=OURS)
        assert answer.choices[0].message.content == expected.text
        assert answer.usage.prompt_tokens == len(expected.prompt_token_ids)


@pytest.mark.parametrize(
    ("asked", "sentence", "code"),
    [
        ({"ours": {"budget": 3}}, "budget=3 is outside 8 to 64", None),
        ({"ours": {"budgets": 3}}, "setting 'budgets' is not known", None),
        ({"ours": [3]}, "are no settings", None),
        ({"temperature": 11}, "temperature=11", None),
        ({"seed": -1}, "seed=-1", None),
        ({"max_tokens": 0}, "max_new_tokens=0", None),
        ({"max_tokens": 2049}, "use 2048 or less", None),
        ({"stop": ["a"] * 5}, "up to 4 texts", None),
        ({"n": 2}, "n=2 is not supported", "unsupported_parameter"),
        ({"tools": [{"type": "function"}]}, "tools=", "unsupported_parameter"),
        ({"extra_body": {"top_k": 4}}, "top_k=4 is not supported", "unsupported_parameter"),
        ({"prompt": []}, "messages is missing", "missing_required_parameter"),
        ({"prompt": "word " * 9000}, "context is 4096", None),
        ({"prompt": [{"role": "king", "content": "Hi"}]}, "a chat message has a role", None),
        ({"prompt": ["Hi"]}, "A message has a role and a content", None),
        ({"prompt": [{"role": "user", "content": [{"type": "image_url"}]}]}, "reads text alone", None),
        ({"stream_options": 3}, "stream_options is an object, not 3", None),
        ({"messages": "Hi"}, "messages is a list, not 'Hi'", None),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_cannot_be_asked_is_refused_in_openais_form(studio, client, asked, sentence, code, stream):
    with pytest.raises(openai.BadRequestError, match=sentence) as refused:
        ask(client, **asked, stream=stream)
    assert refused.value.type == "invalid_request_error" and refused.value.code == code
    assert studio.is_idle()


def test_what_is_neutral_or_of_no_matter_here_is_taken(client):
    neutral = {"n": 1, "presence_penalty": 0, "response_format": {"type": "text"}, "user": "me", "logprobs": None}
    assert ask(client, max_tokens=4, **neutral).usage.completion_tokens == 4


def test_another_model_is_not_here(client):
    with pytest.raises(openai.NotFoundError, match="The model 'gpt-9' is not here") as refused:
        ask(client, model="gpt-9")
    assert (refused.value.code, refused.value.param) == ("model_not_found", "model")


@pytest.mark.parametrize("body", ["{", "[]", b"\xff"])
def test_a_body_of_another_form_is_refused(studio, body):
    kind = {"Content-Type": "application/json"}
    answer = httpx.post(f"{studio.address}/v1/chat/completions", content=body, headers=kind)
    assert answer.status_code == 400 and "The body is no JSON" in answer.json()["error"]["message"]


def test_who_asks_too_often_is_told_when_to_come_back(studio, client, limit):
    limit(requests_per_minute=1)
    ask(client, max_tokens=4)
    with pytest.raises(openai.RateLimitError, match=r"ask again in \d+ s") as refused:
        ask(client)
    assert 0 < int(refused.value.response.headers["Retry-After"]) <= 60
    assert refused.value.code == "rate_limit_exceeded"


def test_behind_a_proxy_each_address_has_one_share_of_all_ways_in(studio, client, limit):
    limit(requests_per_minute=1, is_behind_proxy=True)
    for address in ("8.8.8.8", "1.1.1.1"):
        ask(client, max_tokens=4, extra_headers={"X-Forwarded-For": address})
    again = Client(studio.address, verbose=False, headers={"X-Forwarded-For": "9.9.9.9, 8.8.8.8"})
    with pytest.raises(AppError, match="one visitor's share"):
        again.predict(PROMPT, api_name="/generate")


def test_who_finds_every_place_taken_is_told_so(studio, client, limit):
    limit(num_places=1)
    place = studio.service.queue.enter("another")
    with pytest.raises(openai.RateLimitError, match="are waiting already: try again in a minute"):
        ask(client)
    studio.service.queue.leave("another", place.ticket)


def test_while_a_model_loads_and_where_there_is_none_it_says_so(tmp_path, monkeypatch):
    held = threading.Event()
    own_load = Stepper._first
    monkeypatch.setattr(Stepper, "_first", lambda stepper: held.wait() and own_load(stepper))
    service = Service(tmp_path)
    service.stepper.start()
    with serving(service) as studio:
        client = client_of(studio)
        with pytest.raises(openai.InternalServerError, match="still loading: ask again in a few seconds") as refused:
            ask(client)
        assert (refused.value.status_code, refused.value.code) == (503, "model_not_ready")
        assert refused.value.response.headers["Retry-After"] == "5"
        held.set()
        wait_until(lambda: "still loading" not in service.unready)
        for request in (lambda: ask(client), client.models.list, lambda: client.models.retrieve(MODEL)):
            with pytest.raises(openai.InternalServerError, match=str(tmp_path)) as refused:
                request()
            assert refused.value.status_code == 503


def test_a_failure_is_told_without_its_particulars(studio, client, monkeypatch):
    monkeypatch.setattr(studio.service.engine.target, "forward", lambda *args, **more: 1 / 0)
    with pytest.raises(openai.InternalServerError, match=r"The answer failed \(ZeroDivisionError\): ask again"):
        ask(client)


def test_a_failure_in_mid_answer_is_told_in_the_stream(studio, client, monkeypatch):
    chunks = []
    stream = ask(client, ours=LONG, stream=True)
    with pytest.raises(openai.APIError, match=r"The answer failed \(ZeroDivisionError\)"):
        for chunk in stream:
            chunks.append(chunk)
            monkeypatch.setattr(Batch, "_verify", lambda *args: 1 / 0)
    assert chunks[0].choices[0].delta.role == "assistant"
    monkeypatch.undo()
    assert ask(client, ours=OURS).choices[0].message.content == alone(studio).text


def test_a_stream_that_is_closed_ends_the_answer(studio, client, unhurried):
    stream = ask(client, ours=LONG, stream=True)
    next(iter(stream))
    assert not studio.is_idle()
    stream.close()
    wait_until(studio.is_idle)


def test_a_client_that_does_not_wait_ends_the_answer(studio, client, unhurried):
    with pytest.raises(openai.APITimeoutError):
        ask(client.with_options(timeout=1), ours=LONG)
    wait_until(studio.is_idle)


def test_others_are_served_while_an_answer_is_written(studio, client, monkeypatch):
    own_step, go_on = Batch.step, threading.Event()
    monkeypatch.setattr(Batch, "step", lambda batch: go_on.wait() and own_step(batch))
    answers: list[Any] = []
    asking = threading.Thread(target=lambda: answers.append(ask(client, max_tokens=4)))
    asking.start()
    wait_until(lambda: bool(studio.service.queue.places))
    try:
        assert client.with_options(timeout=30).models.list().data[0].id == MODEL
        assert httpx.get(studio.address, timeout=30).status_code == 200
        assert not answers
    finally:
        go_on.set()
    asking.join(timeout=60)
    assert answers[0].usage.completion_tokens == 4


def test_events_are_as_the_standard_has_them(studio):
    body = {"model": MODEL, "messages": said("Hi"), "stream": True, "max_tokens": 4}
    answer = httpx.post(f"{studio.address}/v1/chat/completions", json=body, timeout=60)
    assert answer.headers["content-type"].startswith("text/event-stream")
    *events, rest = answer.text.split("\n\n")
    assert rest == "" and events[-1] == "data: [DONE]"
    assert all(json.loads(event.removeprefix("data: "))["object"] == "chat.completion.chunk" for event in events[:-1])


@pytest.mark.parametrize(
    ("body", "kind", "status", "sentence"),
    [
        (b"{}", "text/plain", 415, "Send JSON"),
        (b" " * (2 << 20), "application/json", 413, "more than 1024 kB"),
        (b"[" * 100_000, "application/json", 400, "is no JSON"),
    ],
)
def test_what_is_no_request_is_refused_before_it_is_read_whole(studio, body, kind, status, sentence):
    found = httpx.post(f"{studio.address}/v1/chat/completions", content=body, headers={"Content-Type": kind})
    assert found.status_code == status and sentence in found.json()["error"]["message"]
