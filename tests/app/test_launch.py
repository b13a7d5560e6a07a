"""How the page starts, and what a Space reads before it does."""

from __future__ import annotations

import re
from pathlib import Path

import gradio as gr
import pytest
import yaml
from fastapi import FastAPI

import app.main
from app.hosting import MODELS, Hosting
from app.service import Service

ROOT = Path(__file__).resolve().parents[2]
KNOWN_KEYS = {
    *("title", "emoji", "colorFrom", "colorTo", "sdk", "sdk_version", "python_version", "app_file", "app_port"),
    *("base_path", "suggested_hardware", "fullWidth", "header", "short_description", "models", "datasets", "tags"),
    *("thumbnail", "pinned", "license", "hf_oauth", "disable_embedding", "startup_duration_timeout"),
    *("custom_headers", "preload_from_hub"),
}
COLOURS = {"red", "yellow", "green", "blue", "indigo", "purple", "pink", "gray"}
ADDED = {"/v1/models", "/v1/chat/completions", "/live/{recording_id}", "/recordings/{name}"}  # beside the page
ZERO_GPU_PYTHONS = {"3.10", "3.10.13", "3.12", "3.12.12"}
ZERO_GPU_TORCHES = {"2.8.0", "2.9.1", "2.10.0", "2.11.0"}


@pytest.fixture(scope="module")
def front_matter() -> dict:
    _, matter, _ = (ROOT / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(matter)


def pinned(package: str, python: str) -> str:
    """The version that requirements.txt names for a Python of this series."""
    lines = re.findall(rf"^{package}==([\d.]+)(?:; (.*))?$", (ROOT / "requirements.txt").read_text(), re.MULTILINE)
    (version,) = [version for version, marker in lines if not marker or (">=" in marker) == (python >= "3.12")]
    return version


def test_a_space_knows_every_key_and_value(front_matter):
    assert set(front_matter) <= KNOWN_KEYS
    assert front_matter["sdk"] == "gradio" and (ROOT / front_matter["app_file"]).is_file()
    assert {front_matter["colorFrom"], front_matter["colorTo"]} <= COLOURS
    assert len(front_matter["short_description"]) <= 60
    assert front_matter["license"] == "apache-2.0" and "Apache License" in (ROOT / "LICENSE").read_text()
    assert set(front_matter["models"]) == {model.hub_id for model in MODELS}


def test_a_space_installs_what_is_tested_here(front_matter):
    python = front_matter["python_version"]
    assert isinstance(python, str), "3.10 as a number would be 3.1"
    assert python in ZERO_GPU_PYTHONS
    assert front_matter["sdk_version"] == pinned("gradio", python)
    assert pinned("torch", python) in ZERO_GPU_TORCHES
    assert "spaces" not in (ROOT / "requirements.txt").read_text(), "ZeroGPU's image brings its own"


def test_a_model_is_lent_before_the_launch_and_routes_are_added_after_it(monkeypatch):
    done: list[str] = []
    served = FastAPI()

    service = Service(hosting=Hosting.ZERO_GPU)

    def start() -> None:
        added = {getattr(route, "path", "") for route in served.router.routes}
        done.append(f"start with {sorted(ADDED & added)}")

    def launch(page: gr.Blocks, **options) -> tuple:
        done.append(f"launch on {options['server_name']}")
        return served, None, None

    monkeypatch.setattr(Service, "of", staticmethod(lambda environment: service))
    monkeypatch.setattr(service.stepper, "prepare", lambda: done.append("prepare"))
    monkeypatch.setattr(service.stepper, "start", start)
    monkeypatch.setattr(gr.Blocks, "launch", launch)
    monkeypatch.setattr(gr.Blocks, "block_thread", lambda page: done.append("serve"))
    monkeypatch.delenv("HOST", raising=False)
    app.main.launch()
    assert done == ["prepare", "launch on 0.0.0.0", f"start with {sorted(ADDED)}", "serve"]


def test_no_event_tells_widgets_how_far_it_is():
    """Gradio copies each that hears of it at every message of every event. The chat's buttons wait for an end."""
    page = app.main.build_app(Service(), app.main.Recordings())
    events = page.get_config_file()["dependencies"]
    others = {"generate", "settings", "advise", "load_example"}  # the API's, and Gradio's own
    own = [event for event in events if event["outputs"] and event["api_name"] not in others]
    (chat,) = [one["id"] for one in page.get_config_file()["components"] if one["props"].get("elem_id") == "chat"]
    heard = [event["show_progress_on"] for event in own]
    assert len(own) > 30 and sorted(heard)[:-1] == [[]] * (len(own) - 1) and max(heard) == [chat]
