"""Keeps a visitor's conversation in their browser: texts and settings, nothing else, and nowhere else."""

from __future__ import annotations

import gradio as gr

from app.live.live import read_part


def keeper() -> gr.HTML:
    """Its value, {messages, settings, isCut}, is what to keep; no messages forget. isCut: of an answer, only its
    beginning. Event `restored`: what was kept before."""
    return gr.HTML(
        value={},
        html_template="<span></span>",
        js_on_load=read_part("keeper.js"),
        apply_default_css=False,
        elem_id="keeper",
    )
