"""`train prepare`: a folder of public source files to training documents, held-out split included.

Owns the split and the files written. The split is by document hash, so it never moves.
"""

from __future__ import annotations

import hashlib
import json
import lzma
import random
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from moespec.train.filters import rejection_reason
from moespec.train.identity import identity_documents
from moespec.train.sources import SOURCES, Document
from moespec.train.stories import story_documents

HELD_OUT_ONE_IN = 50


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


def unwrapped(document: Document) -> Document:
    """A storybook without the line breaks of its pages, which fall inside sentences."""
    if not document["source"].startswith("storybooks"):
        return document
    messages = [
        message | {"content": re.sub(r"(?<![.!?:;\"”’'])\n(?=\w)|(?<=,)\n", " ", message["content"])}
        for message in document["messages"]
    ]
    return document | {"messages": messages}


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
    streams.append(story_documents(random.Random(f"{seed}:stories")))
    with (
        lzma.open(out / "train.jsonl.xz", "wt", preset=1, encoding="utf-8") as train,
        lzma.open(out / "heldout.jsonl.xz", "wt", preset=1, encoding="utf-8") as held_out,
    ):
        for stream in streams:
            for document in stream:
                reason = rejection_reason(document_text(document))
                counts[document["source"], reason or "used"] += 1
                if reason is None:
                    # The split is by the text as it came: joining its lines must not move a document.
                    file, document = (held_out, document) if is_held_out(document) else (train, unwrapped(document))
                    file.write(json.dumps(document, ensure_ascii=False) + "\n")
    return counts
