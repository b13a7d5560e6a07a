"""Text to calibrate on: what the model itself writes, at temperature 1, after a handful of short prompts.

No data set is needed, no benchmark prompt or question is read, and every model has such text in its own chat format. It
is no sample of what users write: give texts of your own where that matters.
"""

from __future__ import annotations

from moespec.config import GenerationConfig
from moespec.engine import Engine

PROMPTS = (
    "Tell me a story about a lighthouse.",
    "What is an orchestra?",
    "Which things do I need for a picnic in the rain?",
    "Write a Python function that doubles every element of a list.",
    "Hello! I would like to plan a birthday dinner for six.",
    "Why is the sky dark at night?",
    "How many legs do four spiders have?",
    "Describe a street market in the morning.",
    "Do you play an instrument?",
    "Explain how bread is made.",
    "What can I see in Norway?",
    "Make a short list of tools for a garden.",
)
MAX_NEW_TOKENS = 160


def own_texts(engine: Engine, num_tokens: int) -> list[list[int]]:
    """Token ids of prompts with the replies, each prompt again and again under another seed, `num_tokens` in all.

    ValueError for a model without a tokenizer, or that writes nothing.
    """
    if engine.target.tokenizer is None:
        raise ValueError("the model has no tokenizer to write calibration text from prompts with.")
    texts: list[list[int]] = []
    left = num_tokens
    while left > 0:
        seed, place = divmod(len(texts), len(PROMPTS))
        engine.forget()
        generation = GenerationConfig(MAX_NEW_TOKENS, temperature=1.0, seed=seed)
        *_, last = engine.generate(PROMPTS[place], generation)
        assert last.summary is not None
        texts.append([*last.summary.prompt_token_ids, *last.summary.token_ids][:left])
        left -= len(texts[-1])
    engine.forget()
    return texts
