"""The Chat tab: the conversation, its controls, the live panels. Owns what a visitor does to a conversation."""

from __future__ import annotations

import contextlib
import html
from typing import Any

import gradio as gr

from app.advice import advice_in_words, recommended
from app.controls import LIVE, Controls, preset_of, read, slider_within, values_of
from app.live import keeper, live_panels
from app.messages import History, plain, shown
from app.recordings import Recordings
from app.service import Service
from app.settings import PRESETS, Settings, presets
from app.stepping import MAX_TOGETHER
from app.tabs import AT_ONCE, QUIET
from app.tabs.answering import FORGOTTEN, Answering, kept_history, refusal
from app.tabs.closer import Closer

EXAMPLES = [
    "What is 12 + 30?",
    "Which is bigger, 34 or 43?",
    "Turn this into JSON: Ben is 31 years old and lives in Oslo.",
    "Tell me a short story.",
    "Who are you?",
]
PLACEHOLDER = "**Ask the small model something.**\nIts answer streams here; how it is made, beside it."
CUT = "The page lost its connection, or was left, in mid-answer. What was written is kept: Retry writes it anew."
# A button that has gone takes the focus with it. Not where a keyboard would come up over the page.
TO_PROMPT = "() => matchMedia('(pointer: fine)').matches && document.querySelector('#prompt textarea').focus()"
OWN_SETTINGS = "Settings of your own; a preset takes you back."
LOOK_S = 5.0  # how often a page looks whether another model has taken over


