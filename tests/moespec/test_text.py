"""Joined pieces equal the final text, whatever a token boundary splits."""

from __future__ import annotations

import random

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


def test_text_is_shown_as_soon_as_it_is_certain(tokenizer):
    stream = TextStream(tokenizer)
    *ids, last = tokenizer("box 🦊")["input_ids"]
    assert "".join(stream.push([token])[0] for token in ids).strip() == "box"
    assert stream.push([last])[0].strip() == "🦊"


def ids_of_bytes(tokenizer, data: bytes) -> list[int]:
    """Each byte as the token that stands for it alone."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    shifted = iter(range(256, 512))
    symbols = {byte: chr(byte if byte in printable else next(shifted)) for byte in range(256)}
    return tokenizer.convert_tokens_to_ids([symbols[byte] for byte in data])


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("seed", range(8))
def test_pieces_of_any_tokens_join_to_what_the_tokenizer_makes_of_them(tokenizer, seed, size):
    """Bytes that are no text, characters cut off by an end-of-turn token, and ends of turns in a row."""
    rng = random.Random(seed)
    ids = ids_of_bytes(tokenizer, b"abc" + b"\x80" * 20 + b"x" + "abcdef🦊".encode())
    ids += [tokenizer.eos_token_id] * 7 + tokenizer(" yes")["input_ids"]
    for _ in range(30):
        ids += ids_of_bytes(tokenizer, rng.choice([rng.randbytes(3), "é🦊".encode()[: rng.randint(1, 6)], b" so"]))
        ids += [tokenizer.eos_token_id] * rng.choice([0, 0, 1, 12])
    stream = TextStream(tokenizer)
    text = "".join(stream.push(group)[0] for group in groups(ids, size)) + stream.finish()
    assert text == tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


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
