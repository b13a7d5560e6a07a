"""The page on ZeroGPU: a forked process writes each answer, and what is not a pickle does not come through."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from app.settings import Settings
from app.zero import ChangeFile
from moespec import BudgetConfig, Control, Engine, TreeConfig
from tests.app.zero_page import SHORT, said

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def page() -> dict[str, Any]:
    """What `zero_page.py` found."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    program = [sys.executable, "tests/app/zero_page.py"]
    done = subprocess.run(program, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine.from_pretrained(ROOT / "assets" / "model")


def alone(engine: Engine, prompt: str, settings: Settings) -> Any:
    asked = settings.generation_config, settings.budget_config, settings.tree_config
    *_, last = engine.generate(said(prompt), *asked)
    return last.summary


def test_the_text_is_that_of_an_engine_in_this_process(page, engine):
    lossless = alone(engine, "Tell me a short story.", replace(SHORT, budget=None))
    assert page["lossless"]["text"] == page["lossless"]["summary"]["text"] == lossless.text
    assert page["lossless"]["summary"]["token_ids"] == lossless.token_ids and page["lossless"]["summary"]["lossless"]
    budgeted = alone(engine, "What is 12 + 30?", SHORT)
    assert page["next"]["text"] == budgeted.text and not page["next"]["summary"]["lossless"]
    assert page["lossless"]["num_layers"] == [engine.info.num_moe_layers], "each step brings its layers along"


def test_what_is_moved_or_stopped_reaches_the_worker(page):
    assert page["moved"]["budgets"] == [16, 20]
    assert page["stopped"]["summary"]["finish_reason"] == "stopped"
    assert len(page["stopped"]["summary"]["token_ids"]) < 300, "of 1500"


def test_a_closed_stream_ends_the_workers_run(page):
    assert page["closed"]["error"] is None and page["closed"]["worker"] == 0
    assert page["late"] < 30, "of hundreds of steps"
    assert not page["closed"]["left"]


def test_a_worker_that_dies_is_a_sentence_and_the_next_answer_is_written(page):
    assert page["died"]["worker"] == page["died_early"]["worker"] == -9
    kind, sentence = page["died"]["error"]
    # Killed between two messages, or in the middle of one.
    assert "GPU task aborted. What" in sentence or sentence.startswith("The GPU worker ended before its answer did")
    assert kind == "CutOffError" and "What was written stays" in sentence
    assert page["died_early"]["error"] == [
        "ValueError",
        "ZeroGPU gave no answer: GPU task aborted. Ask again, or for fewer tokens.",
    ]
    assert page["next"]["error"] is None and not page["died"]["left"]


def test_what_the_engine_refuses_in_the_worker_is_said_in_its_words(page):
    assert page["too_long"]["error"][0] == "ValueError" and "context is 4096" in page["too_long"]["error"][1]


def test_where_no_file_can_be_written_the_slider_is_said_to_act_later(page):
    assert page["deaf"]["is_deaf"] and not page["moved"]["is_deaf"]
    assert "acts from the next answer on" in page["told"][0]
    assert page["deaf"]["error"][0] == "CutOffError" and "stopped" in page["deaf"]["error"][1]


def test_the_page_knows_the_model_before_any_worker_and_its_machine_after_one(page, engine):
    before, after = page["before"], page["after"]
    for known in ("num_experts", "top_k", "num_moe_layers", "max_context"):
        assert before[known] == after[known] == getattr(engine.info, known)
    assert before["backend"] == "undecided" and after["backend"] == "cpu" == page["header"]["device"]["backend"]
    assert (after["drafter_name"], tuple(after["tap_layers"])) == ("EAGLE-3", engine.info.tap_layers)
    assert page["header"]["prompt"] == said("Hi")


def test_a_worker_is_asked_for_as_long_as_the_tokens_take(page):
    assert page["asked_for"] == [30 + 3, "large"]  # 40 tokens at 15 a second


def test_what_a_worker_cannot_do_is_refused_beforehand(page):
    budget, evict, cascade, advice = page["refused"]
    assert "outside 8 to 64" in budget
    assert evict.endswith("use fixed or cascade-like.") and cascade == "None"
    assert "cannot be measured" in advice


def test_a_change_file_tells_each_change_once_and_its_absence_stops():
    file, control = ChangeFile.new(), Control()
    file.write(Settings(budget=20, total_tokens=8), stopped=False)
    ChangeFile(file.path).pass_on(control)
    asked = BudgetConfig(), TreeConfig()
    assert control.settings(*asked) == (BudgetConfig(budget=20), TreeConfig(8))
    assert not control.stopped
    file.remove()
    file.write(Settings(), stopped=False)
    assert not file.path.exists(), "nobody reads it any more"
    ChangeFile(file.path).pass_on(control)
    assert control.stopped
