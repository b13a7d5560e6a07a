"""What the target itself says to training prompts: the head must match the target, not the corpus.

Owns the sampler and its file. Knows nothing of draft heads.
"""

from __future__ import annotations

import itertools
import json
import random
import time
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import torch

from moespec.config import GenerationConfig
from moespec.engine import Engine
from moespec.quality.tasks import generate_task
from moespec.train.precision import autocast

BATCH = 1024
MAX_NEW_TOKENS = 96
MAX_PROMPT_TOKENS = 160


def prompts(documents: list[dict], rng: random.Random) -> Iterator[list[dict]]:
    """Endless chat prompts that end with a user turn; two in five are own tasks, as in training."""
    chats = [document["messages"] for document in documents if len(document.get("messages", ())) >= 2]
    while True:
        messages = generate_task(rng).messages if rng.random() < 0.4 else rng.choice(chats)
        ends = [n for n, message in enumerate(messages) if n and message["role"] == "assistant"]
        if ends:
            yield messages[: rng.choice(ends)]


def generate(
    model: Any, tokenizer: Any, documents: list[dict], path: Path, minutes: float, seed: int, drafter: Path | None
) -> int:
    """Write documents of (prompt, the target's answer) for some minutes, half greedy, half at temperature 0.8.

    A batch at a time on a GPU; one after the other through our engine on a CPU, which is several times as fast there.
    Returns their number.
    """
    rng = random.Random(seed)
    stream = prompts(documents, rng)
    ends_at, count = time.monotonic() + 60 * minutes, 0
    answered = (
        _in_batches(model, tokenizer, stream, seed)
        if model.device.type == "cuda"
        else _one_by_one(model, tokenizer, stream, seed, drafter)
    )
    with path.open("w", encoding="utf-8") as file:
        for messages, answer in answered:
            document = {"messages": [*messages, {"role": "assistant", "content": answer}]}
            file.write(json.dumps({"source": "own answers", "group": "dialogue"} | document) + "\n")
            count += 1
            if time.monotonic() > ends_at:
                break
    answered.close()
    return count


def _one_by_one(
    model: Any, tokenizer: Any, stream: Iterator[list[dict]], seed: int, drafter: Path | None
) -> Generator[tuple[list[dict], str]]:
    engine = Engine.from_model(model, tokenizer, drafter)
    try:
        for number, messages in enumerate(stream):
            temperature = 0.8 * (number % 2)
            generation = GenerationConfig(max_new_tokens=MAX_NEW_TOKENS, temperature=temperature, seed=seed + number)
            if len(engine.encode(messages)) > MAX_PROMPT_TOKENS:
                continue
            *_, last = engine.generate(messages, generation)
            assert last.summary is not None
            yield messages, last.summary.text
    finally:
        engine.close()


@torch.no_grad()
def _in_batches(
    model: Any, tokenizer: Any, stream: Iterator[list[dict]], seed: int
) -> Generator[tuple[list[dict], str]]:
    torch.manual_seed(seed)
    tokenizer.padding_side = "left"
    for number in itertools.count():
        batch = list(itertools.islice(stream, BATCH))
        inputs = tokenizer.apply_chat_template(
            batch, add_generation_prompt=True, return_dict=True, return_tensors="pt", padding=True
        )
        inputs = {name: tensor[:, -MAX_PROMPT_TOKENS:].to(model.device) for name, tensor in inputs.items()}
        sampling = {"do_sample": True, "temperature": 0.8, "top_k": 0} if number % 2 else {"do_sample": False}
        with autocast(model.device.type):
            output = model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, **sampling)
        answers = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        yield from zip(batch, answers, strict=True)
