"""Answers that are kept, forgotten, exported and opened again."""

from __future__ import annotations

import json
import re

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from app.export import replay_page, trace_file
from app.live import added_frame
from app.recordings import MAX_PROMISED, Recordings
from app.routes import page_router
from moespec import EMBEDDED_TARGET, BudgetConfig, Engine, GenerationConfig, TreeConfig, read_trace

HOSTILE = "</script><script>alert(1)</script><!-- <b>"


@pytest.fixture(scope="module")
def trace():
    engine = Engine.from_pretrained(EMBEDDED_TARGET)
    asked = GenerationConfig(max_new_tokens=20), BudgetConfig(12), TreeConfig()
    messages = [{"role": "user", "content": f"Repeat: {HOSTILE}"}]
    return engine.header(messages, *asked), list(engine.generate(messages, *asked))


def kept(recordings, trace):
    recording = recordings.begin(trace[0])
    recording.steps += trace[1]
    return recording


def test_the_oldest_are_forgotten_and_those_kept_for_good_are_not(trace, tmp_path):
    recordings = Recordings(max_steps=2 * (len(trace[1]) + 1) + 1)
    (tmp_path / "first.jsonl").write_text(trace_file(kept(recordings, trace)), encoding="utf-8")
    for_good = recordings.open(tmp_path / "first.jsonl", keep=True)
    first, second = kept(recordings, trace), kept(recordings, trace)
    recordings.of(first.id)  # looked at: the other is now the oldest
    third = kept(recordings, trace)
    recordings.begin(trace[0])
    assert recordings.of(first.id) is first and recordings.of(third.id) is third
    with pytest.raises(ValueError, match="no longer kept"):
        recordings.of(second.id)
    assert recordings.of(for_good.id) is for_good
    assert len({first.id, second.id, third.id}) == 3


def test_what_is_asked_for_beyond_the_end_is_not_there(trace):
    recording = kept(Recordings(), trace)
    assert recording.between(-5, 2) == trace[1][:2]
    assert recording.between(3, 10**9) == trace[1][3:]
    assert recording.question == f"Repeat: {HOSTILE}"


def test_an_answer_that_is_waited_for_has_its_address_already(trace):
    recordings, app = Recordings(), FastAPI()
    promised = recordings.promise()
    app.include_router(page_router(recordings))
    client = TestClient(app)
    assert client.get(f"/live/{promised}?after=0").json() == {"is_end": False}
    assert client.get(f"/recordings/{promised}.jsonl").status_code == 404
    recording = recordings.begin(trace[0], promised)
    recording.steps.append(trace[1][0])
    assert client.get(f"/live/{promised}?after=0").json() == added_frame(0, trace[1][:1])
    assert recordings.of(promised) is recording


def test_promises_are_not_kept_without_end():
    recordings = Recordings()
    first = recordings.promise()
    assert recordings.is_promised(first)
    others = [recordings.promise() for _ in range(MAX_PROMISED)]
    assert not recordings.is_promised(first) and all(map(recordings.is_promised, others))


def test_what_is_new_of_an_answer_has_an_address(trace):
    recordings, app = Recordings(), FastAPI()
    recording = kept(recordings, trace)
    app.include_router(page_router(recordings))
    client = TestClient(app)
    found = client.get(f"/live/{recording.id}?after=2")
    assert found.json() == json.loads(json.dumps(added_frame(2, trace[1][2:])))
    assert found.headers["Cache-Control"] == "no-store"
    assert found.json()["is_end"] and client.get(f"/live/{recording.id}?after=999").json()["series"] == ""
    assert client.get(f"/live/{recording.id}?after=-4").json()["series"].count(";") == len(trace[1])
    gone = client.get("/live/other?after=0")
    assert gone.status_code == 404 and "no longer kept" in gone.text
    assert client.get(f"/live/{recording.id}?after=x").status_code == 422


def test_an_exported_trace_is_the_answer(trace, tmp_path):
    (tmp_path / "trace.jsonl").write_text(trace_file(kept(Recordings(), trace)), encoding="utf-8")
    assert read_trace(tmp_path / "trace.jsonl") == trace


def test_an_exported_page_has_every_step_and_no_text_that_is_markup(trace):
    page = replay_page(kept(Recordings(), trace))
    assert page.count("<script") == 2 and page.count("</script>") == 2
    data = json.loads(re.search(r'id="data">(.*?)</script>', page, re.DOTALL)[1])
    assert len(data["steps"]) == len(data["soFar"]) == len(trace[1])
    assert HOSTILE in data["value"]["message"]
    assert not re.search(r"(?:src|href)=[\"']?(?:https?:)?//", page), "it asks nobody for anything"
    with pytest.raises(ValueError, match="nothing to export yet"):
        replay_page(Recordings().begin(trace[0]))


def test_exports_are_downloads_and_what_is_gone_is_a_sentence(trace):
    recordings = Recordings()
    recording = kept(recordings, trace)
    app = FastAPI()
    app.include_router(page_router(recordings))
    client = TestClient(app)
    found = client.get(f"/recordings/{recording.id}.jsonl")
    assert found.status_code == 200 and found.text == trace_file(recording)
    assert found.headers["content-disposition"] == 'attachment; filename="moe-spec-answer.jsonl"'
    assert client.get(f"/recordings/{recording.id}.html").text == replay_page(recording)
    for name, sentence in (("nobody.jsonl", "no longer kept"), (f"{recording.id}.exe", "as .jsonl or .html")):
        gone = client.get(f"/recordings/{name}")
        assert gone.status_code == 404 and sentence in gone.text
