"""The closer look at the last answer: a figure to hover over, drawn when somebody opens it.

Owns when it is drawn: every answer's figure, drawn at its end, would hold up the last frames of everyone's answers.
"""

from __future__ import annotations

from typing import Any

import gradio as gr

from app.plots import expert_figure
from app.recordings import Recordings
from app.tabs import AT_ONCE


class Closer:
    """`finished` is to be given the id of an answer's recording at its end, and "" where there is no answer."""

    def __init__(self, recordings: Recordings) -> None:
        self._recordings = recordings
        with gr.Accordion("Look closer at the last answer", open=False) as self._part:
            self.plot = gr.Plot(show_label=False)
        self.finished, self._is_open = gr.State(""), gr.State(False)

    def wire(self) -> None:
        """Connects opening and finished answers to the figure."""
        self._part.expand(lambda run: (True, self._drawn(run)), self.finished, [self._is_open, self.plot], **AT_ONCE)
        self._part.collapse(lambda: False, None, self._is_open, **AT_ONCE)
        self.finished.change(self._follow, [self._is_open, self.finished], self.plot, **AT_ONCE)

    def _follow(self, is_open: bool, run: str) -> Any:
        return self._drawn(run) if is_open else gr.skip()

    def _drawn(self, run: str) -> Any:
        """Nothing of an answer without trees, or one that is too old to be kept."""
        try:
            layers = [step.layers for step in self._recordings.of(run).steps if step.kind == "tree"]
        except ValueError:
            return None
        return expert_figure(layers, len(layers[0][0].score)) if layers else None
