"""The Frontier tab's calculator: advice for a model and a card that need not be here. Owns its fields."""

from __future__ import annotations

from typing import Any

import gradio as gr

from app.advice import advice_lines, break_even_figure, choices_table, floors_table
from app.calculator import (
    EMBEDDED,
    HERE,
    MIXED,
    PROFILES,
    TYPED,
    TYPED_CARD,
    TYPED_MODEL,
    WEIGHTS,
    Question,
    Sizes,
)
from app.points import points_table, said, said_line
from app.service import Service
from app.tabs import AT_ONCE, QUIET

HINT = "Modelled from bytes and bandwidth before anything is loaded: hollow and dashed. Solid marks were measured."
STILL = "What stands below is the last that could be worked out."
FIRST_MODEL, FIRST_CARD = "Qwen3-30B-A3B", "H100"  # what is worked out before anything is chosen
FIRST_SIZES = {  # those of FIRST_MODEL, to start from
    "MoE layers": 48,
    "Experts": 128,
    "Top-k": 8,
    "Hidden size": 2048,
    "Expert size": 768,
    "Words": 151_936,
}


class Calculator:
    """Works out what was chosen whenever a choice is made, or a number is sent."""

    def __init__(self, service: Service) -> None:
        self.service = service
        gr.Markdown(f"## Would it pay on my card?\n{HINT}")
        with gr.Row():
            self.model = gr.Dropdown([FIRST_MODEL], value=FIRST_MODEL, label="Model", elem_id="calculator-model")
            self.card = gr.Dropdown([FIRST_CARD], value=FIRST_CARD, label="Card", elem_id="calculator-card")
            self.profile = gr.Dropdown(
                [*PROFILES], value=MIXED, label="How often first guesses are right, by depth", scale=2,
                elem_id="calculator-profile",
            )  # fmt: skip
            self.context = gr.Number(0, label="Positions in the cache", min_width=120, elem_id="calculator-context")
        with gr.Accordion("By numbers of your own", open=False, elem_id="calculator-own") as self.own:
            self._build_typed()
        self.work = gr.Button("Work it out", variant="primary", scale=0, min_width=160, elem_id="calculator-work")
        self.headline = said_line("calculator-said")
        with gr.Row():
            with gr.Column(scale=6, min_width=320):
                self.plot = gr.Plot(show_label=False, elem_id="calculator-plot")
            with gr.Column(scale=6, min_width=320):
                self.choices = points_table("calculator-choices")
                self.lines = said_line("calculator-lines")
        self.floors = points_table("calculator-floors")

    def _build_typed(self) -> None:
        with gr.Row():
            self.gb_per_s = gr.Number(3350, label="GB/s", info="Of the card's memory.", elem_id="calculator-gbs")
            self.typed = gr.Textbox(
                "", label="Acceptance", placeholder="0.8,0.7,0.6 or 3.1@32", max_lines=1, scale=2,
                info="Rates of first guesses by depth; or tokens per step, @ rows of the tree.",
                elem_id="calculator-typed",
            )  # fmt: skip
        with gr.Row():
            self.sizes: list[Any] = [gr.Number(size, label=name, min_width=100) for name, size in FIRST_SIZES.items()]
            self.sizes.append(gr.Dropdown([*WEIGHTS], value="bf16", label="Expert weights", min_width=100))

    def wire(self, tab: gr.Tab, opened: gr.State) -> None:
        """opened: whether the tab has been before."""
        inputs = [self.model, self.card, self.gb_per_s, self.profile, self.typed, self.context, *self.sizes]
        outputs = [self.headline, self.lines, self.choices, self.floors, self.plot]
        tab.select(self._offer, [opened, *inputs], [self.model, self.card, *outputs], **AT_ONCE)
        choices = [self.model, self.card, self.profile, self.sizes[-1]]
        numbers = [self.gb_per_s, self.typed, self.context, *self.sizes[:-1]]
        triggers = [self.work.click, *(one.input for one in choices), *(one.submit for one in numbers)]
        gr.on(triggers, self._answer, inputs, outputs, concurrency_limit=None, **QUIET)
        gr.on([one.input for one in choices], _open_typed, choices, self.own, **AT_ONCE)

    def _offer(self, opened: bool, *values: Any) -> Any:
        """All models and cards, and the first answer."""
        if opened:
            return [gr.skip()] * 7
        from moespec.advise import DEVICE_NAMES  # here, because torch takes seconds
        from moespec.published import PUBLISHED

        models = gr.Dropdown([EMBEDDED, *PUBLISHED, TYPED_MODEL])
        return models, gr.Dropdown([HERE, *DEVICE_NAMES, TYPED_CARD]), *self._answer(*values)

    def _answer(
        self, model: str, card: str, gb_per_s: Any, profile: str, typed: str, context: Any, *sizes: Any
    ) -> tuple:
        """(headline, what was asked about, recommended, floors, figure)"""
        question = Question(model, Sizes(*sizes), card, gb_per_s, profile, typed, context)
        try:
            advice = question.advice(self._here() if card == HERE else None)
            accepted = question.accepted_in_words(advice)
            figure = break_even_figure(advice, question.acceptance(advice), accepted)
        except ValueError as error:
            return said(f"{error} {STILL}"), *[gr.skip()] * 4
        lines = said("\n".join(advice_lines(advice, accepted)))
        return said("\n".join(advice.headlines)), lines, choices_table(advice), floors_table(advice), figure

    def _here(self) -> Any:
        """This machine, as it was measured for the chat's advice."""
        from moespec.advise import Device

        return Device(**self.service.advise().device)


def _open_typed(*chosen: str) -> Any:
    """Where something is to be typed, its field is shown."""
    return gr.Accordion(open=True) if set(chosen) & set(TYPED) else gr.skip()
