"""Runs a contest: one answer after another, in rounds, on a machine that writes no other visitor's answer.

Owns the order, the waiting and the stopping. Knows nothing of widgets or of what is made of the answers.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Generator, Iterator
from dataclasses import replace

from app.places import Series
from app.race.contest import LETTERS, Contest, name_of
from app.race.outcome import Frame, Measured, middle, race_frame
from app.recordings import Recordings
from app.service import Service
from app.settings import Settings

WARM_UP_TOKENS = 16  # nobody's first steps are timed: kernels compile, a governor measures, the prompt is read
PATIENCE_S = 15.0  # for others' answers to end; then an answer is written beside them, and says so
POLL_S = 0.1
SAY_S = 0.25  # what is said is sent by the process that is being measured: seldom
SETTLE_S = 0.15  # for what was said last to be sent and drawn
Sayings = Iterator[str]


class Running:
    """A contest under way for one visitor. `results` has each contestant's finished runs, in the order of rounds."""

    def __init__(self, service: Service, session: str, contest: Contest, visitor: str = "") -> None:
        self.contest = contest
        self.names = [name_of(settings, service.info) for settings in contest.contestants]
        self.results: list[list[Measured]] = [[] for _ in contest.contestants]
        self._service, self._session = service, session
        self._messages = [{"role": "user", "content": contest.prompt}]
        self._stopped = threading.Event()
        self._visitor, self._series = visitor, Series()

    @property
    def num_finished(self) -> int:
        return sum(map(len, self.results))

    @property
    def num_runs(self) -> int:
        """Of all contestants together."""
        return self.contest.num_runs * len(self.contest.contestants)

    @property
    def is_stopped(self) -> bool:
        return self._stopped.is_set()

    def stop(self) -> None:
        """End with what is finished."""
        self._stopped.set()
        self._service.queue.stop(self._session, self._series)

    def check(self) -> None:
        """ValueError names the contestant that cannot run, before any does."""
        for letter, settings in zip(LETTERS, self.contest.contestants, strict=False):
            try:
                self._service.check(settings)
                self._service.fit(self._messages, settings)
            except ValueError as error:
                raise ValueError(f"{letter}: {error}") from error

    def run(self) -> Sayings:
        """What to say, as often as it changes; `results` has grown by then."""
        for number, settings in enumerate(self.contest.contestants):
            short = replace(settings, max_new_tokens=min(WARM_UP_TOKENS, settings.max_new_tokens))
            yield from self._answer(short, f"Warming up, {self._place(number)}")
        num_rounds = self.contest.num_runs
        for round_number in range(1, num_rounds + 1):
            of_rounds = f"Round {round_number} of {num_rounds}, " if num_rounds > 1 else ""
            for number, settings in enumerate(self.contest.contestants):
                measured = yield from self._answer(settings, of_rounds + self._place(number))
                if measured.is_finished:
                    self.results[number].append(measured)

    def frame(self, recordings: Recordings | None = None) -> Frame:
        """What has come of it so far; with the answers that are shown kept among the recordings."""
        frame = race_frame(self.contest, self.names, self.results)
        if recordings is not None:
            for lane, runs in zip(frame["lanes"], self.results, strict=True):
                if runs:
                    lane["run"] = middle(runs).kept(recordings).id
        return frame

    def _place(self, number: int) -> str:
        return f"{number + 1} of {len(self.names)}: {self.names[number]}…"

    def _answer(self, settings: Settings, saying: str) -> Generator[str, None, Measured]:
        """An answer that is not finished was stopped; once that has happened, none begins."""
        measured = Measured(self._service.header(self._messages, settings))
        if not self.is_stopped:
            yield from self._until_idle(saying)
            yield saying
            time.sleep(SETTLE_S)
            yield from self._until_own_place(saying)
        if self.is_stopped:
            return measured
        ticket = self._service.queue.enter(self._session, self._visitor, self._series).ticket
        said = time.monotonic()
        for steps in self._service.stream(self._session, ticket, self._messages, settings):
            measured.steps += steps
            if self.is_stopped:  # pressed before there was a place to stop
                self._service.queue.stop(self._session, self._series)
            measured.is_shared |= self._service.queue.num_beside(self._session) > 0
            if time.monotonic() - said > SAY_S:
                said = time.monotonic()
                yield f"{saying} {measured.num_tokens} token{'s' * (measured.num_tokens > 1)}"
        if not measured.is_finished:  # by the visitor, here or elsewhere on the page
            self._stopped.set()
        return measured

    def _until_own_place(self, saying: str) -> Sayings:
        """Between two runs this visitor may have asked the chat."""
        while self._session in self._service.queue.places and not self.is_stopped:
            yield f"{saying} waiting for your answer in the chat"
            time.sleep(POLL_S)

    def _until_idle(self, saying: str) -> Sayings:
        began = time.monotonic()
        while (num_beside := self._service.queue.num_beside(self._session)) and time.monotonic() - began < PATIENCE_S:
            if self.is_stopped:
                return
            yield f"{saying} waiting for {num_beside} other visitor{'s' * (num_beside > 1)}: the machine must be idle"
            time.sleep(POLL_S)
