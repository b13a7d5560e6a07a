"""The page's controls, grouped as people think: how much to load, how far to guess, how to write.

Owns the widgets and how their values become `Settings`, and back. Knows nothing of chats or panels.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import gradio as gr

from app.settings import DRAFTERS, MAX_SYSTEM_CHARACTERS, Settings, presets
from app.tabs import AT_ONCE

if TYPE_CHECKING:
    from moespec import EngineInfo

LOSSLESS = "lossless"  # the one widget that is no setting: ticked, the budget is None
NAMES = (LOSSLESS, *(field.name for field in fields(Settings)))
GROUPS = {
    "How much to load": (LOSSLESS, "budget", "policy", "score", "row_weight", "protect_root", "method"),
    "How far to guess": ("drafter", "total_tokens", "depth", "top_k", "min_path_p", "governor"),
    "How to write": ("temperature", "top_p", "max_new_tokens", "seed", "ignore_eos", "system"),
}
# What acts while an answer is written, and what presets, points and advice set: how answers are written stays as it is.
LIVE = (*GROUPS["How much to load"], *GROUPS["How far to guess"])
DRAFTER_LABELS = {"auto": "the model's own", "ngram": "n-gram look-up", "none": "none"}
GOVERNOR_LABELS = {
    "none: the tree as set": "fixed",
    "utility (ours)": "utility",
    "utility, lossy, keeps 85 % of the mass": "utility:floor=0.85",
    "utility, lossy, keeps 70 % of the mass": "utility:floor=0.7",
    "EVICT": "evict",
    "Cascade-like": "cascade-like",
}


class Controls:
    """The widgets by name; `all` in the order of NAMES. `held`: what they are set to, for events to read: Gradio has a
    browser copy each widget that an event reads, with all it holds, at every message."""

    def __init__(self) -> None:
        self.widgets: dict[str, Any] = {}
        for (group, names), build in zip(GROUPS.items(), (_load, _guess, _write), strict=True):
            with gr.Tab(group):
                self.widgets |= build()
                reset = gr.Button("Reset these", size="sm", variant="secondary", elem_classes="reset")
            outputs = [self.widgets[name] for name in names]
            reset.click(_defaults(names), None, outputs, **AT_ONCE)
        self.all = [self.widgets[name] for name in NAMES]
        self.live = [self.widgets[name] for name in LIVE]
        self.held = gr.Textbox(json.dumps([widget.value for widget in self.all]), visible=False)
        changes = [widget.change for widget in self.all]
        gr.on(changes, None, self.all, self.held, js="(...values) => JSON.stringify(values)", **AT_ONCE)

    def __getitem__(self, name: str) -> Any:
        return self.widgets[name]


def read(held: str) -> Settings:
    """What `Controls.held` holds: the values of all, as JSON. ValueError names what is not allowed."""
    named = dict(zip(NAMES, json.loads(held), strict=True))
    is_lossless = named.pop(LOSSLESS)
    if is_lossless:
        named["budget"] = None
    elif named["budget"] is None and not (named["method"] or "").strip():
        raise ValueError("Choose how many experts a layer may read, or tick No budget.")
    empty = [name for name, value in named.items() if value is None and name != "budget"]
    if empty:
        raise ValueError(f"The field {empty[0].replace('_', ' ')} is empty: write a number, or reset it.")
    return Settings.from_json(named)


def values_of(settings: Settings, names: Sequence[str] = NAMES) -> list[Any]:
    """What the widgets of these names show for the settings."""
    named = settings.to_json() | {LOSSLESS: settings.budget is None and not settings.method}
    if settings.budget is None:
        named["budget"] = Settings.budget  # where the slider stands without one
    return [named[name] for name in names]


def _defaults(names: Sequence[str]) -> Any:
    return lambda: values_of(Settings(), names)


def _load() -> dict[str, Any]:
    with gr.Row():
        lossless = gr.Checkbox(
            False, label="No budget", info="Lossless: every expert that the router asks for.", elem_classes="tick"
        )
        # The ends are the loaded model's top-k and experts, once it is there.
        budget = gr.Slider(
            8, 64, Settings.budget, step=1, label="Experts per layer", info="At most this many are read per step.",
            scale=3, elem_id="budget",
        )  # fmt: skip
        policy = gr.Radio(
            [("substitute", "substitution"), ("truncate", "truncation")], value=Settings.policy, scale=2, min_width=170,
            label="A dropped expert's place", info="Goes to a kept one, or is left empty.",
        )  # fmt: skip
    with gr.Accordion("How experts are ranked, and other methods", open=False), gr.Row():
        score = gr.Radio(
            [("all router probability", "softmax"), ("only weight that would be used", "natural")],
            value=Settings.score, label="Score", info="What is summed over the tree; the first is the paper's.",
        )  # fmt: skip
        row_weight = gr.Radio(
            [("all alike", "uniform"), ("by depth", "depth"), ("by the drafter's confidence", "path")],
            value=Settings.row_weight, label="Weight of a row", info="How much a guess counts; first the paper's.",
        )  # fmt: skip
        protect_root = gr.Checkbox(
            False, label="Protect the root", info="Its token is already written: never take its experts.",
            elem_classes="tick",
        )  # fmt: skip
        method = gr.Textbox(
            "", label="Another method", placeholder="oea:k0=2", max_lines=1,
            info="A rival's setting, instead of the budget: oea:k0=, sere:s=, accept-moe-like:scale=, top-s:s=",
        )  # fmt: skip
    return {
        LOSSLESS: lossless,
        "budget": budget,
        "policy": policy,
        "score": score,
        "row_weight": row_weight,
        "protect_root": protect_root,
        "method": method,
    }


def _guess() -> dict[str, Any]:
    with gr.Row():
        drafter = gr.Radio(
            [(DRAFTER_LABELS[name], name) for name in DRAFTERS], value=Settings.drafter, label="Drafter",
            info="Who guesses; another one from the next answer on.", min_width=150,
        )  # fmt: skip
        total = gr.Slider(
            1, 64, Settings.total_tokens, step=1, label="Tree size", info="Rows with the root; 1 guesses nothing."
        )
        depth = gr.Slider(1, 8, Settings.depth, step=1, label="Depth", info="Levels below the root.")
    with gr.Row():
        top_k = gr.Slider(1, 8, Settings.top_k, step=1, label="Top-k", info="Guesses tried per node.")
        least = gr.Slider(
            0, 0.5, Settings.min_path_p, step=0.01, label="Least likely path", info="Below this, no guess is kept."
        )
        governor = gr.Dropdown(
            list(GOVERNOR_LABELS.items()), value=Settings.governor, label="Governor",
            info="Chooses the tree anew each step, from the next answer on.",
        )  # fmt: skip
    return {
        "drafter": drafter,
        "total_tokens": total,
        "depth": depth,
        "top_k": top_k,
        "min_path_p": least,
        "governor": governor,
    }


def _write() -> dict[str, Any]:
    with gr.Row():
        temperature = gr.Slider(
            0, 1.5, Settings.temperature, step=0.1, label="Temperature", info="0 always takes the likeliest."
        )
        top_p = gr.Slider(
            0.05, 1, Settings.top_p, step=0.05, label="Top-p", info="Draws among the likeliest that hold this share."
        )
        length = gr.Slider(
            16, 2048, Settings.max_new_tokens, step=16, label="Maximum new tokens", info="The answer ends there."
        )
    with gr.Row():
        seed = gr.Number(Settings.seed, precision=0, label="Seed", info="Same seed, same text.", min_width=90)
        ignore_eos = gr.Checkbox(
            False, label="Keep writing", info="Past its end, to watch for longer.", elem_classes="tick"
        )
        system = gr.Textbox(
            "", label="System prompt", info="Stands before the conversation.",
            placeholder="none", max_lines=2, max_length=MAX_SYSTEM_CHARACTERS, scale=3,
        )  # fmt: skip
    return {
        "temperature": temperature,
        "top_p": top_p,
        "max_new_tokens": length,
        "seed": seed,
        "ignore_eos": ignore_eos,
        "system": system,
    }


def slider_within(low: int, high: int, value: float | None) -> dict[str, Any]:
    """A slider's ends; its value only where it must change."""
    if value is None or low <= value <= high:
        return gr.update(minimum=low, maximum=high)
    return gr.update(minimum=low, maximum=high, value=low)


def preset_of(settings: Settings, info: EngineInfo) -> str | None:
    """The name of the preset that these settings are, how they write aside."""
    apart = GROUPS["How to write"]
    for name, preset in presets(info.top_k, info.num_experts).items():
        theirs = preset.to_json()
        if all(theirs[key] == value for key, value in settings.to_json().items() if key not in apart):
            return name
    return None
