"""The named model beside the embedded one: it takes over between two answers, or says why it does not."""

from __future__ import annotations

import re
import sys
import threading
import time
from dataclasses import replace
from typing import Any

import pytest
import torch

import app.loading
import app.stepping
from app.hosting import HostedModel, Hosting
from app.service import Service
from app.settings import Settings
from app.tabs.chat import device_line
from moespec import EMBEDDED_TARGET, Engine

HEAD = str(EMBEDDED_TARGET.parent / "drafter")
NAMED = HostedModel("Larger-Model", str(EMBEDDED_TARGET), 28_000_000, 1e8, HEAD)
SETTINGS = Settings(max_new_tokens=24, ignore_eos=True, budget=None)
LONG = replace(SETTINGS, max_new_tokens=1500)
SAID = [{"role": "user", "content": "Who are you?"}]


def visit(service: Service, name: str, settings: Settings = SETTINGS) -> str:
    place = service.queue.enter(name)
    return "".join(step.text for frame in service.stream(name, place.ticket, SAID, settings) for step in frame)


def wait_until(is_so: Any) -> None:
    for _ in range(6000):
        if is_so():
            return
        time.sleep(0.01)
    raise AssertionError("it never came")


@pytest.fixture
def held(monkeypatch):
    """A loader that waits for the event, then loads, or raises what stands in `problem`."""
    event, problem = threading.Event(), []

    def load(hosted: HostedModel) -> Engine:
        event.wait(60)
        if problem:
            raise problem[0]
        return load_hosted(hosted)

    load_hosted = app.loading.load_hosted
    monkeypatch.setattr(app.stepping, "load_hosted", load)
    yield event, problem
    event.set()


def test_the_embedded_model_answers_while_the_named_one_loads_and_then_that_one(held):
    event, _ = held
    service = Service(wanted=NAMED)
    expected = visit(service, "early")
    assert service.info.model_name == "embedded model" and expected
    assert service.notice == "Larger-Model is being loaded. Until it is there, the embedded model answers."
    assert device_line(service).endswith(f"**{service.notice}**")
    writing = service.queue.enter("writing")
    frames = service.stream("writing", writing.ticket, SAID, LONG)
    next(frames)
    read = service.queue.enter("read")  # between its prompt and its answer
    event.set()
    wait_until(lambda: service._models.is_one_waiting)
    assert service.info.model_name == "embedded model", "what was said to one reader stays true"
    with pytest.raises(ValueError, match="takes over when the answers before yours are written"):
        service.queue.enter("late")
    service.queue.leave("read", read.ticket)
    assert service.info.model_name == str(EMBEDDED_TARGET) and service.notice == ""
    service.update("writing", replace(LONG, budget=20))
    service.queue.stop("writing")
    rest = [step for frame in frames for step in frame]
    assert rest[-1].summary.finish_reason == "stopped", "the one before ends where it began"
    assert service.header(SAID, SETTINGS).model["name"] == str(EMBEDDED_TARGET)
    assert visit(service, "late") == expected, "the same weights, a clean start"
    assert service.info.drafter_name == "EAGLE-3"


def test_a_busy_page_hands_over_without_anyone_waiting(held):
    event, _ = held
    service = Service(wanted=NAMED)
    visit(service, "early")
    writing = service.queue.enter("writing")
    frames = service.stream("writing", writing.ticket, SAID, LONG)
    next(frames)
    event.set()
    wait_until(lambda: service.info.model_name == str(EMBEDDED_TARGET))
    assert visit(service, "beside"), "answers of both models are written in turn"
    frames.close()
    assert service.queue.places == {}


@pytest.mark.parametrize(
    ("problem", "reason"),
    [
        (torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."), r"\(memory ran out\)"),
        (MemoryError(), r"\(memory ran out\)"),
        (RuntimeError("no driver"), r"\(RuntimeError: no driver\)"),
    ],
)
def test_a_model_that_fails_to_load_leaves_the_embedded_one(held, problem, reason):
    event, problems = held
    problems.append(problem)
    event.set()
    service = Service(wanted=NAMED)
    expected = visit(service, "early")
    wait_until(lambda: "could not" in service.notice)
    assert re.fullmatch(f"Larger-Model could not be loaded {reason}. The embedded model answers.", service.notice)
    assert visit(service, "late") == expected and service.info.model_name == "embedded model"


def test_a_model_that_is_not_on_the_hub_leaves_the_embedded_one(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    service = Service(wanted=replace(NAMED, hub_id="nobody/nothing"))
    assert visit(service, "early")
    wait_until(lambda: "could not be loaded" in service.notice)
    assert service.notice.startswith("nobody/nothing could not be loaded: ")
    assert service.notice.endswith(" The embedded model answers.")


def test_what_cannot_fit_or_is_not_on_the_list_is_said(monkeypatch):
    service = Service.of({"SPACE_ID": "someone/studio", "MOESPEC_MODEL": "Qwen3-30B-A3B-Instruct-2507"})
    assert service.hosting is Hosting.SPACE_CPU
    assert visit(service, "visitor")
    wait_until(lambda: "cannot run here" in service.notice)
    other = Service.of({"MOESPEC_MODEL": "gpt-5"})
    assert other.notice.startswith("MOESPEC_MODEL=gpt-5 is not on the list")
    assert other.notice.endswith("The embedded model answers.")


def test_a_head_that_cannot_be_used_gives_way_to_look_up():
    engine = app.loading.load_hosted(replace(NAMED, drafter=str(EMBEDDED_TARGET)))
    assert engine.info.drafter_name == "n-gram"
    assert engine.info.drafter_reason.startswith("the head of the list cannot be used: ")


def test_on_zero_gpu_a_model_that_cannot_be_lent_leaves_the_embedded_one(monkeypatch):
    from tests.app import fake_spaces

    monkeypatch.setitem(sys.modules, "spaces", fake_spaces)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    service = Service(hosting=Hosting.ZERO_GPU, wanted=replace(NAMED, hub_id="nobody/nothing"))
    service.stepper.prepare()
    assert service.notice.startswith("nobody/nothing could not be loaded: ")
    assert visit(service, "visitor") and service.info.model_name == "embedded model"
