"""How much one visitor may ask for, and who counts as one.

Owns the numbers, the variables that set them, and what the refused are told. Knows nothing of pages or answers.
"""

from __future__ import annotations

import ipaddress
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

MINUTE_S = 60.0
SPACE_REQUESTS_PER_MINUTE = 30  # more than a person types; a comparison asks four times
NO_LIMIT = "none"


class TooManyError(ValueError):
    """Refused for now; the sentence says when to come back."""

    def __init__(self, sentence: str, retry_after_s: int) -> None:
        super().__init__(sentence)
        self.retry_after_s = retry_after_s


@dataclass(frozen=True)
class Limits:
    """What is given to everyone, on the page and to other programs alike.

    max_new_tokens       of one answer
    requests_per_minute  of one visitor; None: as many as they like
    num_places           answers that are written or waited for, all visitors' together
    is_behind_proxy      whether a proxy of the host's own says in X-Forwarded-For who asks, as before a Space
    """

    max_new_tokens: int = 2048  # where the page's slider ends
    requests_per_minute: int | None = None
    num_places: int = 12
    is_behind_proxy: bool = False

    @staticmethod
    def from_environment(environment: Mapping[str, str] = os.environ) -> Limits:
        """From MOESPEC_MAX_TOKENS, MOESPEC_REQUESTS_PER_MINUTE (a number, or none) and MOESPEC_PLACES; what is not set
        keeps its default, and in a Space requests are limited. ValueError names the variable that is no number."""

        def read(name: str, default: Any) -> Any:
            return _whole(name, environment[name]) if environment.get(name, "").strip() else default

        on_space, per_minute = "SPACE_ID" in environment, "MOESPEC_REQUESTS_PER_MINUTE"
        usual = SPACE_REQUESTS_PER_MINUTE if on_space else None
        is_unlimited = environment.get(per_minute, "").strip().lower() == NO_LIMIT
        return Limits(
            max_new_tokens=read("MOESPEC_MAX_TOKENS", Limits.max_new_tokens),
            requests_per_minute=None if is_unlimited else read(per_minute, usual),
            num_places=read("MOESPEC_PLACES", Limits.num_places),
            is_behind_proxy=on_space,
        )

    def check_length(self, max_new_tokens: int) -> None:
        """ValueError if an answer may not be so long."""
        if max_new_tokens > self.max_new_tokens:
            most = self.max_new_tokens
            raise ValueError(
                f"max_new_tokens={max_new_tokens} is more than an answer may have here: use {most} or less."
            )

    def visitor(self, request: Any) -> str:
        """The address that a request is from; its `client` and `headers` are read.

        Behind a proxy the last public one in X-Forwarded-For: what stands before it is whatever the visitor has sent.
        """
        host = request.client.host if request.client else "unknown"
        if not self.is_behind_proxy:
            return host
        named = [part.strip() for part in request.headers.get("x-forwarded-for", "").split(",")]
        return next((part for part in reversed(named) if _is_public(part)), host)


class Visits:
    """When each visitor was let in, within the last minute. Not thread-safe: its owner holds a lock."""

    def __init__(self) -> None:
        self._times_s: dict[str, list[float]] = {}

    def admit(self, visitor: str, per_minute: int, now_s: float) -> None:
        """Let in and count. TooManyError if this visitor was let in so often within the last minute."""
        recent = ((name, [t for t in times if t > now_s - MINUTE_S]) for name, times in self._times_s.items())
        self._times_s = {name: times for name, times in recent if times}
        times = self._times_s.setdefault(visitor, [])
        if len(times) >= per_minute:
            wait_s = math.ceil(times[-per_minute] + MINUTE_S - now_s)
            raise TooManyError(
                f"{per_minute} answers a minute are one visitor's share: ask again in {wait_s} s.", wait_s
            )
        times.append(now_s)


def _whole(name: str, text: str) -> int:
    if not text.strip().isdecimal() or int(text) < 1:
        raise ValueError(f"The variable {name}={text!r} is no whole number of 1 or more: correct it, or leave it out.")
    return int(text)


def _is_public(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_global
    except ValueError:
        return False
