"""OpenAI's chat completions as data: what a request of that form asks of us, and an answer in that form.

What we cannot do is refused by name, never passed over. Knows nothing of servers or queues.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from app.programs import Counters, outcome_json, stop_texts
from app.service import Step
from app.settings import Settings
from moespec import RunSummary

READ = (
    *("model", "messages", "stream", "stream_options", "temperature", "top_p", "seed", "stop"),
    *("max_tokens", "max_completion_tokens", "moespec"),
)
IGNORED = ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "parallel_tool_calls")
# What is not done here, and the value that does not ask for it.
WITHOUT = {
    "n": 1,
    "presence_penalty": 0,
    "frequency_penalty": 0,
    "logprobs": False,
    "logit_bias": {},
    "response_format": {"type": "text"},
    "tools": [],
    "modalities": ["text"],
}
OURS = {  # their name to ours; of two for the same, the later counts
    "temperature": "temperature",
    "top_p": "top_p",
    "seed": "seed",
    "max_tokens": "max_new_tokens",
    "max_completion_tokens": "max_new_tokens",
}
FINISHED = {"eos": "stop", "stop": "stop", "stopped": "stop", "length": "length", "context": "length"}
MAX_DRAWN_SEED = 2**31


class RefusedError(ValueError):
    """A request that cannot be answered: the status, and the fields of OpenAI's error form."""

    def __init__(self, sentence: str, status: int = 400, code: str | None = None, param: str | None = None) -> None:
        super().__init__(sentence)
        self.status, self.code, self.param = status, code, param


@dataclass(frozen=True)
class Asked:
    """A request, understood."""

    messages: list[dict]
    settings: Settings
    stop: tuple[str, ...]
    is_streamed: bool
    with_usage: bool  # a stream's last chunk


def read_request(body: Any, model: str, base: Settings) -> Asked:
    """Settings that are not named are as in `base`; OpenAI's own names win over the same in `moespec`. Without a seed
    one is drawn, as OpenAI does it. ValueError or RefusedError for what cannot be followed."""
    if not isinstance(body, dict):
        raise RefusedError("The body is no JSON object: send one with model and messages.")
    given = {name: value for name, value in body.items() if value is not None}
    for name, value in given.items():
        if name not in (*READ, *IGNORED) and not (name in WITHOUT and value == WITHOUT[name]):
            raise RefusedError(
                f"{name}={value!r} is not supported here: leave it out.", 400, "unsupported_parameter", name
            )
    for name in ("model", "messages"):
        if not given.get(name):
            raise RefusedError(f"{name} is missing.", 400, "missing_required_parameter", name)
    if given["model"] != model:
        raise unknown_model(given["model"], model)
    options = given.get("stream_options", {})
    for name, value, form in (("stream_options", options, dict), ("messages", given["messages"], list)):
        if not isinstance(value, form):
            raise RefusedError(f"{name} is {'a list' if form is list else 'an object'}, not {value!r}.", param=name)
    extra = given.get("moespec", {})
    settings = Settings.from_json(extra, base)
    named = {ours: given[theirs] for theirs, ours in OURS.items() if theirs in given}
    if "seed" not in named | extra:
        named["seed"] = secrets.randbelow(MAX_DRAWN_SEED)
    return Asked(
        messages=[_message(one) for one in given["messages"]],
        settings=Settings.from_json(named, settings),
        stop=stop_texts(given.get("stop")),
        is_streamed=bool(given.get("stream")),
        with_usage=bool(options.get("include_usage")),
    )


def unknown_model(asked: Any, model: str) -> RefusedError:
    return RefusedError(f"The model {asked!r} is not here: use {model!r}.", 404, "model_not_found", "model")


def _message(message: Any) -> dict:
    """Role and text. Parts of text are joined, and a developer is a system; the engine refuses other roles."""
    if not isinstance(message, dict):
        raise RefusedError(f"A message has a role and a content, not {message!r}.", param="messages")
    role, content = message.get("role"), message.get("content")
    if isinstance(content, list):
        if not all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in content):
            raise RefusedError("This model reads text alone: leave out parts of other types.", param="messages")
        content = "".join(part["text"] for part in content)
    return {"role": "system" if role == "developer" else role, "content": content}


@dataclass
class Reply:
    """An answer on its way to a client."""

    model: str
    asked: Asked
    id: str = field(default_factory=lambda: f"chatcmpl-{secrets.token_hex(12)}")
    created: int = field(default_factory=lambda: int(time.time()))
    counters: Counters = field(default_factory=Counters)

    def add(self, steps: Step) -> None:
        for step in steps:
            self.counters.add(step)

    def completion(self, summary: RunSummary) -> dict[str, Any]:
        """The whole answer."""
        message = {"role": "assistant", "content": summary.text, "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": FINISHED[summary.finish_reason]}
        told = {"usage": self._usage(summary), "moespec": self._own(summary)}
        return self._object("chat.completion", [choice]) | told

    def chunks(self, steps: Step) -> Iterator[dict[str, Any]]:
        """What these steps add to a stream: first the role, text where there is some, last why it ended, and usage."""
        self.add(steps)
        if steps[0].kind == "prefill":
            yield self._chunk({"role": "assistant", "content": ""})
        text, summary = "".join(step.text for step in steps), steps[-1].summary
        if text:
            yield self._chunk({"content": text})
        if summary is not None:
            yield self._chunk({}, FINISHED[summary.finish_reason]) | {"moespec": self._own(summary)}
            if self.asked.with_usage:
                yield self._object("chat.completion.chunk", []) | {"usage": self._usage(summary)}

    def _object(self, kind: str, choices: list[dict]) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model, "choices": choices}

    def _chunk(self, delta: dict, finish_reason: str | None = None) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        chunk = self._object("chat.completion.chunk", [choice])
        return chunk | {"usage": None} if self.asked.with_usage else chunk

    def _usage(self, summary: RunSummary) -> dict[str, Any]:
        """Rejected draft tokens are named and, unlike OpenAI's, not counted among the completion's."""
        num_prompt, num_written, counters = len(summary.prompt_token_ids), len(summary.token_ids), self.counters
        return {
            "prompt_tokens": num_prompt,
            "completion_tokens": num_written,
            "total_tokens": num_prompt + num_written,
            "completion_tokens_details": {
                "accepted_prediction_tokens": counters.num_accepted,
                "rejected_prediction_tokens": counters.num_drafted - counters.num_accepted,
            },
        }

    def _own(self, summary: RunSummary) -> dict[str, Any]:
        return outcome_json(summary, self.counters, self.asked.settings)
