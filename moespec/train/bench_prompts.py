"""`train prompts`: the benchmark's prompts, drawn by seed from held-out documents and tasks. Owns their number and mix.

Every prompt ends with a user turn, where an assistant turn of its document begins. Knows nothing of benchmarks.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moespec.hf import AutoTokenizer
from moespec.quality.tasks import FAMILIES, generate_task
from moespec.train.data import read_documents

MAX_PROMPT_TOKENS = 200
MOST_DRAWS = 20  # for each task: some families have few
# About training's shares, 64 in all; of tasks, as many of each family as 26 allow.
NUM_BY_GROUP = {"tasks": 26, "dialogue": 17, "facts": 10, "prose": 8, "code": 3}


def cut(messages: list[dict], tokenizer: Any, rng: random.Random) -> list[dict] | None:
    """The messages before one of the assistant's turns, or None if no such beginning is short enough."""
    beginnings = [messages[:n] for n, message in enumerate(messages) if message["role"] == "assistant" and n > 0]
    short = [part for part in beginnings if _num_tokens(part, tokenizer) <= MAX_PROMPT_TOKENS]
    return rng.choice(short[1:] or short) if short else None  # a first turn alone may be a later part's, out of context


def held_out_prompts(documents: list[dict], tokenizer: Any, seed: int, num_by_group: dict[str, int]) -> Iterator[dict]:
    """The prompts in a fixed order: tasks, then group by group. ValueError if a group has too few documents."""
    rng = random.Random(seed)
    asked: set[str] = set()
    for _ in range(MOST_DRAWS * num_by_group["tasks"]):
        if len(asked) == num_by_group["tasks"]:
            break
        task = generate_task(rng, FAMILIES[len(asked) % len(FAMILIES)], held_out=True)
        if (question := task.messages[0]["content"]) not in asked:
            yield {"id": f"tasks-{len(asked):02}", "source": f"task: {task.family}", "messages": task.messages[:1]}
            asked.add(question)
    if len(asked) < num_by_group["tasks"]:
        raise ValueError(f"the tasks give {len(asked)} different prompts instead of {num_by_group['tasks']}.")
    for group, wanted in num_by_group.items():
        if group == "tasks":
            continue
        pool = [document for document in documents if document["group"] == group and "messages" in document]
        seen: list[list[dict]] = []
        for document in by_turns(pool, rng):
            prompt = cut(document["messages"], tokenizer, rng)
            if prompt and prompt not in seen:
                yield {"id": f"{group}-{len(seen):02}", "source": document["source"], "messages": prompt}
                seen.append(prompt)
            if len(seen) == wanted:
                break
        else:
            raise ValueError(f"the held-out documents of group {group!r} give {len(seen)} prompts instead of {wanted}.")


def by_turns(documents: list[dict], rng: random.Random) -> Iterator[dict]:
    """The documents shuffled, one of each source in turn: a group's largest source is not all that is measured."""
    by_source: dict[str, list[dict]] = {}
    for document in rng.sample(documents, len(documents)):
        by_source.setdefault(document["source"], []).append(document)
    for documents_of_one_turn in itertools.zip_longest(*(by_source[source] for source in sorted(by_source))):
        yield from filter(None, documents_of_one_turn)


def write_prompts(data: Path, tokenizer: Path, out: Path, seed: int, num_each: int | None = None) -> int:
    """Write the prompts as JSON lines; their number. `num_each`: of every group; None mixes them as training does."""
    num_by_group = NUM_BY_GROUP if num_each is None else dict.fromkeys(NUM_BY_GROUP, num_each)
    documents = read_documents(data, "heldout")
    prompts = list(held_out_prompts(documents, AutoTokenizer.from_pretrained(tokenizer), seed, num_by_group))
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("".join(json.dumps(prompt, ensure_ascii=False) + "\n" for prompt in prompts), encoding="utf-8")
    return len(prompts)


def _num_tokens(messages: list[dict], tokenizer: Any) -> int:
    return len(tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"])
