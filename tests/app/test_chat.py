"""What the chat says of what runs, and what it makes of messages."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from app.hosting import Hosting
from app.live.frames import worth_drawing
from app.messages import plain, shown
from app.tabs.chat import device_line
from moespec import Engine
from tests.conftest import tiny_model

TEXTS = [
    "  a\tb\n    c",
    "<img src=x onerror=y> &lt; & &amp; ![p](http://h/p.png) <b>",
    "**bold** `<i>` \u2060 $x$",
    "",
]


def test_the_device_line_names_the_drafter_and_why_it_is_in_use():
    engine = Engine.from_model(tiny_model("olmoe"), drafter="auto")
    service: Any = SimpleNamespace(engine=engine, info=engine.info, hosting=Hosting.OWN, notice="")
    assert "drafter n-gram (no head beside the target: prompt look-up)" in device_line(service)
    assert device_line(service).endswith("on your own machine")
    service.hosting, service.notice = Hosting.SPACE_CPU, "No room."
    assert device_line(service).endswith("on a Hugging Face Space, on its CPU · **No room.**")
    engine.close()


@pytest.mark.parametrize("markdown", [False, True])
def test_messages_come_back_from_the_chat_as_they_were(markdown):
    messages = [{"role": "user", "content": text.replace("\u2060", "")} for text in TEXTS]
    assert plain(shown(messages, markdown)) == messages


def test_what_the_chat_is_given_has_no_tag_and_no_picture():
    for markdown in (False, True):
        (message,) = shown([{"role": "user", "content": TEXTS[1]}], markdown)
        text = message["content"][0]["text"]
        assert "<img" not in text and "<b" not in text and "![" not in text


def test_the_last_step_with_a_tree_is_drawn():
    def step(kind: str, is_last: bool = False) -> Any:
        return SimpleNamespace(kind=kind, summary="summary" if is_last else None)

    tree, plain_step, last = step("tree"), step("plain"), step("plain", is_last=True)
    assert worth_drawing([tree, plain_step]) is tree
    assert worth_drawing([plain_step]) is plain_step
    assert worth_drawing([tree, last]) is tree
    assert worth_drawing([last]) is None and worth_drawing([]) is None  # what was drawn before stays
