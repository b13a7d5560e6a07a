"""`train texts`: whole held-out documents to measure perplexity on, drawn by seed. Owns their number and length.

Every document is one that training never saw. Knows nothing of what is measured on them.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moespec.hf import AutoTokenizer
from moespec.quality.tasks import FAMILIES, generate_task
from moespec.train.bench_prompts import by_turns
from moespec.train.data import SHARES, Renderer, read_documents

NUM_BY_GROUP = 16
MIN_TOKENS, MAX_TOKENS = 24, 200


def held_out_texts(documents: list[dict], tokenizer: Any, seed: int) -> Iterator[dict]:
    """`NUM_BY_GROUP` documents of each group that fit. ValueError if a group has too few."""
    rng, render = random.Random(seed), Renderer(tokenizer)
    pool: Iterator[dict]
    for group in SHARES:
        if group == "tasks":
            tasks = (generate_task(rng, FAMILIES[n % len(FAMILIES)], held_out=True) for n in range(10 * NUM_BY_GROUP))
            pool = ({"source": f"task: {task.family}", "messages": task.messages} for task in tasks)
        else:
            pool = by_turns([document for document in documents if document["group"] == group], rng)
        fitting = (document for document in pool if MIN_TOKENS <= len(render(document)[0]) <= MAX_TOKENS)
        for number in range(NUM_BY_GROUP):
            document = next(fitting, None)
            if document is None:
                raise ValueError(f"the held-out documents of group {group!r} give {number} texts, not {NUM_BY_GROUP}.")
            yield {"id": f"{group}-{number:02}", **document, "group": group}


def write_texts(data: Path, tokenizer: Path, out: Path, seed: int) -> int:
    """Write the texts as JSON lines; their number."""
    texts = list(held_out_texts(read_documents(data, "heldout"), AutoTokenizer.from_pretrained(tokenizer), seed))
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("".join(json.dumps(text, ensure_ascii=False) + "\n" for text in texts), encoding="utf-8")
    return len(texts)
