"""Composes the page: the chat, its controls, the live panels. Loads no model at import."""

from __future__ import annotations

import contextlib
import html
import os
from collections.abc import Iterator
from typing import Any, NamedTuple

import gradio as gr

from app import controls as controls_module
from app.controls import Controls, build_guess_controls, build_load_controls, build_write_controls, read, read_live
from app.live import LiveRun, live_panels, notice
from app.service import MAX_TOGETHER, Service
from app.theme import CSS, studio_theme
from moespec import RunSummary

EXAMPLES = [
    "What is 12 + 30?",
    "Which is bigger, 34 or 43?",
    "Turn this into JSON: Ben is 31 years old and lives in Oslo.",
    "Tell me a short story.",
    "Who are you?",
]
PLACEHOLDER = "**Ask the small model something.**\nIts answer streams here; how it is made, beside it."
ENDINGS = {
    "eos": "The answer ended by itself.",
    "length": "Ended at the maximum number of new tokens.",
    "context": "Ended because the context is full.",
    "stopped": "Stopped.",
    "stop": "Ended at a stop text.",
}
BESIDE = " Written beside other visitors' answers: the times are those of steps that are shared."
History = list[dict[str, Any]]


class Visit(NamedTuple):
    """Whose answer it is, and which of theirs."""

    session: str
    ticket: int


def build_app(service: Service) -> gr.Blocks:
    """The page for a service."""
    with gr.Blocks(title="MoE-Spec Studio", analytics_enabled=False, fill_width=True) as page:
        gr.HTML(
            "<h1>MoE-Spec Studio</h1><p>Speculative decoding of a Mixture-of-Experts, "
            "with a budget on the experts that a step may read.</p>",
            elem_id="masthead",
        )
        with gr.Tabs(), gr.Tab("Chat"), gr.Row():
            with gr.Column(scale=5, min_width=340):
                chat = gr.Chatbot(
                    show_label=False,
                    height=330,
                    feedback_options=None,
                    buttons=["copy"],
                    render_markdown=False,
                    latex_delimiters=[],
                    placeholder=PLACEHOLDER,
                    elem_id="chat",
                )
                with gr.Row():
                    prompt = gr.Textbox(
                        show_label=False, placeholder="Write something and press Enter", autofocus=True, scale=6,
                        max_lines=4, label="Message", container=False, elem_id="prompt",
                    )  # fmt: skip
                    stop = gr.Button("Stop", variant="stop", scale=1, min_width=70, elem_id="stop")
                gr.Examples(EXAMPLES, prompt, label="Try one")
                with gr.Tabs():
                    controls = Controls(**build_load_controls(), **build_guess_controls(), **build_write_controls())
            with gr.Column(scale=6, min_width=340):
                live = live_panels()
                device = gr.Markdown("Loading the model…", elem_id="device")
        with gr.Accordion("Look closer at the last answer", open=False):
            plot = gr.Plot(show_label=False)
        _wire(page, service, controls, chat=chat, prompt=prompt, stop=stop, live=live, device=device, plot=plot)
    return page


def _wire(page: gr.Blocks, service: Service, controls: Controls, **parts: Any) -> None:
    chat, prompt, live, plot = parts["chat"], parts["prompt"], parts["live"], parts["plot"]

    def ask(request: gr.Request, text: str, history: History, *values: Any) -> tuple:
        try:
            if not text.strip():
                raise ValueError("Write something first: the message is empty.")
            read(values)  # what cannot be answered changes nothing
            ticket, frame = _join_queue(service, request)
            return "", _shown([*_plain(history), {"role": "user", "content": text}]), frame, ticket
        except ValueError as error:
            return gr.skip(), gr.skip(), _refusal(error), gr.skip()

    def ask_again(request: gr.Request, history: History, *values: Any) -> tuple:
        messages = _plain(history)
        while messages and messages[-1]["role"] == "assistant":
            messages.pop()
        try:
            read(values)
            ticket, frame = _join_queue(service, request)
            return _shown(messages), frame, ticket
        except ValueError as error:
            return gr.skip(), _refusal(error), gr.skip()

    def answer(request: gr.Request, ticket: int, history: History, *values: Any) -> Iterator[tuple]:
        visit = Visit(request.session_hash or "", ticket)
        try:
            yield from _answer(service, _plain(history), values, visit)
        finally:
            service.leave(*visit)

    def move(request: gr.Request, *values: Any) -> None:
        # A number is sent while it is typed: what is not a setting yet is passed over, and named when it is asked with.
        with contextlib.suppress(ValueError, TypeError):
            service.update(request.session_hash or "", *read_live(values))

    def halt(request: gr.Request) -> None:
        service.stop(request.session_hash or "")

    def gone(request: gr.Request) -> None:
        service.leave(request.session_hash or "")

    def clear(request: gr.Request) -> tuple:
        service.leave(request.session_hash or "")
        return notice("idle"), None

    ticket = gr.State(0)  # of the answer asked for last
    engine_turn: dict[str, Any] = {
        "concurrency_limit": MAX_TOGETHER,
        "concurrency_id": "engine",
        "show_progress": "hidden",
        # By default the browser drops an answer that is asked for before it has heard of the last one's end.
        "trigger_mode": "multiple",
    }
    at_once: dict[str, Any] = {"queue": False, "show_progress": "hidden"}
    # Queued: only of a queued event is the browser told that the ticket changed.
    asked: dict[str, Any] = {"concurrency_limit": None, "show_progress": "hidden"}
    prompt.submit(ask, [prompt, chat, *controls.all], [prompt, chat, live, ticket], **asked)
    chat.retry(ask_again, [chat, *controls.all], [chat, live, ticket], **asked)
    # Only who was given a ticket waits for the engine.
    ticket.change(answer, [ticket, chat, *controls.all], [chat, live, plot, prompt], **engine_turn)
    gr.on([widget.change for widget in controls.live], move, controls.live, None, preprocess=False, **at_once)
    controls.lossless.change(lambda on: gr.Slider(interactive=not on), controls.lossless, controls.budget, queue=False)
    parts["stop"].click(halt, None, None, queue=False)
    chat.clear(clear, None, [live, plot], queue=False)
    page.unload(gone)

    def ready(budget: float) -> tuple:
        try:
            return controls_module.limits(service.info, budget), _device_line(service)
        except ValueError as error:
            return gr.skip(), f"**No model:** {error}"

    page.load(ready, [controls.budget], [controls.budget, parts["device"]], queue=False, show_progress="hidden")