class Chat:
    """The tab's widgets. Other tabs load settings into `controls`."""

    def __init__(self, service: Service, recordings: Recordings, recorded: dict[str, Any]) -> None:
        self.service, self.recordings, self.recorded = service, recordings, recorded
        self.answering = Answering(service, recordings, recorded)
        # On a phone the panels stand between the conversation and what is set (theme.py).
        with gr.Row(elem_id="studio"):
            with gr.Column(scale=5, min_width=320, elem_id="talk"):
                self._build_conversation()
                with gr.Column(elem_id="knobs"):
                    self._build_knobs()
            with gr.Column(scale=6, min_width=320, elem_id="panels"):
                self.live = live_panels(recordings, "live", recorded, movable=True, conversation="chat")
                self.device = gr.Markdown("Loading the model…", elem_id="device")
        self.closer = Closer(recordings)
        self.ticket = gr.State(0)  # of the answer asked for last
        self.keeper = keeper()

    def _build_conversation(self) -> None:
        self.markdown = gr.State(False)
        self.view = gr.Button("Markdown")
        self.chat = gr.Chatbot(
            show_label=False, height=300, feedback_options=None, buttons=["copy", "copy_all", self.view],
            editable="user", render_markdown=False, latex_delimiters=[], placeholder=PLACEHOLDER, elem_id="chat",
        )  # fmt: skip
        with gr.Row():
            self.prompt = gr.Textbox(
                show_label=False, placeholder="Write something and press Enter", autofocus=True, scale=6,
                max_lines=4, label="Message", container=False, elem_id="prompt",
            )  # fmt: skip
            # One place for both: which of them is there is told by the panels' state (theme.py).
            self.send = gr.Button("Send", variant="primary", size="md", scale=1, min_width=80, elem_id="send")
            self.stop = gr.Button("Stop", variant="stop", size="md", scale=1, min_width=80, elem_id="stop")
        gr.Examples(EXAMPLES, self.prompt, label="Try one", elem_id="examples")

    def _build_knobs(self) -> None:
        with gr.Row(elem_id="preset-row"):
            self.preset = gr.Radio(
                [*PRESETS], value="Balanced", label="Preset", show_label=False, container=False, elem_id="preset"
            )
            self.preset_help = gr.Markdown(PRESETS["Balanced"], elem_id="preset-help")
        with gr.Row(elem_id="advice-row"):
            self.advice = gr.Markdown("Advice for this machine: measuring it…", elem_id="advice")
            self.use_advice = gr.Button("Use it", size="sm", visible=False, elem_id="use-advice")
        self.advised = gr.State(None)  # the settings that the line advises
        with gr.Tabs():
            self.controls = Controls()

    def wire(self, page: gr.Blocks) -> None:
        """Connects what is done to what happens."""
        controls = self.controls
        engine_turn = QUIET | {
            "concurrency_limit": MAX_TOGETHER,
            "concurrency_id": "engine",
            "show_progress_on": [self.chat],  # its own buttons wait for the end
            # By default the browser drops an answer that is asked for before it has heard of the last one's end.
            "trigger_mode": "multiple",
        }
        # Queued: only of a queued event is the browser told that the ticket changed.
        asked = QUIET | {"concurrency_limit": None}
        outputs = [self.prompt, self.chat, self.live, self.ticket, self.keeper]
        asking = [self.prompt.submit, self.send.click]
        gr.on(asking, self._ask, [self.prompt, self.markdown, self.chat, controls.held], outputs, **asked)
        self.chat.retry(self._retry, [self.markdown, self.chat, controls.held], outputs, **asked)
        self.chat.edit(self._edit, [self.markdown, self.chat, controls.held], outputs, **asked)
        self.chat.undo(self._undo, [self.markdown, self.chat, controls.held], outputs, **asked)
        # Only who was given a ticket waits for the engine.
        answer_outputs = [self.chat, self.live, self.closer.finished, self.prompt, self.keeper]
        self.ticket.change(self.answering.answer, self.ticket, answer_outputs, **engine_turn)
        # Of moves that come while one is on its way, the last one counts.
        moves = AT_ONCE | {"trigger_mode": "always_last"}
        controls.held.change(self._move, controls.held, [self.preset, self.preset_help], **moves)
        lossless, method = controls["lossless"], controls["method"]
        lossless.change(_without_budget, lossless, [controls["budget"], method], **AT_ONCE)
        method.change(lambda text: False if text.strip() else gr.skip(), method, lossless, **AT_ONCE)
        self.preset.input(self._choose_preset, self.preset, controls.live, **AT_ONCE)
        self.live.cut(self._cut, None, [lossless, controls["budget"], method], trigger_mode="multiple", **AT_ONCE)
        self.stop.click(self._halt, None, None, **AT_ONCE)
        gr.on([self.send.click, self.stop.click], None, js=TO_PROMPT, **AT_ONCE)
        self.view.click(self._render, [self.markdown, self.chat], [self.markdown, self.chat], **AT_ONCE)
        cleared = [self.live, self.closer.plot, self.closer.finished, self.keeper]
        self.chat.clear(self._clear, None, cleared, **AT_ONCE)
        self.closer.wire()
        self.keeper.restored(self._restore, self.markdown, [self.chat, self.live, *controls.all], **AT_ONCE)
        page.unload(self._gone)
        sliders = [controls["budget"], controls["max_new_tokens"]]
        page.load(self._ready, sliders, [*sliders, self.device], **AT_ONCE)
        if self.service.is_to_change:
            gr.Timer(LOOK_S).tick(self._ready, sliders, [*sliders, self.device], **AT_ONCE)
        page.load(self._advise, None, [self.advice, self.use_advice, self.advised], **asked)
        self.use_advice.click(lambda settings: values_of(settings, LIVE), self.advised, controls.live, **AT_ONCE)

    # What a visitor does: each gives (prompt, chat, live, ticket, kept history).

    def _ask(self, request: gr.Request, text: str, markdown: bool, history: History, held: str) -> tuple:
        if not text.strip():
            return self._refused(request, ValueError("Write something first: the message is empty."))
        before = self.answering.caught_up(request.session_hash or "", plain(history))
        return self._enter(request, [*before, {"role": "user", "content": text}], markdown, held)

    def _retry(self, request: gr.Request, markdown: bool, history: History, held: str) -> tuple:
        messages = plain(history)
        while messages and messages[-1]["role"] == "assistant":
            messages.pop()
        return self._enter(request, messages, markdown, held)

    def _edit(self, edited: gr.EditData, request: gr.Request, markdown: bool, history: History, held: str) -> tuple:
        """What came after the message that was changed answered another one."""
        place = edited.index if isinstance(edited.index, int) else edited.index[0]
        before = plain(history)[:place]
        text = str(edited.value)  # as it was written (taken.js)
        if not text.strip():
            shown_again = [*before, {"role": "user", "content": html.unescape(str(edited.previous_value))}]
            error = ValueError("Write something: the message would be empty. The old one stays.")
            refused = self._refused(request, error)
            kept = [*shown_again, *plain(history)[place + 1 :]]
            return (refused[0], shown(kept, markdown), *refused[2:])
        return self._enter(request, [*before, {"role": "user", "content": text}], markdown, held)

    def _undo(self, request: gr.Request, markdown: bool, history: History, held: str) -> tuple:
        """Takes the last question back into the field where it can be changed, and its answer away."""
        messages = plain(history)
        while messages and messages[-1]["role"] == "assistant":
            messages.pop()
        text = messages.pop()["content"] if messages else ""
        self._give_up(request)
        if not messages:
            return text, [], self.recorded, gr.skip(), FORGOTTEN
        return text, shown(messages, markdown), gr.skip(), gr.skip(), kept_history(messages, held)

    def _enter(self, request: gr.Request, messages: History, markdown: bool, held: str) -> tuple:
        try:
            session, visitor = request.session_hash or "", self.service.limits.visitor(request)
            ticket, frame = self.answering.join(session, visitor, messages, held, markdown=markdown)
            return "", shown(messages, markdown), frame, ticket, kept_history(messages, held)
        except ValueError as error:
            return self._refused(request, error)

    def _refused(self, request: gr.Request, error: ValueError) -> tuple:
        """Panels that show an answer on its way go on with it."""
        told, place = refusal(error), self.service.queue.places.get(request.session_hash or "")
        is_answered = place is not None and place.series is None
        return gr.skip(), gr.skip(), gr.skip() if is_answered else told, gr.skip(), gr.skip()

    # What acts at once.

    def _move(self, request: gr.Request, held: str) -> tuple:
        # A number is sent while it is typed: what is not a setting yet is passed over, and named when it is asked with.
        with contextlib.suppress(ValueError, TypeError):
            settings = read(held)
            self.service.update(request.session_hash or "", settings)
            if self.service.is_loaded:
                preset = preset_of(settings, self.service.info)
                return preset, PRESETS.get(preset or "", OWN_SETTINGS)
        return gr.skip(), gr.skip()

    def _choose_preset(self, name: str) -> list[Any]:
        info = self.service.info
        return values_of(presets(info.top_k, info.num_experts)[name], LIVE)

    def _cut(self, moved: gr.EventData) -> tuple:
        info = self.service.info
        return False, min(max(int(moved.budget), info.top_k), info.num_experts), ""  # instead of another method

    def _halt(self, request: gr.Request) -> None:
        self.service.queue.stop(request.session_hash or "")

    def _gone(self, request: gr.Request) -> None:
        self.service.queue.leave(request.session_hash or "")

    def _give_up(self, request: gr.Request) -> None:
        """The chat's answer; a comparison or a sweep goes on."""
        session = request.session_hash or ""
        place = self.service.queue.places.get(session)
        if place is not None and place.series is None:
            self.service.queue.leave(session, place.ticket)

    def _clear(self, request: gr.Request) -> tuple:
        self._give_up(request)
        return self.recorded, None, "", FORGOTTEN

    def _render(self, request: gr.Request, markdown: bool, history: History) -> tuple:
        """The other view: as text, or as Markdown."""
        conversation = self.answering.view(request.session_hash or "", plain(history), markdown=not markdown)
        return not markdown, gr.update(value=conversation, render_markdown=not markdown)

    def _restore(self, kept: gr.EventData, markdown: bool) -> tuple:
        """A conversation that the browser has kept. What is no conversation is passed over."""
        skipped = [gr.skip()] * len(self.controls.all)
        messages = [
            {"role": one["role"], "content": one["content"]}
            for one in kept.messages
            if isinstance(one, dict)
            and one.get("role") in ("user", "assistant")
            and isinstance(one.get("content"), str)
        ]
        told = self.recorded | {"message": f"{CUT} {self.recorded['message']}"} if kept.isCut else gr.skip()
        with contextlib.suppress(ValueError, TypeError):
            return shown(messages, markdown), told, *values_of(Settings.from_json(kept.settings))
        return shown(messages, markdown), told, *skipped

    def _ready(self, budget: float, length: float) -> tuple:
        try:
            info, most = self.service.info, self.service.limits.max_new_tokens
            budgets = slider_within(info.top_k, info.num_experts, budget)
            return budgets, slider_within(min(16, most), most, length), device_line(self.service)
        except ValueError as error:
            return gr.skip(), gr.skip(), f"**No model:** {error}"

    def _advise(self) -> tuple:
        try:
            advice = self.service.advise()
            settings = recommended(advice)
            words = f"Advice for this machine, modelled: {advice_in_words(advice)}"
            return words, gr.update(visible=settings is not None), settings
        except ValueError as error:
            return f"No advice: {error}", gr.update(visible=False), None


def _without_budget(on: bool) -> tuple:
    """The budget's slider rests, and no other method takes experts away."""
    return gr.Slider(interactive=not on), "" if on else gr.skip()


def device_line(service: Service) -> str:
    card, info = service.engine.card(), service.info
    return (
        f"{info.model_name}: {info.num_moe_layers} layers of {info.num_experts} experts, top-{info.top_k} · "
        f"drafter {info.drafter_name} ({info.drafter_reason}) · {card['name']}, {card['threads']} threads, "
        f"{card['dtype']}, {card['backend']} experts backend ({card['backend_reason']}), {info.kernels} kernels · "
        f"measured here, now · on {service.hosting.value}" + (f" · **{service.notice}**" if service.notice else "")
    )
