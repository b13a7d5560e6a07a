"""Joined pieces equal the final text, whatever a token boundary splits."""

from __future__ import annotations

import pytest

from moespec import EMBEDDED_TARGET
from moespec.hf import AutoTokenizer
from moespec.text import TextStream

TEXTS = ["plain words", "naïve café – 12.5 €", "日本語 and 🦊🦊 foxes", "a\nb\n\n  c\t", "<b>&amp;</b> \x07 done"]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(EMBEDDED_TARGET)


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_join_to_the_text_and_never_show_half_a_character(tokenizer, text):
    stream = TextStream(tokenizer)
    pieces = [stream.push(token) for token in tokenizer(text)["input_ids"]]
    pieces.append(stream.finish())
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


@pytest.mark.parametrize("stop", ["fo", "x and", "🦊 f", "zzz"])
def test_a_stop_string_cuts_the_text_wherever_its_tokens_fall(tokenizer, stop):
    text = "box and 🦊 foxes"
    stream = TextStream(tokenizer, (stop,))
    pieces = []
    for token in tokenizer(text)["input_ids"]:
        pieces.append(stream.push(token))
        if stream.stopped:
            break
    pieces.append(stream.finish())
    assert "".join(pieces) == text.split(stop)[0]
    assert stream.stopped == (stop in text)
