"""What a task is and how operands are held out. Knows nothing of any family."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass

HELD_OUT_ONE_IN = 50


@dataclass(frozen=True)
class Task:
    """One question with its exact answer. `key` holds the family and the operands, never the phrasing.

    `answer` stands word for word in the reply; `checks` are asserts for tasks whose answer is code.
    """

    family: str
    key: str
    question: str
    reply: str
    answer: str
    checks: tuple[str, ...] = ()

    @property
    def messages(self) -> list[dict[str, str]]:
        return [{"role": "user", "content": self.question}, {"role": "assistant", "content": self.reply}]

    @property
    def is_held_out(self) -> bool:
        digest = hashlib.sha256(self.key.encode()).digest()
        return int.from_bytes(digest[:8], "big") % HELD_OUT_ONE_IN == 0


TaskMaker = Callable[[random.Random], Task]


def say(rng: random.Random, *forms: str, **operands: object) -> str:
    """One of the phrasings with its operands, now and then in lower case or with a please."""
    text = rng.choice(forms).format(**operands)
    mood = rng.random()
    if mood < 0.15 and not any(character.isupper() for character in text[1:]):
        return text[0].lower() + text[1:].rstrip(".")
    return f"Please {text[0].lower()}{text[1:]}" if mood > 0.9 and not text.endswith("?") else text
