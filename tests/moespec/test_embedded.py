"""The model that ships, with its draft head, against transformers' own generate: 20 prompts, token for token."""

from __future__ import annotations

import pytest
import torch

from moespec import EMBEDDED_TARGET, BudgetConfig, Engine, GenerationConfig, TreeConfig
from moespec.drafters.eagle3 import Eagle3Drafter
from moespec.drafters.torch_pass import TorchPass
from moespec.hf import AutoModelForCausalLM

NEW_TOKENS = 32
CHATS = (
    "What is 12 + 30?",
    "What is 7 times 8?",
    "Sort 9, 4, 17, 2.",
    "Tell me a short story.",
    "Who are you?",
    "What does river mean?",
    "Where is Norway?",
    "Write a function that adds two numbers.",
    "Hello! How was your day?",
    "Give me a recipe for bread.",
    "Repeat: blue, green, red.",
    "How many letters are in the word apple?",
    "¿Qué es esto? — naïve café, 日本語, 🙂",
    "Tell me a joke, please.",
    "1 2 3 4 5 6 7 8",
)
RAW = (
    "Once upon a time",
    "def main():\n    ",
    "The capital of",
    "A",
    "\n\n# Title\n\nText with **marks** and <b>tags</b>",
)
TREES = (TreeConfig(4, 3, 2, 0), TreeConfig(8, 4, 3, 0), TreeConfig(16, 5, 4, 0), TreeConfig(32, 8, 8, 0), TreeConfig())


@pytest.fixture(scope="module")
def engine():
    opened = Engine.from_pretrained(EMBEDDED_TARGET)
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def reference():
    return AutoModelForCausalLM.from_pretrained(EMBEDDED_TARGET, dtype=torch.float32).eval()


@pytest.mark.parametrize("number", range(20))
def test_the_text_is_what_generate_writes(number, engine, reference):
    prompt = [{"role": "user", "content": CHATS[number]}] if number < len(CHATS) else RAW[number - len(CHATS)]
    tree = TREES[number % len(TREES)]
    *_, last = engine.generate(prompt, GenerationConfig(max_new_tokens=NEW_TOKENS), BudgetConfig(), tree)
    ids = torch.tensor([last.summary.prompt_token_ids])
    expected = reference.generate(ids, do_sample=False, max_new_tokens=NEW_TOKENS)[0, ids.shape[1] :].tolist()
    assert last.summary.token_ids == expected
    assert last.summary.lossless


def test_a_stop_string_ends_the_text_before_it_wherever_steps_fall(engine):
    generation = GenerationConfig(max_new_tokens=NEW_TOKENS, ignore_eos=True)
    *_, whole = engine.generate("Once upon a time", generation)
    text = whole.summary.text
    for start in range(1, len(text) - 4, 5):
        stop = text[start : start + 4]
        *_, last = engine.generate(
            "Once upon a time", GenerationConfig(max_new_tokens=NEW_TOKENS, ignore_eos=True, stop=(stop,))
        )
        assert last.summary.text == text[: text.index(stop)]
        assert last.summary.finish_reason == "stop"


def test_steps_never_show_half_a_character(engine):
    prompt = "Repeat: 日本語 🙂🙂 naïve"
    steps = list(engine.generate(prompt, GenerationConfig(max_new_tokens=NEW_TOKENS, temperature=1.5, ignore_eos=True)))
    text = "".join(step.text for step in steps)
    summary = steps[-1].summary
    assert text == summary.text == engine.target.tokenizer.decode(summary.token_ids, skip_special_tokens=True)


def test_the_quantized_head_drafts_as_well_as_the_head(engine):
    """Quantizing its weights must not cost more than a thirtieth of the tokens that a step emits."""
    head, target = engine.drafter.head, engine.target
    exact = Eagle3Drafter(head, target.max_context, TorchPass(head, target.max_context))
    tokens_per_step = []
    for drafter in (engine.drafter, exact):
        found = Engine(target, drafter, "embedded model")
        found.forget()
        runs = [list(found.generate(chat, GenerationConfig(max_new_tokens=96)))[-1].summary for chat in CHATS]
        tokens_per_step.append(sum(len(run.token_ids) - 1 for run in runs) / sum(run.num_steps for run in runs))
    assert tokens_per_step[0] > 29 / 30 * tokens_per_step[1]
    assert tokens_per_step[0] > 2.8  # what the head is trained for
