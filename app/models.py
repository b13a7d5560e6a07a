"""Which model answers: the embedded one at first, and the one that was named once it is there.

Owns what is said when the named one is not there, yet or at all. Knows nothing of how a model is loaded or who asks.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from app.loading import Serving

INSTEAD = "The embedded model answers."


class Models:
    """The one that answers now, and the one that will. `notice` is a sentence for the page, "" for nothing to say."""

    def __init__(self, notice: str = "") -> None:
        self.notice = f"{notice} {INSTEAD}" if notice else ""
        self.now: Serving | None = None
        self._next: Serving | None = None
        self._error = ""
        self._ready = threading.Event()

    def wait(self) -> Serving:
        """The one that answers now. ValueError says why there is none."""
        self._ready.wait()
        if self.now is None:
            raise ValueError(self._error)
        return self.now

    def load_first(self, load: Callable[[], Serving]) -> None:
        try:
            self.now = load()
        except ValueError as error:
            self._error = str(error)
        except Exception as error:
            logging.exception("the model could not be loaded")
            self._error = f"{type(error).__name__}: {error}"
        finally:
            self._ready.set()

    def load_wanted(self, name: str, load: Callable[[], Serving]) -> None:
        """Load the one that was named, for minutes. Where that fails the first one goes on."""
        self.notice = f"{name} is being loaded. Until it is there, the embedded model answers."
        try:
            self._next = load()
        except ValueError as error:
            self.notice = f"{error} {INSTEAD}"
        except Exception as error:
            logging.exception("%s could not be loaded", name)
            is_full = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"  # torch's
            what = "memory ran out" if is_full else f"{type(error).__name__}: {error}"
            self.notice = f"{name} could not be loaded ({what}). {INSTEAD}"

    @property
    def unready(self) -> str:
        """Why nobody can be answered now, for those who will not wait; "" where they can."""
        if self.now is not None:
            return ""
        return self._error if self._ready.is_set() else "The model is still loading: ask again in a few seconds."

    @property
    def is_one_waiting(self) -> bool:
        """Whether one is loaded and not yet in its place."""
        return self._next is not None

    def take_over(self) -> None:
        """Let the one that waits answer from now on."""
        if self._next is not None:
            self.now, self._next, self.notice = self._next, None, ""
            self._ready.set()
