"""A visitor's place in the queue, and what they change while their answer is written. Knows nothing of engines."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from app.settings import Settings
from moespec import Control

if TYPE_CHECKING:
    from app.loading import Serving
    from app.zero import ChangeFile


@dataclass(eq=False)
class Series:
    """Several answers that are one request: counted once, all of one model, and no control of the chat moves them."""

    engine: object | None = None  # that wrote the first


class Asked(NamedTuple):
    """What the page is to answer: the messages, what its controls hold, and its recording's id."""

    messages: list[dict]
    held: str
    recording_id: str


@dataclass
class Place:
    """A ticket that no other has, and how many stood before.

    asked: by the page, kept here until its turn: at each message of an event a browser copies the widgets that it
    reads, and a conversation grows. serving: who writes the answer, once it has begun. changes: the way to another
    process that does; is_deaf: it does not hear them. as_markdown: how the page shows it.
    """

    ticket: int
    num_before: int
    control: Control = field(default_factory=Control)
    asked: Asked | None = None
    serving: Serving | None = None
    changes: ChangeFile | None = None
    moved: Settings | None = None
    is_deaf: bool = False
    as_markdown: bool = False
    series: Series | None = None
    taken_s: float = field(default_factory=time.monotonic)
    passing_on: threading.Lock = field(default_factory=threading.Lock)

    @property
    def begun(self) -> bool:
        return self.serving is not None

    def move(self, settings: Settings) -> None:
        """These act from the next step of the answer on."""
        self.control.update(budget=settings.budget_config, tree=settings.tree_config)
        self.moved = settings
        self.pass_on()

    def stop(self) -> None:
        self.control.stop()
        self.pass_on()

    def pass_on(self) -> None:
        """Tell the other process, if there is one, all that was changed so far."""
        with self.passing_on:
            if self.changes is not None:
                try:
                    self.changes.write(self.moved, self.control.stopped)
                except OSError:
                    self.is_deaf = True
