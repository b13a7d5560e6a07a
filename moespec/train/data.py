"""Documents to packed training batches: a seeded, resumable stream that mixes the groups by their shares.

Input: a folder of `.jsonl` or `.jsonl.xz` files, one document per line: `{"source", "group", "messages": [...]}` or
`{"source", "group", "text"}` with group dialogue, facts, prose or code. Own tasks are generated, not read. Knows
nothing of models.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from moespec.quality.tasks import generate_task
from moespec.train.prepare import open_text
from moespec.train.sources import SOURCES
from moespec.train.tokenizer import END_OF_TEXT, TURN_END, TURN_START

SHARES = {"tasks": 0.40, "dialogue": 0.27, "facts": 0.15, "prose": 0.13, "code": 0.05}
SOURCE_WEIGHTS = {"identity": 5.0, "stories": 5.0} | {stem: weight for stem, (_, weight, _) in SOURCES.items()}


def read_documents(folder: Path, stem: str) -> list[dict]:
    """All documents of the files of one split. ValueError names a line that is no document."""
    paths = sorted(folder.glob(f"{stem}*.jsonl*"))
    if not paths:
        raise ValueError(f"{folder} has no {stem}*.jsonl or .jsonl.xz file.")
    documents = []
    for path in paths:
        with open_text(path) as file:
            for number, line in enumerate(file, start=1):
                document = json.loads(line)
                if not ("messages" in document or "text" in document) or document.get("group") not in SHARES:
                    raise ValueError(f"{path}: line {number} has no messages or text, or no known group.")
                documents.append(document)
    return documents


def file_hashes(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.glob("*.jsonl*"))}


class Batch(NamedTuple):
    """Packed sequences with their next tokens, each [num_sequences, length + 1]."""

    ids_BS: Tensor  # int64
    said_BS: Tensor  # bool: what the assistant says
    of_task_BS: Tensor  # bool: part of an own task, whose operands were drawn at random

    def to(self, device: str) -> Batch:
        return Batch(*(part.to(device, non_blocking=True) for part in self))

    def in_sequences(self, length: int) -> Batch:
        """One long sequence cut into many of `length`; what does not fill one is left out."""
        return Batch(*(part[0].unfold(0, length + 1, length) for part in self))


class Renderer:
    """A document as token ids and a mask of what the assistant says (its end-of-turn token included)."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer.backend_tokenizer
        self._end = tokenizer.convert_tokens_to_ids(END_OF_TEXT)
        self._turn_end = tokenizer.convert_tokens_to_ids(TURN_END)

    def __call__(self, document: dict) -> tuple[list[int], list[bool]]:
        ids: list[int] = []
        mask: list[bool] = []
        if "text" in document:
            ids = self._ids(document["text"])
            mask = [True] * len(ids)
        for message in document.get("messages", ()):
            opening = self._ids(f"{TURN_START}{message['role']}\n")
            said = [*self._ids(message["content"]), self._turn_end]
            newline = self._ids("\n")
            ids += opening + said + newline
            is_said = message["role"] == "assistant"
            mask += [False] * len(opening) + [is_said] * len(said) + [False] * len(newline)
        return [*ids, self._end], [*mask, False]

    def _ids(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids


class MixedStream:
    """An endless stream of documents, every group at its share of the tokens. Its state is small and picklable.

    Own tasks come from the training side of their split, or from the other where the documents are `held_out`.
    """

    def __init__(
        self,
        documents: list[dict],
        renderer: Renderer,
        seed: int,
        shares: dict[str, float] | None = None,
        held_out: bool = False,
    ) -> None:
        self._renderer, self._held_out = renderer, held_out
        self._shares = SHARES if shares is None else shares
        self._seed = seed
        self._by_source: dict[str, list[dict]] = {}
        groups: dict[str, set[str]] = {}
        for document in documents:
            self._by_source.setdefault(document["source"], []).append(document)
            groups.setdefault(document["group"], set()).add(document["source"])
        # Weighted by size, so that a source is repeated no faster than its weight says.
        sizes = {s: sum(len(json.dumps(d)) for d in docs) for s, docs in self._by_source.items()}
        self._choices = {
            group: (sorted(sources), [sizes[s] * SOURCE_WEIGHTS.get(s, 1.0) for s in sorted(sources)])
            for group, sources in groups.items()
        }
        self.rng = random.Random(seed)
        self.positions: Counter = Counter()
        self.tokens: Counter = Counter()  # by source
        self._group_tokens: Counter = Counter()
        self._buffer_ids: list[int] = []
        self._buffer_said: list[bool] = []
        self._buffer_of_task: list[bool] = []
        self._orders: dict[tuple[str, int], list[int]] = {}

    def state(self) -> dict:
        """Everything that decides what comes next."""
        return {
            "rng": self.rng.getstate(),
            "positions": dict(self.positions),
            "tokens": dict(self.tokens),
            "groups": dict(self._group_tokens),
            "buffers": (list(self._buffer_ids), list(self._buffer_said), list(self._buffer_of_task)),
        }

    def restore(self, state: dict) -> None:
        self.rng.setstate(state["rng"])
        self.positions, self.tokens = Counter(state["positions"]), Counter(state["tokens"])
        self._group_tokens = Counter(state["groups"])
        ids, said, of_task = state["buffers"]
        self._buffer_ids, self._buffer_said, self._buffer_of_task = list(ids), list(said), list(of_task)

    def batch(self, num_sequences: int, length: int) -> Batch:
        """The next sequences; the last token of one is the first of the next."""
        need = num_sequences * length + 1
        while len(self._buffer_ids) < need:
            ids, said, is_task = self._next_document()
            self._buffer_ids += ids
            self._buffer_said += said
            self._buffer_of_task += [is_task] * len(ids)
        starts = np.arange(num_sequences)[:, None] * length + np.arange(length + 1)
        parts = []
        for buffer, dtype in ((self._buffer_ids, np.int64), (self._buffer_said, bool), (self._buffer_of_task, bool)):
            parts.append(torch.from_numpy(np.array(buffer[:need], dtype)[starts]))
            del buffer[: need - 1]
        return Batch(*parts)

    def _next_document(self) -> tuple[list[int], list[bool], bool]:
        total = sum(self._group_tokens.values()) + 1
        group = max(self._shares, key=lambda name: self._shares[name] - self._group_tokens[name] / total)
        is_task = group == "tasks" or group not in self._choices
        if is_task:
            task = generate_task(self.rng, held_out=self._held_out)
            source, document = f"task: {task.family}", {"messages": task.messages}
        else:
            source = self.rng.choices(*self._choices[group])[0]
            document = self._draw(source)
        ids, said = self._renderer(document)
        self.tokens[source] += len(ids)
        self._group_tokens[group] += len(ids)
        return ids, said, is_task

    def _draw(self, source: str) -> dict:
        """The source's next document in a shuffled order that is made anew for each pass."""
        documents = self._by_source[source]
        passes, position = divmod(self.positions[source], len(documents))
        self.positions[source] += 1
        if (source, passes) not in self._orders:
            order = list(range(len(documents)))
            random.Random(f"{self._seed}:{source}:{passes}").shuffle(order)
            self._orders[source, passes] = order
        return documents[self._orders[source, passes][position]]


def held_out_batches(
    documents: list[dict], renderer: Renderer, seed: int, length: int, num_sequences: int
) -> Iterator[tuple[str, Batch]]:
    """(group, sequences) of held-out documents and tasks, the same for every call."""
    groups = {document["group"] for document in documents} | {"tasks"}
    for group in SHARES:
        if group in groups:
            stream = MixedStream(documents, renderer, seed, {group: 1.0}, held_out=True)
            yield group, stream.batch(num_sequences, length)
