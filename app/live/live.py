"""The component that draws an answer: live, replayed or recorded. Owns how its files become one gr.HTML, and what it
may ask the server for. What it is sent: `frames.py`.
"""

from __future__ import annotations

import functools
import hashlib
import threading
from collections.abc import Callable, MutableMapping
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import gradio as gr

from app.live.frames import Frame, Sums, detailed_frame, notice, token_facts, written
from app.recordings import Recording, Recordings

_FOLDER = Path(__file__).parent
SCRIPTS = (
    "draw.js",
    "run.js",
    "card.js",
    "tokens.js",
    "line.js",
    "tree.js",
    "heat.js",
    "tail.js",
    "select.js",
    "listen.js",
    "words.js",
    "taken.js",
    "live.js",
)
MAX_BLOCK, MAX_FACTS_BLOCK = 64, 512  # steps of one request


def read_part(name: str) -> str:
    """One of the component's files."""
    return (_FOLDER / name).read_text(encoding="utf-8")


@functools.cache
def script() -> str:
    """All scripts as one function, `moeSpecPanels(element, props, server, trigger, watch)`."""
    body = "\n".join(read_part(name) for name in SCRIPTS)
    return f"function moeSpecPanels(element, props, server, trigger, watch) {{\n{body}\n}}\n"


def script_name() -> str:
    """Its address beside the page: another for every text, so that no browser keeps an old one."""
    return f"panels-{hashlib.sha256(script().encode()).hexdigest()[:12]}.js"


def live_panels(
    recordings: Recordings, elem_id: str, value: Frame, *, movable: bool, only: str = "", conversation: str = ""
) -> gr.HTML:
    """The component. Its template is constant: model text reaches the page through the script as text alone.

    movable: whether the tail's cut can be moved; the event `cut` then says to where. only: "tree", "heat" or "tail" for
    that panel by itself. conversation: the chat (its elem_id) whose newest answer they write out.
    """
    lock = threading.Lock()  # of the sums
    known: WeakKeyDictionary[Recording, Sums] = WeakKeyDictionary()  # as far as they have been asked for

    def recorded_steps(asked: dict[str, Any]) -> Any:
        return _answered(lambda: steps_between(recordings.of(asked["id"]), int(asked["first"]), int(asked["last"])))

    def recorded_facts(asked: dict[str, Any]) -> Any:
        return _answered(lambda: facts_between(recordings.of(asked["id"]), int(asked["first"]), int(asked["last"])))

    def recorded_so_far(asked: dict[str, Any]) -> Any:
        with lock:
            return _answered(lambda: summed_to(recordings.of(asked["id"]), int(asked["last"]), known))

    return gr.HTML(
        value=value,
        html_template=read_part("live.html"),
        css_template=read_part("live.css"),
        # Loaded once for all panels of the page. Gradio looks for the event's name here.
        head=f'<script src="{script_name()}"></script>',
        js_on_load='moeSpecPanels(element, props, server, trigger, watch); // triggers "cut"',
        apply_default_css=False,
        elem_id=elem_id,
        server_functions=[recorded_steps, recorded_facts, recorded_so_far],
        movable=movable,
        exports=not only,
        only=only,
        conversation=conversation,
    )


def steps_between(recording: Recording, first: int, last: int) -> list[Frame]:
    """Steps `first` to before `last` with all details, at most MAX_BLOCK."""
    return [detailed_frame(step) for step in recording.between(first, min(last, first + MAX_BLOCK))]


def facts_between(recording: Recording, first: int, last: int) -> list[str]:
    """The facts of each token of steps `first` to before `last`, of at most MAX_FACTS_BLOCK of them."""
    steps = recording.between(first, min(last, first + MAX_FACTS_BLOCK))
    return [fact for step in steps for fact in token_facts(step)]


def summed_to(recording: Recording, last: int, known: MutableMapping[Recording, Sums]) -> Frame | None:
    """The sums over the steps before `last`; going on from what is known of the recording where that is not beyond."""
    sums = known.get(recording)
    if sums is None or sums.num_seen > last:
        sums = known[recording] = Sums()
    sums.extend(recording.between(sums.num_seen, last))
    return sums.to_json()


def opened(recording: Recording, status: str, message: str, title: str) -> Frame:
    """A finished recording, to be replayed."""
    return notice(status, message) | {"run": recording.id, "title": title} | written(recording.steps)


def _answered(ask: Callable[[], Any]) -> Any:
    """What the script shows where it was refused is a sentence, not a failed request."""
    try:
        return ask()
    except (ValueError, TypeError, KeyError) as error:
        return {"error": str(error)}
