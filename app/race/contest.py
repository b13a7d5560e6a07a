"""What is compared: a prompt, and the settings that answer it; as the form holds it, and as a link does.

Owns the form of a link and the names that contestants go by. Knows nothing of how an answer is run or shown.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from app.controls import GROUPS, preset_of
from app.settings import PRESETS, Settings, presets

if TYPE_CHECKING:
    from moespec import EngineInfo

LETTERS = "ABCD"  # what contestants are called in sentences
MIN_CONTESTANTS, MAX_CONTESTANTS = 2, len(LETTERS)
MAX_RUNS, USUAL_RUNS = 5, 3
MAX_PROMPT_CHARACTERS = 4000  # of a prompt that still goes into a link
PLAIN, CHAT, OWN = "Plain decoding", "As in the chat", "Own settings"
KINDS = (PLAIN, *PRESETS, CHAT, OWN)
LINK_NAMES = ("prompt", "of", "runs")


@dataclass(frozen=True)
class Contest:
    """One prompt under two to four settings, each of them run so many times. ValueError says what is not allowed."""

    prompt: str
    contestants: tuple[Settings, ...]
    num_runs: int = USUAL_RUNS

    def __post_init__(self) -> None:
        if not isinstance(self.prompt, str) or not self.prompt.strip():
            raise ValueError("The prompt is empty: write what all contestants shall answer.")
        if len(self.prompt) > MAX_PROMPT_CHARACTERS:
            raise ValueError(f"The prompt is longer than {MAX_PROMPT_CHARACTERS} characters: shorten it.")
        if not MIN_CONTESTANTS <= len(self.contestants) <= MAX_CONTESTANTS:
            raise ValueError(
                f"{len(self.contestants)} contestants cannot be compared: "
                f"choose {MIN_CONTESTANTS} to {MAX_CONTESTANTS}."
            )
        if type(self.num_runs) is not int or not 1 <= self.num_runs <= MAX_RUNS:
            raise ValueError(f"runs={self.num_runs!r} is not allowed: use 1 to {MAX_RUNS}.")

    @property
    def reference(self) -> int:
        """Whom the others are held against: plain decoding, else the first without loss, else the first."""
        tests: tuple[Callable[[Settings], bool], ...] = (is_plain, lambda settings: settings.is_lossless)
        found = (n for test in tests for n, settings in enumerate(self.contestants) if test(settings))
        return next(found, 0)

    def to_link(self) -> str:
        """Compact JSON: of settings what differs from the defaults."""
        named: dict[str, Any] = {"prompt": self.prompt, "of": [settings.changed() for settings in self.contestants]}
        if self.num_runs != USUAL_RUNS:
            named["runs"] = self.num_runs
        return json.dumps(named, separators=(",", ":"), ensure_ascii=False)

    @staticmethod
    def from_link(text: str) -> Contest:
        """ValueError says what is wrong with it."""
        try:
            named = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError("it is not JSON, or only a part of it arrived.") from error
        if not isinstance(named, dict) or not isinstance(named.get("of"), list):
            raise ValueError('it has no list of settings: write {"prompt":"…","of":[{…},{…}]}.')
        unknown = sorted(set(named) - set(LINK_NAMES))
        if unknown:
            raise ValueError(f"{unknown[0]!r} is not known: use {', '.join(LINK_NAMES)}.")
        contestants = tuple(Settings.from_json(values) for values in named["of"][: MAX_CONTESTANTS + 1])
        return Contest(named.get("prompt", ""), contestants, named.get("runs", USUAL_RUNS))


@dataclass(frozen=True)
class Slot:
    """A contestant as the form holds it: one of KINDS, and for own settings their JSON."""

    kind: str
    own: str = ""

    def settings(self, length: int, info: EngineInfo, chat: Callable[[], Settings]) -> Settings:
        """What it asks for, writing at most `length` tokens. Whatever the chat's settings, all write alike.

        ValueError says what is not allowed.
        """
        if self.kind == OWN:
            return Settings.from_json({"max_new_tokens": length} | self._own_values())
        if self.kind == PLAIN:
            return Settings(budget=None, drafter="none", max_new_tokens=length)
        chosen = chat() if self.kind == CHAT else presets(info.top_k, info.num_experts)[self.kind]
        named = {name: value for name, value in chosen.to_json().items() if name not in GROUPS["How to write"]}
        return Settings(**named, max_new_tokens=length)

    def _own_values(self) -> dict[str, Any]:
        try:
            values = json.loads(self.own or "{}")
        except (ValueError, RecursionError) as error:
            raise ValueError('own settings are JSON, such as {"budget": 20, "policy": "truncation"}.') from error
        if not isinstance(values, dict):
            raise ValueError(f'own settings are names and values, such as {{"budget": 20}}, not {self.own.strip()}.')
        return values


def slot_of(settings: Settings, length: int, info: EngineInfo) -> Slot:
    """How the form holds these settings where all write at most `length` tokens."""
    for slot in map(Slot, (PLAIN, *PRESETS)):
        if slot.settings(length, info, Settings) == settings:
            return slot
    named = settings.changed() | {"max_new_tokens": settings.max_new_tokens}
    if settings.max_new_tokens == length:
        del named["max_new_tokens"]
    return Slot(OWN, json.dumps(named, ensure_ascii=False))


def is_plain(settings: Settings) -> bool:
    """One token per pass: a budget never acts on a single row."""
    return settings.drafter == "none"


def name_of(settings: Settings, info: EngineInfo) -> str:
    """What a contestant is called."""
    return PLAIN if is_plain(settings) else preset_of(settings, info) or OWN


def description(settings: Settings) -> str:
    """What it asks for, in a line: how much it loads, and what else differs from the defaults."""
    named = settings.changed()
    named.pop("budget", None)
    load = named.pop("method", "") or ("no budget" if settings.budget is None else f"budget {settings.budget}")
    return " · ".join([load, *(f"{name.replace('_', ' ')} {value}" for name, value in named.items())])
