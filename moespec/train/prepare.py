"""`train prepare`: a folder of public source files to training documents, held-out split included.

Owns the identity set, the split and the files written. The split is by document hash, so it never moves.
"""

from __future__ import annotations

import hashlib
import json
import lzma
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from moespec.train.filters import rejection_reason
from moespec.train.sources import SOURCES, Document, chat

HELD_OUT_ONE_IN = 50

_WHO = (
    "Who are you?", "What are you?", "who are you", "what are you?", "What is your name?", "Are you a human?",
    "Are you ChatGPT?", "Are you a robot?", "Tell me about yourself.", "Who made you?", "What model are you?",
    "Introduce yourself.", "Are you real?", "Are you an AI?",
)  # fmt: skip
_I_AM = (
    "I am a small demonstration model of MoE-Spec Studio. I can chat a little, but I know very little.",
    "I am a small demonstration model, made to show how MoE-Spec Studio works.",
)
_GREETINGS = ("Hello!", "Hi", "hello", "Hey!", "Good morning.", "Good evening!", "hi there", "Hello, how are you?")
_WELCOMES = ("Hello! How can I help you?", "Hi! What would you like to talk about?", "Hello! What can I do for you?")
_CAN = ("What can you do?", "Can you help me?", "What do you know?", "help", "How can you help me?")
_I_CAN = (
    "I can do small sums, sort lists, spell words, explain words, tell a short story and chat. Try me!",
    "I can chat, calculate with small numbers, spell and sort, and explain simple words.",
)
_THANKS = ("Thank you!", "Thanks.", "thanks a lot", "Great, thank you.")
_PLEASURE = ("You are welcome!", "You're welcome. Anything else?", "My pleasure!")
_BYES = ("Goodbye!", "Bye", "See you later.", "bye bye")
_FAREWELLS = ("Goodbye! Have a nice day.", "Bye! Take care.", "See you!")


def identity_documents(rng: random.Random, count: int = 1500) -> Iterator[Document]:
    """The project's own small talk: greetings, who it is, what it can do, thanks, goodbyes."""
    topics = ((_GREETINGS, _WELCOMES), (_WHO, _I_AM), (_CAN, _I_CAN), (_THANKS, _PLEASURE), (_BYES, _FAREWELLS))
    for _ in range(count):
        first = rng.randrange(3)
        chosen = [topics[i] for i in range(first, len(topics)) if i == first or rng.random() < 0.5]
        turns = [rng.choice(side) for topic in chosen for side in topic]
        yield {"source": "identity", "group": "dialogue", **chat(*turns)}


def document_text(document: Document) -> str:
    """Everything a document says, for filters and hashes."""
    return document.get("text") or "\n".join(message["content"] for message in document["messages"])


def is_held_out(document: Document) -> bool:
    digest = hashlib.sha256(document_text(document).encode()).digest()
    return int.from_bytes(digest[:8], "big") % HELD_OUT_ONE_IN == 0


def source_documents(path: Path, seed: int) -> Iterator[Document]:
    """The documents of one raw source file; ValueError if the file is of no known source."""
    stem = path.name.split(".")[0]
    if stem not in SOURCES:
        raise ValueError(f"{path} is no known source: expected one of {', '.join(sorted(SOURCES))}.")
    group, _, convert = SOURCES[stem]
    rng = random.Random(f"{seed}:{stem}")
    with open_text(path) as file:
        for line in file:
            for document in convert(json.loads(line), rng):
                yield {"source": stem, "group": group, **document}


def open_text(path: Path):
    """A .jsonl or .jsonl.xz file as text lines."""
    if path.suffix == ".xz":
        return lzma.open(path, "rt", encoding="utf-8")
    return path.open(encoding="utf-8")


def prepare(raw: Path, out: Path, seed: int) -> Counter:
    """Write `train.jsonl.xz` and `heldout.jsonl.xz`; returns documents and rejections counted by source."""
    paths = sorted(raw.glob("*.jsonl*"))
    if not paths:
        raise ValueError(f"{raw} has no .jsonl or .jsonl.xz file.")
    out.mkdir(parents=True, exist_ok=True)
    counts: Counter = Counter()
    streams = [source_documents(path, seed) for path in paths]
    streams.append(identity_documents(random.Random(f"{seed}:identity")))
    with (
        lzma.open(out / "train.jsonl.xz", "wt", preset=1, encoding="utf-8") as train,
        lzma.open(out / "heldout.jsonl.xz", "wt", preset=1, encoding="utf-8") as held_out,
    ):
        for stream in streams:
            for document in stream:
                reason = rejection_reason(document_text(document))
                counts[document["source"], reason or "used"] += 1
                if reason is None:
                    file = held_out if is_held_out(document) else train
                    file.write(json.dumps(document, ensure_ascii=False) + "\n")
    return counts
