"""What the target itself says to training prompts: the head must match the target, not the corpus.

Owns the batched sampler and its file. Knows nothing of draft heads.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from moespec.train.tasks import generate_task

BATCH = 24
MAX_NEW_TOKENS = 96
MAX_PROMPT_TOKENS = 160


def prompts(documents: list[dict], rng: random.Random) -> Iterator[list[dict]]:
    """Endless chat prompts that end with a user turn; two in five are own tasks, as in training."""
    chats = [document["messages"] for document in documents if len(document.get("messages", ())) >= 2]
    while True:
        messages = generate_task(rng).messages if rng.random() < 0.4 else rng.choice(chats)
        ends = [n for n, message in enumerate(messages) if message["role"] == "assistant"]
        if ends:
            yield messages[: rng.choice(ends)]


@torch.no_grad()
def generate(model: Any, tokenizer: Any, documents: list[dict], path: Path, minutes: float, seed: int) -> int:
    """Write documents of (prompt, the target's answer) for some minutes, half greedy, half at temperature 0.8."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    stream = prompts(documents, rng)
    tokenizer.padding_side = "left"
    ends_at, count = time.monotonic() + 60 * minutes, 0
    with path.open("w", encoding="utf-8") as file:
        while time.monotonic() < ends_at:
            batch = [next(stream) for _ in range(BATCH)]
            inputs = tokenizer.apply_chat_template(
                batch, add_generation_prompt=True, return_dict=True, return_tensors="pt", padding=True
            )
            if inputs["input_ids"].shape[1] > MAX_PROMPT_TOKENS:
                inputs = {name: tensor[:, -MAX_PROMPT_TOKENS:] for name, tensor in inputs.items()}
            sampling = (
                {"do_sample": True, "temperature": 0.8, "top_k": 0} if count // BATCH % 2 else {"do_sample": False}
            )
            inputs = {name: tensor.to(model.device) for name, tensor in inputs.items()}
            output = model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, **sampling)
            answers = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            for messages, answer in zip(batch, answers, strict=True):
                document = {"messages": [*messages, {"role": "assistant", "content": answer}]}
                file.write(json.dumps({"source": "own answers", "group": "dialogue"} | document) + "\n")
            count += BATCH
    return count
