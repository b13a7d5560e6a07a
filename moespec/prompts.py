"""Prompts to token ids: a text, a list of chat messages, or ids. Owns the refusal of prompts that cannot be used."""

from __future__ import annotations

from typing import Any

from jinja2 import TemplateError
from torch import Tensor

from moespec.config import GenerationConfig

ROLES = ("system", "user", "assistant")
THINKING_SWITCH = "enable_thinking"  # as Qwen3's template has it, and those that follow it


def encode_prompt(
    prompt: Any, generation: GenerationConfig, tokenizer: Any, vocab_size: int, max_context: int
) -> list[int]:
    """Token ids of a prompt. ValueError, in one sentence, if it is empty, too long, or of no known form."""
    if not isinstance(prompt, str | list | Tensor):
        raise ValueError(f"a prompt is a text, a list of chat messages or token ids, not {type(prompt).__name__}.")
    if isinstance(prompt, list) and not prompt:
        raise ValueError("the prompt is empty: write something first.")
    if isinstance(prompt, Tensor) or (isinstance(prompt, list) and isinstance(prompt[0], int)):
        token_ids = _checked_ids(prompt, vocab_size)
    elif tokenizer is None:
        raise ValueError("this engine has no tokenizer: give the prompt as token ids.")
    elif isinstance(prompt, str):
        if not prompt.strip():
            raise ValueError("the prompt is empty: write something first.")
        messages = [{"role": "user", "content": prompt}]
        as_it_is = generation.raw or not getattr(tokenizer, "chat_template", None)
        token_ids = tokenizer(prompt)["input_ids"] if as_it_is else _chat_ids(messages, tokenizer, generation.thinking)
    else:
        token_ids = _chat_ids(_checked_messages(prompt), tokenizer, generation.thinking)
    if tokenizer is None and generation.stop:
        raise ValueError("this engine has no tokenizer: stop strings cannot be recognised.")
    if len(token_ids) >= max_context:
        raise ValueError(f"the prompt has {len(token_ids)} tokens; this model's context is {max_context}: shorten it.")
    return token_ids


def end_ids(model: Any, tokenizer: Any) -> frozenset[int]:
    """The tokens that end an answer: the model's own, and the tokenizer's end of sequence."""
    own = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ids = set(own if isinstance(own, list | tuple) else [own])
    ids.add(getattr(tokenizer, "eos_token_id", None))
    return frozenset(token for token in ids if token is not None)


def _checked_ids(prompt: list[int] | Tensor, vocab_size: int) -> list[int]:
    if isinstance(prompt, Tensor) and prompt.dim() != 1:
        raise ValueError(f"token ids are a one-dimensional tensor, not one of shape {tuple(prompt.shape)}.")
    token_ids = prompt.tolist() if isinstance(prompt, Tensor) else prompt
    if not token_ids:
        raise ValueError("the prompt is empty: give at least one token id.")
    wrong = next((token for token in token_ids if not isinstance(token, int) or not 0 <= token < vocab_size), None)
    if wrong is not None:
        raise ValueError(f"token id {wrong!r} is outside the vocabulary of {vocab_size}.")
    return list(token_ids)


def _checked_messages(messages: list) -> list[dict]:
    for message in messages:
        is_message = isinstance(message, dict) and message.get("role") in ROLES
        if not is_message or not isinstance(message.get("content"), str):
            raise ValueError(f"a chat message has a role ({', '.join(ROLES)}) and a text as content, not {message!r}.")
    if not messages[-1]["content"].strip():
        raise ValueError("the last message is empty: write something first.")
    return messages


def _chat_ids(messages: list[dict], tokenizer: Any, thinking: bool) -> list[int]:
    template = getattr(tokenizer, "chat_template", None)
    if not template:
        raise ValueError("this model's tokenizer has no chat template: give a text or token ids.")
    switch = {} if thinking else {THINKING_SWITCH: False}
    if switch and THINKING_SWITCH not in str(template):
        raise ValueError("thinking=False cannot be followed: this model's chat template has no such switch.")
    try:
        asked = {"add_generation_prompt": True, "return_dict": True} | switch
        return tokenizer.apply_chat_template(messages, **asked)["input_ids"]
    except TemplateError as error:  # many a template takes no system prompt
        raise ValueError(f"this model's chat template refuses these messages: {error}") from error
