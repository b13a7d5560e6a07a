"""Composes the page from its tabs and serves it. Loads no model at import."""

from __future__ import annotations

import getpass
import os
import tempfile
from pathlib import Path

import gradio as gr

from app.api import add_endpoints
from app.live import opened
from app.openai_api import openai_router
from app.recordings import Recordings
from app.routes import page_router
from app.service import Service
from app.stepping import MAX_TOGETHER
from app.tabs import about, frontier, replay
from app.tabs.chat import Chat
from app.tabs.compare import TAB, Compare
from app.theme import CSS, studio_theme
from moespec.trace_reading import MAX_BYTES as MAX_TRACE_BYTES

TRACES = Path(__file__).resolve().parent.parent / "assets" / "traces"
EXAMPLES = {  # the first plays before the first prompt
    "A story, budget 16": "story.jsonl",
    "Arithmetic, no budget": "sum.jsonl",
    "A form, budget 8": "json.jsonl",
}
KEPT_FILES_S = 3600  # uploads
# How often Gradio looks whether somebody asks for something. Its own thousand times a second take a tenth of a core,
# and the interpreter from the thread that makes steps.
LOOK_S = 0.02
RECORDED = "Recorded on {}, and played slowly. Ask something to see it live."


def build_app(service: Service, recordings: Recordings) -> gr.Blocks:
    """The page for a service."""
    with gr.Blocks(
        title="MoE-Spec Studio", analytics_enabled=False, fill_width=True, delete_cache=(KEPT_FILES_S, KEPT_FILES_S)
    ) as page:
        gr.HTML(
            "<h1>MoE-Spec Studio</h1><p>Speculative decoding of a Mixture-of-Experts, "
            "with a budget on the experts that a step may read.</p>",
            elem_id="masthead",
        )
        examples = {name: recordings.open(TRACES / file, keep=True) for name, file in EXAMPLES.items()}
        with gr.Tabs() as tabs:
            with gr.Tab("Chat"):
                first = next(iter(examples.values()))
                message = RECORDED.format(first.header.device["name"])
                chat = Chat(service, recordings, opened(first, "recorded", message, "recorded"))
            with gr.Tab("Compare", id=TAB):
                compare = Compare(service, recordings, chat)
            with gr.Tab("Frontier") as tab:
                frontier.build(service, chat.controls, page, tab)
            with gr.Tab("Replay", id=replay.TAB):
                replayed = replay.build(recordings, examples)
            with gr.Tab("About"):
                about.build(recordings, first)
        chat.wire(page)
        compare.wire(page, tabs, replayed)
        add_endpoints(service)
    return page


def serve(service: Service, host: str, port: int) -> gr.Blocks:
    """Serve the page, and the addresses beside it, from a thread of its own."""
    recordings = Recordings()
    page = build_app(service, recordings)
    # Closed: the one way in is the queue, for other programs too.
    page.queue(max_size=service.limits.num_places + MAX_TOGETHER, api_open=False)
    page._queue.sleep_when_free = LOOK_S
    app, _, _ = page.launch(
        prevent_thread_lock=True,
        server_name=host,
        server_port=port,
        footer_links=[],
        max_file_size=MAX_TRACE_BYTES,
        run_history=False,
        theme=studio_theme(),
        css=CSS,
    )
    # Before the page's own, of which the last takes every address.
    app.router.routes[:0] = [*page_router(recordings).routes, *openai_router(service).routes]
    return page


def launch() -> None:
    """Serve the page: on every interface in a Space, on this machine alone otherwise."""
    # Gradio's own folder for uploads is one for all users of a machine: the second of them could open no trace.
    os.environ.setdefault("GRADIO_TEMP_DIR", str(Path(tempfile.gettempdir()) / f"moe-spec-studio-{getpass.getuser()}"))
    service = Service.of(os.environ)
    service.stepper.prepare()
    host = os.environ.get("HOST", "0.0.0.0" if service.hosting.is_space else "127.0.0.1")
    page = serve(service, host, int(os.environ.get("PORT", "7860")))
    service.stepper.start()
    page.block_thread()
