"""Everyone whose answer is being written or waited for: who comes in, who leaves, when another model may take over.

Owns the places and what a visitor may ask. Knows nothing of how an answer is written.
"""

from __future__ import annotations

import threading
import time

from app.limits import Limits, TooManyError, Visits
from app.loading import Serving
from app.models import Models
from app.places import Place, Series

UNUSED_S = 300.0  # that a place waits for its browser, which may wait for others' answers
TAKING_OVER = "A larger model has been loaded and takes over when the answers before yours are written: ask again then."
OWN_ANSWER = "Your last answer is still being written: stop it, or wait for its end."
OWN_SERIES = "Your comparison or sweep is still running: stop it on its tab, or wait for its end."
DEAF = " What you move now acts from the next answer on: the process that writes this one cannot be told."


class Queue:
    """A place for each session that asks, in order. A model that waits takes over when no answer is half written."""

    def __init__(self, limits: Limits, models: Models) -> None:
        self._limits, self._models = limits, models
        self._visits = Visits()
        self._lock = threading.Lock()
        self._tickets = 0
        self.places: dict[str, Place] = {}

    def enter(self, session: str, visitor: str = "", series: Series | None = None) -> Place:
        """Join the queue. ValueError if this session's answer is being written, or another model answers than began the
        series; TooManyError if all places are taken or this visitor, who is the session unless named, has asked too
        often."""
        with self._lock:
            self._drop_unused()
            if session in self.places:
                raise ValueError(OWN_ANSWER if self.places[session].series is None else OWN_SERIES)
            self._take_over()
            if self._models.is_one_waiting:
                raise ValueError(TAKING_OVER)
            if len(self.places) >= self._limits.num_places:
                raise TooManyError(
                    f"{self._limits.num_places} visitors are waiting already: try again in a minute.", 60
                )
            is_first = series is None or series.engine is None
            if is_first and self._limits.requests_per_minute is not None:
                self._visits.admit(visitor or session, self._limits.requests_per_minute, time.monotonic())
            if series is not None and self._models.now is not None:
                series.engine = series.engine or self._models.now.engine
                if series.engine is not self._models.now.engine:
                    raise ValueError("Another model has taken over in between: start again to have all of one.")
            self._tickets += 1
            place = self.places[session] = Place(self._tickets, len(self.places), series=series)
            return place

    def begin(self, session: str, ticket: int, serving: Serving) -> Place | None:
        """The place of a ticket, whose answer this model writes from now on; None if the ticket was given back."""
        with self._lock:
            place = self.places.get(session)
            if place is None or place.ticket != ticket:
                return None
            place.serving = serving
            self._take_over()
            return place

    def leave(self, session: str, ticket: int | None = None) -> None:
        """Stop this visitor's answer, wherever it stands, or the one of a ticket, if it is still that one's turn."""
        with self._lock:
            place = self.places.get(session)
            if place is None or ticket not in (None, place.ticket):
                return
            del self.places[session]
            self._take_over()
        place.stop()

    def stop(self, session: str, series: Series | None = None) -> None:
        """End this visitor's answer, or the one of a series; one that has not begun loses its place."""
        place = self.places.get(session)
        if place is None or place.series is not series:
            return
        if place.begun:
            place.stop()
        else:
            self.leave(session)

    def take_over(self) -> None:
        """Let a model that waits answer from now on, unless somebody's prompt has been read for the one before."""
        with self._lock:
            self._take_over()

    def _take_over(self) -> None:
        if all(place.begun for place in self.places.values()):
            self._models.take_over()

    def _drop_unused(self) -> None:
        """Places whose browser never came for its answer."""
        long_ago = time.monotonic() - UNUSED_S
        for session, place in list(self.places.items()):
            if not place.begun and place.taken_s < long_ago:
                del self.places[session]

    def expects(self, session: str, ticket: int) -> bool:
        """Whether this visitor has joined the queue with this ticket and not left it."""
        place = self.places.get(session)
        return place is not None and place.ticket == ticket

    def num_beside(self, session: str) -> int:
        """How many others' answers are being written in shared steps."""
        others = [place.serving for name, place in list(self.places.items()) if name != session]
        return sum(serving is not None and serving.batch is not None for serving in others)

    def remark(self, session: str) -> str:
        """What a visitor should know of the answer that is being written; "" for nothing."""
        place = self.places.get(session)
        return DEAF if place is not None and place.is_deaf else ""
