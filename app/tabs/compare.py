"""The Compare tab: one prompt under two to four settings, one after another. Owns what a visitor does there."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import gradio as gr

from app.controls import read
from app.live import notice, opened
from app.race import Contest, Running, Slot, race_panel, slot_of
from app.race.contest import (
    KINDS,
    LETTERS,
    MAX_CONTESTANTS,
    MAX_PROMPT_CHARACTERS,
    MAX_RUNS,
    MIN_CONTESTANTS,
    OWN,
    PLAIN,
    USUAL_RUNS,
)
from app.recordings import Recordings
from app.service import Service
from app.settings import Settings
from app.tabs import AT_ONCE, QUIET, replay
from app.tabs.chat import Chat

TAB = "compare"  # its id, and the name that a link's comparison goes by
NOBODY = "nobody"
USUAL = (PLAIN, "Lossless", "Balanced", NOBODY)
USUAL_PROMPT = "Tell me a short story."
LENGTHS = 16, 2048
WHY = (
    "**The same prompt, answered one after another.** Never at once: side by side they would share cores and memory "
    "bandwidth, and every time would be of the mixture. Each first writes a few tokens that do not count; then "
    "all take turns, round by round. They write at temperature 0 with one seed, unless own settings ask otherwise."
)
OWN_PLACEHOLDER = '{"budget": 20, "policy": "truncation"}'
CHECKING = "Looking at the settings…"
MEASURING = "Waiting until this machine has been measured for the advice in the chat: it must be idle…"
FROM_LINK = "From a link: press Compare to run it here."


class Compare:
    """The tab's widgets. `chat` has the settings that "as in the chat" stands for."""

    def __init__(self, service: Service, recordings: Recordings, chat: Chat) -> None:
        self.service, self.recordings, self.chat = service, recordings, chat
        self._running: dict[str, Running] = {}  # by visitor
        gr.Markdown(WHY, elem_id="compare-why")
        with gr.Row():
            self.prompt = gr.Textbox(
                USUAL_PROMPT, label="What shall they answer?", lines=2, max_lines=4, scale=4, min_width=300,
                max_length=MAX_PROMPT_CHARACTERS, elem_id="compare-prompt",
            )  # fmt: skip
            self.num_runs = gr.Slider(
                1, MAX_RUNS, USUAL_RUNS, step=1, label="Runs", info="Of each: medians and range.",
                scale=2, min_width=230,
            )  # fmt: skip
            self.length = gr.Slider(
                *LENGTHS, Settings.max_new_tokens, step=16, label="Maximum new tokens", info="Answers may end before.",
                scale=2, min_width=230,
            )  # fmt: skip
        with gr.Row():
            slots = [self._build_slot(*pair) for pair in zip(LETTERS, USUAL, strict=True)]
        self.kinds, self.owns = [kind for kind, _ in slots], [own for _, own in slots]
        with gr.Row():
            self.start = gr.Button("Compare", variant="primary", scale=0, min_width=160, elem_id="compare-start")
            self.stop = gr.Button("Stop", variant="stop", scale=0, min_width=90, elem_id="compare-stop")
        self.race = race_panel(notice("idle"))
        self.form = [self.prompt, self.num_runs, self.length, *self.kinds, *self.owns]

    def _build_slot(self, letter: str, usual: str) -> tuple[gr.Dropdown, gr.Textbox]:
        is_needed = LETTERS.index(letter) < MIN_CONTESTANTS
        with gr.Column(min_width=150):
            kind = gr.Dropdown([*KINDS, *([] if is_needed else [NOBODY])], value=usual, label=f"Contestant {letter}")
            own = gr.Textbox(
                label=f"Settings of {letter}, as JSON", placeholder=OWN_PLACEHOLDER, max_lines=3, visible=usual == OWN
            )
        kind.change(lambda chosen: gr.Textbox(visible=chosen == OWN), kind, own, **AT_ONCE)
        return kind, own

    def wire(self, page: gr.Blocks, tabs: gr.Tabs, replayed: tuple[gr.HTML, gr.Dropdown]) -> None:
        """Connects what is done to what happens. A link opens this tab of `tabs`; `replayed` is of `replay.build`."""
        self.start.click(
            self._compare, [self.chat.controls.held, *self.form], self.race, concurrency_limit=None, **QUIET
        )
        self.stop.click(self._halt, None, None, **AT_ONCE)
        self.race.replay(self._replay, None, [tabs, *replayed], **AT_ONCE)
        page.load(self._open_link, None, [tabs, self.race, *self.form], concurrency_limit=None, **QUIET)
        page.unload(self._halt)

    def _compare(self, request: gr.Request, held: str, *form: Any) -> Iterator[dict[str, Any]]:
        """Frames of the race, until the last has run."""
        session = request.session_hash or ""
        try:
            if session in self._running:
                raise ValueError("Your comparison is still running: stop it, or wait for its end.")
            yield notice("running", CHECKING)
            visitor = self.service.limits.visitor(request)
            running = Running(self.service, session, self._contest(form, held), visitor)
            running.check()
        except ValueError as error:
            yield notice("error", str(error))
            return
        self._running[session] = running
        try:
            yield from self._run(running)
        finally:
            del self._running[session]

    def _run(self, running: Running) -> Iterator[dict[str, Any]]:
        """What is finished is kept and shown, however it ends."""
        num_shown = -1
        try:
            yield notice("running", MEASURING)
            with contextlib.suppress(ValueError):  # no advice for this model
                self.service.advise()
            for saying in running.run():
                num_finished = running.num_finished
                frame = notice("running", saying) | {"num_finished": num_finished, "num_runs": running.num_runs}
                # Results between two runs alone: making and sending them takes time from what is measured.
                yield frame if num_finished == num_shown else frame | running.frame()
                num_shown = num_finished
            status, message = "done", _ending(running)
        except ValueError as error:
            status, message = "error", f"{error} What is finished is shown."
        except Exception as error:
            logging.exception("a comparison failed")
            status, message = "error", f"The comparison failed ({type(error).__name__}). What is finished is shown."
        yield notice(status, message) | running.frame(self.recordings)

    def _contest(self, form: Sequence[Any], held: str) -> Contest:
        """What the form asks for. ValueError names what is not allowed, and whose it is."""
        prompt, num_runs, length, *slots = form
        kinds, owns = slots[:MAX_CONTESTANTS], slots[MAX_CONTESTANTS:]
        if num_runs is None or length is None:
            raise ValueError("A number is missing: write how many runs, and how many new tokens at most.")
        contestants = []
        for letter, kind, own in zip(LETTERS, kinds, owns, strict=True):
            if kind == NOBODY:
                continue
            try:
                slot = Slot(kind, own or "")
                contestants.append(slot.settings(int(length), self.service.info, lambda: read(held)))
            except ValueError as error:
                raise ValueError(f"{letter}: {error}") from error
        return Contest(prompt or "", tuple(contestants), int(num_runs))

    def _halt(self, request: gr.Request) -> None:
        running = self._running.get(request.session_hash or "")
        if running is not None:
            running.stop()

    def _replay(self, asked: gr.EventData) -> tuple:
        try:
            recording = self.recordings.of(asked.run)
        except ValueError as error:
            gr.Warning(str(error))
            return (gr.skip(),) * 3
        return gr.Tabs(selected=replay.TAB), opened(recording, "opened", replay.about(recording), asked.title), None

    def _open_link(self, request: gr.Request) -> list[Any]:
        """Fills the tab with a link's comparison and shows it. What cannot be read changes nothing else."""
        nothing: list[Any] = [gr.skip()] * (2 + len(self.form))
        link = dict(request.query_params).get(TAB)
        if link is None:
            return nothing
        here = gr.Tabs(selected=TAB)
        try:
            return [here, notice("idle", FROM_LINK), *self._form_of(Contest.from_link(link))]
        except ValueError as error:
            sentence = f"The comparison in the link cannot be opened: {error} Nothing was changed."
            return [here, notice("error", sentence), *nothing[2:]]

    def _form_of(self, contest: Contest) -> list[Any]:
        """The values of `form`."""
        info, lengths = self.service.info, [settings.max_new_tokens for settings in contest.contestants]
        low, high = LENGTHS
        length = lengths[0] if low <= lengths[0] <= high else Settings.max_new_tokens
        slots = [slot_of(settings, length, info) for settings in contest.contestants]
        slots += [Slot(NOBODY)] * (MAX_CONTESTANTS - len(slots))
        return [contest.prompt, contest.num_runs, length, *(one.kind for one in slots), *(one.own for one in slots)]


def _ending(running: Running) -> str:
    num_finished, num_runs = running.num_finished, running.num_runs
    if num_finished < num_runs:
        return f"Stopped: {num_finished} of {num_runs} answers are finished, and shown."
    shared = sum(run.is_shared for runs in running.results for run in runs)
    beside = f" {shared} of them were written beside other visitors' answers: their times are of shared steps."
    return f"{num_runs} answers, one after another.{beside if shared else ''}"
