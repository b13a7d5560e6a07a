"""The component that shows a contest: the race, the texts, the table. Owns how its files become one gr.HTML.

What it is sent: `outcome.race_frame`, with a status and a message. Draws with the live panels' own helpers and style.
"""

from __future__ import annotations

from pathlib import Path

import gradio as gr

from app.live.live import read_part
from app.race.outcome import Frame

_FOLDER = Path(__file__).parent
SCRIPTS = ("lanes.js", "table.js", "race.js")


def race_panel(value: Frame) -> gr.HTML:
    """Its template is constant: model text reaches the page through the script's `textContent` alone. The event
    `replay` names the recording of a contestant's answer, `run`."""
    return gr.HTML(
        value=value,
        html_template=_read("race.html"),
        css_template=read_part("live.css") + _read("race.css"),
        js_on_load=read_part("draw.js") + "\n".join(map(_read, SCRIPTS)),
        apply_default_css=False,
        elem_id="race",
    )


def _read(name: str) -> str:
    return (_FOLDER / name).read_text(encoding="utf-8")
