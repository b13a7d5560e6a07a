"""Settings from links, files and controls: what is kept, what is refused, what presets ask for."""

from __future__ import annotations

import json
from dataclasses import fields

import gradio as gr
import pytest

from app.controls import NAMES, Controls, preset_of, read, values_of
from app.settings import PRESETS, Settings, presets
from moespec import EMBEDDED_TARGET, BudgetConfig, Engine, TreeConfig


def test_settings_survive_json_and_a_link_holds_what_differs():
    settings = Settings(budget=20, policy="truncation", temperature=0.7, system="Be brief.")
    assert Settings.from_json(json.loads(json.dumps(settings.to_json()))) == settings
    assert settings.changed() == {"budget": 20, "policy": "truncation", "temperature": 0.7, "system": "Be brief."}
    assert Settings.from_json(settings.changed()) == settings
    assert Settings().changed() == {}


def test_settings_are_what_the_engine_is_asked():
    settings = Settings(budget=16, score="natural", total_tokens=8, depth=4, top_k=2, min_path_p=0, seed=3, top_p=0.9)
    assert settings.budget_config == BudgetConfig(16, score="natural")
    assert settings.tree_config == TreeConfig(8, 4, 2, 0)
    assert (settings.generation_config.seed, settings.generation_config.top_p) == (3, 0.9)
    assert Settings(budget=None).is_lossless and not settings.is_lossless
    assert not Settings(budget=None, governor="utility:floor=0.7").is_lossless
    assert Settings(budget=None, drafter="none").tree_config.total_tokens == 1
    assert Settings(method="oea:k0=2").budget_config.policy_name.startswith("oea")


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ([], "are no settings"),
        ({"budgets": 3}, "'budgets' is not known: use budget, policy"),
        ({"budget": 0}, "budget=0 is not allowed"),
        ({"budget": "12"}, "budget='12' is not allowed"),
        ({"budget": 16.5}, "budget=16.5 is no number of experts: use a whole number"),
        ({"policy": "magic"}, "policy='magic' is not allowed"),
        ({"total_tokens": 65}, "total_tokens=65"),
        ({"protect_root": "yes"}, "protect_root='yes' is not allowed"),
        ({"governor": "me"}, "governor='me' is not allowed: use fixed, evict"),
        ({"drafter": "gpt"}, "drafter='gpt'"),
        ({"method": "oea:k0=none"}, "oea"),
        ({"method": "oea:k0=2", "governor": "utility:floor=0.7"}, "chooses a budget, and method=.oea:k0=2. is one"),
        ({"system": "x" * 5000}, "longer than 4000"),
        ({"temperature": None}, "temperature=None"),
        ({"seed": -1}, "seed=-1"),
    ],
)
def test_nonsense_is_refused_by_name(values, sentence):
    with pytest.raises(ValueError, match=sentence):
        Settings.from_json(values)


def test_controls_show_settings_and_give_them_back():
    for settings in (Settings(), Settings(budget=None), Settings(method="top-s:s=2"), Settings(seed=2**40, top_p=0.5)):
        values = values_of(settings)
        assert len(values) == len(NAMES) == len(fields(Settings)) + 1
        numbers = [float(v) if isinstance(v, int) and not isinstance(v, bool) else v for v in values]
        assert read(json.dumps(numbers)) == settings


def test_an_emptied_field_is_named():
    values = dict(zip(NAMES, values_of(Settings()), strict=True))
    with pytest.raises(ValueError, match="how many experts"):
        read(json.dumps([*(values | {"budget": None}).values()]))
    with pytest.raises(ValueError, match="The field max new tokens is empty"):
        read(json.dumps([*(values | {"max_new_tokens": None}).values()]))


def test_presets_are_known_by_what_they_ask_for():
    info = Engine.from_pretrained(EMBEDDED_TARGET).info
    found = presets(info.top_k, info.num_experts)
    assert [*found] == [*PRESETS]
    for name, settings in found.items():
        assert preset_of(settings, info) == name
    assert preset_of(Settings(temperature=0.5, seed=9), info) == "Balanced", "how answers are written is apart"
    assert preset_of(Settings(budget=13), info) is None
    assert found["Lossless"].is_lossless and found["Adaptive"].is_lossless
    assert found["Tight"].budget == info.top_k
    assert all(8 <= (settings.budget or 8) <= 128 for settings in presets(8, 128).values())


def test_controls_hold_the_usual_settings_until_they_are_moved():
    with gr.Blocks():
        controls = Controls()
    assert read(controls.held.value) == Settings()
    assert json.loads(controls.held.value) == [widget.value for widget in controls.all]
