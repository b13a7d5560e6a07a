"""Where conversations are kept between their turns: each with its cache and a drafter's state, taken by one request.

Owns who gets which: the free one that shares most with the prompt, a new one only where none is free. Knows nothing of
how a request is answered.
"""

from __future__ import annotations

from dataclasses import dataclass

from moespec.drafters.base import Drafter
from moespec.kv_cache import TreeCache
from moespec.run import Conversation


@dataclass
class Seat:
    """A conversation and its drafter; between two steps both cover the same positions."""

    conversation: Conversation
    drafter: Drafter | None
    is_taken: bool = False

    def forget(self) -> None:
        """Begin anew, whatever a failed step left, in the same storage: what was captured of steps lies there."""
        cache = self.conversation.cache
        cache.truncate(0)
        self.conversation = Conversation(cache)
        if self.drafter is not None:
            self.drafter.truncate(0)


class Seats:
    """All seats of an engine; the first one's drafter is the engine's own, the others' are forked from it."""

    def __init__(self, num_layers: int, drafter: Drafter | None) -> None:
        self._num_layers, self._drafter = num_layers, drafter
        self._seats = [Seat(self._conversation(), drafter)]  # those left last come last

    def __len__(self) -> int:
        return len(self._seats)

    def _conversation(self) -> Conversation:
        return Conversation(TreeCache(self._num_layers))

    @property
    def any_taken(self) -> bool:
        return any(seat.is_taken for seat in self._seats)

    def take(self, prompt_ids: list[int]) -> Seat:
        """A seat for this prompt. ValueError if the drafter can serve no further conversation."""
        free = [seat for seat in self._seats if not seat.is_taken]
        if not free:
            free = [Seat(self._conversation(), self._fork())]
            self._seats += free
        seat = max(free, key=lambda seat: seat.conversation.num_shared(prompt_ids))
        seat.is_taken = True
        return seat

    def leave(self, seat: Seat) -> None:
        """Free for the next; what it holds is kept until then."""
        seat.is_taken = False
        self._seats.remove(seat)
        self._seats.append(seat)

    def forget(self) -> None:
        """Drop every conversation that nobody is at."""
        for seat in self._seats:
            if not seat.is_taken:
                seat.forget()

    def _fork(self) -> Drafter | None:
        if self._drafter is None:
            return None
        if not hasattr(self._drafter, "fork"):
            raise ValueError(f"the drafter {self._drafter.name} serves one conversation at a time: it has no fork().")
        return self._drafter.fork()
