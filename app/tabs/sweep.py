"""The Frontier tab's sweep: a few prompts under a few budgets, run here on the loaded model.

Owns how it is begun, stopped and run: one answer after another through the service, in the visitor's own place.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import gradio as gr

from app.controls import Controls, read
from app.places import Series
from app.points import points_table, said, said_line
from app.service import Service
from app.settings import Settings
from app.sweep import Trial, beside_note, found, spread_prompts, sweep_figure, sweep_table, to_try
from app.tabs import AT_ONCE, QUIET
from moespec.cost import budget_ladder

NUM_SUGGESTED = 4  # budgets that are ticked for a newcomer
HINT = (
    "The same few prompts, greedy, under each budget you tick, without one, and by plain decoding. How experts are "
    "ranked and trees are drafted is as in the chat's controls. It takes your place in the queue; others' chats go on."
)
EMPTY = "A row for each setting, with the spread over prompts, appears here as the sweep runs; its figure at the end."
WAITING = "One sweep runs at a time: waiting for its turn."


class Sweep:
    """What was measured stays until a visitor's next sweep has its first answer."""

    def __init__(self, service: Service, controls: Controls) -> None:
        self.service, self.controls = service, controls
        self.stops: dict[str, threading.Event] = {}  # by session, of sweeps that were asked for
        self.series: dict[str, Series] = {}  # of those that have begun
        gr.Markdown(f"## And here, on the model that is loaded?\n{HINT}")
        with gr.Row():
            self.budgets = gr.CheckboxGroup(
                [], label="Budgets to try", info="Experts per layer.", scale=4, min_width=280, elem_id="sweep-budgets"
            )
            self.num_prompts = gr.Slider(
                1, 12, 4, step=1, label="Prompts", info="More tell more.", min_width=180, elem_id="sweep-prompts"
            )
            self.length = gr.Slider(
                16, 128, 48, step=16, label="Tokens", info="Per answer, at most.", min_width=180, elem_id="sweep-length"
            )
        with gr.Row():
            self.start = gr.Button("Sweep", variant="primary", scale=0, min_width=160, elem_id="sweep-start")
            self.stop = gr.Button("Stop the sweep", variant="stop", scale=0, min_width=200, elem_id="sweep-stop")
        self.line = said_line("sweep-said")
        with gr.Row():
            with gr.Column(scale=7, min_width=320):
                self.table = points_table("sweep-table", plot="sweep-plot", empty=EMPTY)
            with gr.Column(scale=5, min_width=320):
                self.plot = gr.Plot(show_label=False, elem_id="sweep-plot", visible=False)

    def wire(self, page: gr.Blocks, tab: gr.Tab, opened: gr.State) -> None:
        """opened: whether the tab has been before."""
        tab.select(self._offer, opened, [self.budgets, self.line], **AT_ONCE)
        asked = self.start.click(self._ask, None, self.line, **AT_ONCE)
        asked.then(
            self._run,
            [self.budgets, self.num_prompts, self.length, self.controls.held],
            [self.line, self.table, self.plot],
            concurrency_limit=1,  # of the answers that are written together, sweeps write one
            concurrency_id="sweep",
            **QUIET,
        )
        self.stop.click(self._halt, None, None, **AT_ONCE)
        page.unload(self._gone)

    def _offer(self, opened: bool) -> Any:
        """Budgets of the loaded model, which is waited for."""
        if opened:
            return gr.skip(), gr.skip()
        try:
            info = self.service.info
        except ValueError as error:
            return gr.skip(), said(f"No model to sweep: {error}")
        ladder = [f"{budget}" for budget in budget_ladder(info.top_k, info.num_experts)]
        return gr.CheckboxGroup(ladder, value=ladder[:NUM_SUGGESTED]), gr.skip()

    def _ask(self, request: gr.Request) -> dict:
        self.stops[request.session_hash or ""] = threading.Event()
        return said(WAITING)

    def _halt(self, request: gr.Request) -> None:
        session = request.session_hash or ""
        stopped = self.stops.get(session)
        if stopped is not None:  # else the answer that is being written is the chat's
            stopped.set()
            self.service.queue.stop(session, self.series.get(session))

    def _gone(self, request: gr.Request) -> None:
        stopped = self.stops.pop(request.session_hash or "", None)
        if stopped is not None:
            stopped.set()

    def _run(
        self, request: gr.Request, budgets: list[str], num_prompts: float | None, length: float | None, held: str
    ) -> Iterator[tuple]:
        """(what is said, table, figure) for each answer; the figure once, at the end."""
        session = request.session_hash or ""
        settings: dict[str, Settings] = {}
        trials: list[Trial] = []
        total, end = 0, "Stopped."
        try:
            if num_prompts is None or length is None:
                raise ValueError("A number is missing: write how many prompts, and how many tokens at most.")
            settings = to_try(read(held), [int(budget) for budget in budgets], int(length))
            for one in settings.values():
                self.service.check(one)
            prompts = spread_prompts(int(num_prompts))
            total = len(prompts) * len(settings)
            for trial in self._trials(request, settings, prompts):
                trials.append(trial)
                message = f"{len(trials)} of {total} answers written.{beside_note(trials)}"
                yield said(message, len(trials), total), sweep_table(found(settings, trials)), gr.skip()
            end = "Done." if len(trials) == total else end
        except ValueError as error:
            end = f"{error}"
        except Exception as error:
            logging.exception("a sweep failed")
            end = f"The sweep failed ({type(error).__name__}): try again."
        finally:
            self.stops.pop(session, None)
            self.series.pop(session, None)
        if not trials:  # what an earlier sweep has measured stays
            yield said(end), gr.skip(), gr.skip()
            return
        entries = found(settings, trials)
        summary = f"{end} {len(trials)} of {total} answers, measured here.{beside_note(trials)}"
        yield said(summary), sweep_table(entries), gr.update(value=sweep_figure(entries), visible=True)

    def _trials(
        self, request: gr.Request, settings: dict[str, Settings], prompts: Sequence[list[dict[str, str]]]
    ) -> Iterator[Trial]:
        """Prompt by prompt, so that what changes on the machine meanwhile touches all settings alike; until stopped."""
        session, visitor = request.session_hash or "", self.service.limits.visitor(request)
        stopped = self.stops.get(session)
        series = self.series[session] = Series()
        for number, messages in enumerate(prompts):
            for name, one in settings.items():
                if stopped is None or stopped.is_set():
                    return
                place = self.service.queue.enter(session, visitor, series)
                trial = self._trial(session, place.ticket, number, messages, name, one)
                if trial is None:
                    return
                yield trial

    def _trial(
        self,
        session: str,
        ticket: int,
        prompt: int,
        messages: list[dict[str, str]],
        name: str,
        settings: Settings,
    ) -> Trial | None:
        """None for an answer that was cut short: it says nothing of its setting."""
        service = self.service
        is_beside, summary = False, None
        try:
            for steps in service.stream(session, ticket, messages, settings):
                is_beside = is_beside or service.queue.num_beside(session) > 0
                summary = steps[-1].summary
        finally:
            service.queue.leave(session, ticket)
        if summary is None or summary.finish_reason == "stopped":
            return None
        return Trial.of(name, prompt, summary, is_beside)