def _join_queue(service: Service, request: gr.Request) -> tuple[int, dict]:
    """(the ticket, what the live panels say)"""
    place = service.enter(request.session_hash or "")
    if place.num_before < MAX_TOGETHER:
        return place.ticket, notice("waiting", "Reading the prompt…")
    message = f"{MAX_TOGETHER} answers are written at a time, and {place.num_before} came first. Yours comes after."
    return place.ticket, notice("waiting", message)


def _refusal(error: ValueError) -> dict:
    """Says why where the visitor looks; no gr.Error, which would cover the panels."""
    gr.Warning(str(error))
    return notice("error", str(error))


def _answer(service: Service, messages: History, values: tuple, visit: Visit) -> Iterator[tuple]:
    """(chat, live frame, plot, prompt) at most 20 times a second; the plot once, at the end."""
    try:
        settings = read(values)
        kept = service.fit(messages, settings.generation)
        num_dropped = len(messages) - len(kept)
        remark = f"The oldest {num_dropped} messages no longer fit the context and are not read." if num_dropped else ""
        run = LiveRun(service.piece, service.info.num_experts)
        answered = {"role": "assistant", "content": ""}
        layers, frame = [], None
        for steps in service.stream(*visit, kept, settings.generation, settings.budget, settings.tree):
            if not service.expects(*visit):  # cleared: frames that were on their way have filled the chat again
                yield [], notice("idle"), None, gr.skip()
                return
            answered["content"] += "".join(step.text for step in steps)
            layers += [step.layers for step in steps if step.layers]
            if steps[0].kind == "prefill" and settings.budget.is_lossless and not steps[0].lossless:
                remark += " Lossy already: what stands before was written under a budget. Clear begins anew."
            if service.num_beside(visit.session) and BESIDE not in remark:
                remark += BESIDE
            frame = run.frame(steps, f"{remark} {_ending(steps[-1].summary)}".strip())
            yield _shown([*messages, answered]), frame, gr.skip(), gr.skip()
        if frame is None:
            yield gr.skip(), notice("done", "Stopped before it began."), gr.skip(), gr.skip()
        elif layers:
            from app.plots import expert_figure  # plotly takes a second, and only this needs it

            yield gr.skip(), gr.skip(), expert_figure(layers, service.info.num_experts), gr.skip()
    except ValueError as error:
        # Nothing is lost: the message goes back to where it can be changed.
        yield _shown(messages[:-1]), _refusal(error), gr.skip(), messages[-1]["content"]


def _ending(summary: RunSummary | None) -> str:
    return "" if summary is None else ENDINGS[summary.finish_reason]


def _device_line(service: Service) -> str:
    card, info = service.engine.card(), service.info
    return (
        f"{info.model_name}: {info.num_moe_layers} layers of {info.num_experts} experts, top-{info.top_k} · "
        f"drafter {info.drafter_name} ({info.drafter_reason}) · {card['name']}, {card['threads']} threads, "
        f"{card['dtype']}, {card['backend']} experts backend ({card['backend_reason']}), {info.kernels} kernels · "
        "measured here, now"
    )


def _shown(messages: History) -> History:
    """Messages as the chat shows them: as text, for it renders HTML even without Markdown, and in parts, for it takes
    the indentation off what is not."""
    return [
        message | {"content": [{"type": "text", "text": html.escape(message["content"], quote=False)}]}
        for message in messages
    ]


def _plain(history: History) -> History:
    """Gradio's messages as role and text: the inverse of `_shown`."""
    messages = []
    for message in history:
        content = message["content"]
        text = content if isinstance(content, str) else "".join(part.get("text", "") for part in content)
        messages.append({"role": message["role"], "content": html.unescape(text)})
    return messages


def launch() -> None:
    """Serve the page: on every interface in a Space, on this machine alone otherwise."""
    host = os.environ.get("HOST", "0.0.0.0" if "SPACE_ID" in os.environ else "127.0.0.1")
    service = Service()
    page = build_app(service)
    page.queue(max_size=16, api_open=False)
    page.launch(
        prevent_thread_lock=True,
        server_name=host,
        server_port=int(os.environ.get("PORT", "7860")),
        footer_links=[],
        run_history=False,
        theme=studio_theme(),
        css=CSS,
    )
    service.start()
    page.block_thread()
