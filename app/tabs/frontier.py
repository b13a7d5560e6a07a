"""The Frontier tab: what quality costs in speed, measured and reported; a sweep of one's own; would it pay elsewhere.

Owns the committed record's part, and how a point's settings get into the chat.
"""

from __future__ import annotations

from typing import Any

import gradio as gr

from app.controls import LIVE, Controls, values_of
from app.frontier import (
    committed,
    committed_figure,
    committed_note,
    committed_table,
    in_words,
    reported_note,
    reported_table,
)
from app.points import points_table, said, said_line
from app.service import Service
from app.settings import Settings
from app.tabs import AT_ONCE
from app.tabs.calculator import Calculator
from app.tabs.sweep import Sweep

READING = "Reading the committed record…"
LOAD_HINT = "Hover over a point for its settings. Click it, or its row's button, to load them into the chat's controls."


def build(service: Service, controls: Controls, page: gr.Blocks, tab: gr.Tab) -> None:
    """controls: the chat's, which points are loaded into. tab: whose first opening reads the record."""
    opened = gr.State(False)
    gr.Markdown("## What does quality cost in speed?")
    with gr.Row():
        with gr.Column(scale=7, min_width=320):
            plot = gr.Plot(show_label=False, elem_id="frontier-plot")
            note = said_line("frontier-note", READING)
        with gr.Column(scale=5, min_width=320):
            gr.Markdown("### And in the paper, on larger models?")
            reported = points_table("frontier-reported")
            reported_about = said_line("frontier-reported-note")
    line = said_line("frontier-said", LOAD_HINT)
    table = points_table("frontier-table", plot="frontier-plot")
    tab.select(show_record, opened, [plot, note, table, reported, reported_about], **AT_ONCE)
    sweep = Sweep(service, controls)
    sweep.wire(page, tab, opened)
    Calculator(service).wire(tab, opened)
    tab.select(lambda: True, None, opened, **AT_ONCE)

    def chosen(data: gr.EventData) -> tuple:
        return load(service, data.settings)

    for rows, answer in ((table, line), (sweep.table, sweep.line)):
        rows.chosen(chosen, None, [answer, *controls.live], **AT_ONCE)


def show_record(opened: bool) -> Any:
    """(figure, its note, its table, the reported table, its note), when the tab is first opened."""
    if opened:
        return [gr.skip()] * 5
    record = committed()
    figure, table = committed_figure(record), committed_table(record)
    return figure, said(committed_note(record)), table, reported_table(), said(reported_note(record))


def load(service: Service, chosen: Any) -> tuple:
    """(what is said, values of the chat's live controls). What cannot be asked with changes nothing."""
    try:
        settings = Settings.from_json(chosen)
        service.check(settings)
    except (ValueError, TypeError) as error:
        return said(f"Not loaded: {error}"), *[gr.skip()] * len(LIVE)
    return said(f"Loaded into the chat's controls: {in_words(settings)}."), *values_of(settings, LIVE)
