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


def groups(token_ids: list[int], size: int) -> list[list[int]]:
    """As steps that emit so many tokens hand them over."""
    return [token_ids[start : start + size] for start in range(0, len(token_ids), size)]


@pytest.mark.parametrize("size", [1, 2, 5])
@pytest.mark.parametrize("text", [*TEXTS, " ".join(TEXTS)])
def test_pieces_join_to_the_text_and_never_show_half_a_character(tokenizer, text, size):
    stream = TextStream(tokenizer)
    pieces = [stream.push(group)[0] for group in groups(tokenizer(text)["input_ids"], size)]
    pieces.append(stream.finish())
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("stop", ["fo", "x and", "🦊 f", "zzz"])
def test_a_stop_string_cuts_the_text_wherever_its_tokens_fall(tokenizer, stop, size):
    text = "box and 🦊 foxes"
    stream = TextStream(tokenizer, (stop,))
    pieces, read = [], []
    for group in groups(tokenizer(text)["input_ids"], size):
        piece, num_read = stream.push(group)
        pieces.append(piece)
        read += group[:num_read]
        assert stream.stopped or num_read == len(group)
    pieces.append(stream.finish())
    assert "".join(pieces) == text.split(stop)[0]
    assert stream.stopped == (stop in text)
    # No token is read behind the one that completed the stop string.
    assert stop not in tokenizer.decode(read[:-1])
