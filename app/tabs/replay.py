"""The Replay tab: a recorded trace, ours or the visitor's own file, in the panels of the chat, and no model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr

from app.live import live_panels, notice, opened
from app.recordings import Recording, Recordings
from app.tabs import AT_ONCE

TAB = "replay"  # its id
HINT = "A trace is what `python -m moespec generate --trace FILE` writes, or what an answer in the chat is exported as."


def build(recordings: Recordings, examples: dict[str, Recording]) -> tuple[gr.HTML, gr.Dropdown]:
    """The panels, in which other tabs open recordings, and which of ours is open.

    examples: those that ship with us, by what they are called.
    """
    first, recording = next(iter(examples.items()))
    with gr.Row(elem_id="replay-head"):
        choice = gr.Dropdown(
            [*examples], value=first, label="What would you like to see again?",
            info="Recorded answers; nothing is computed.", scale=3, elem_id="replay-choice",
        )  # fmt: skip
        file = gr.UploadButton("Open a trace…", file_types=[".jsonl"], scale=1, min_width=140, elem_id="replay-file")
    gr.Markdown(HINT, elem_id="replay-hint")
    at_its_end = {"at": len(recording.steps) - 1}  # from where ▶ begins anew
    still = opened(recording, "still", f"{about(recording)} Press ▶ to play it.", first) | at_its_end
    panels = live_panels(recordings, "replay", still, movable=False)

    def show(name: str | None) -> Any:
        if name not in examples:
            return gr.skip()
        recording = examples[name]
        return opened(recording, "opened", about(recording), name)

    def upload(path: str | None) -> Any:
        if path is None:
            return gr.skip(), gr.skip()
        try:
            recording = recordings.open(Path(path))
            return opened(recording, "opened", about(recording), Path(path).name), None  # none of ours is open
        except (ValueError, OSError) as error:
            return notice("error", f"{error} What was open stays."), gr.skip()

    choice.input(show, choice, panels, **AT_ONCE)
    file.upload(upload, file, [panels, choice], **AT_ONCE)
    return panels, choice


def about(recording: Recording) -> str:
    """Where a recording is from, and what it was asked."""
    header = recording.header
    settings = header.settings.get("budget")
    budget = settings.get("budget") if isinstance(settings, dict) else None
    asked = (
        f"Recorded on {header.device.get('name', 'an unknown machine')}, model {header.model.get('name', 'unknown')}, "
    )
    return f"{asked}{'no budget' if budget is None else f'budget {budget}'}. Asked: {recording.question}"
