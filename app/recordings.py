"""Answers as they were made, step by step: what the panels replay, compare, race and export.

Owns how long they are kept and under which ids. An id is a secret: who has it may see the answer. Knows nothing of how
a step is drawn.
"""

from __future__ import annotations

import secrets
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from moespec import StepTrace, TraceHeader, read_trace

MAX_STEPS = 12_000  # of the embedded model, or as much of others: kept by all recordings together, about 15 kB each
USUAL_CELLS = 8 * 64  # layers times experts of the embedded model
MAX_PROMISED = 1000  # ids that were given out before their answers
GONE = "The steps of this answer are no longer kept: ask again, or open an exported trace in Replay."


@dataclass(eq=False)
class Recording:
    """An answer's header and its steps so far."""

    id: str
    header: TraceHeader
    steps: list[StepTrace] = field(default_factory=list)

    @property
    def size(self) -> float:
        """In steps of the embedded model; what has none yet counts as one."""
        num_layers = max((len(step.experts_natural) for step in self.steps[:2]), default=0)
        num_cells = num_layers * int(self.header.model.get("num_experts") or 0)
        return (1 + len(self.steps)) * max(1.0, num_cells / USUAL_CELLS)

    @property
    def question(self) -> str:
        """The last thing that was said to the model."""
        prompt = self.header.prompt
        if isinstance(prompt, str):
            return prompt
        texts = [str(one.get("content", "")) for one in prompt if isinstance(one, dict)]
        return texts[-1] if texts else f"{len(prompt)} token ids"

    def between(self, first: int, last: int) -> Sequence[StepTrace]:
        """Steps `first` to before `last`; fewer where there are not so many."""
        return self.steps[max(0, first) : max(0, last)]


class Recordings:
    """All recordings of a process; the oldest are forgotten first. Thread-safe."""

    def __init__(self, max_steps: int = MAX_STEPS) -> None:
        self._max_steps = max_steps
        self._lock = threading.Lock()
        self._by_id: OrderedDict[str, Recording] = OrderedDict()
        self._for_good: dict[str, Recording] = {}
        self._promised: dict[str, None] = {}

    def promise(self) -> str:
        """The id that an answer will have which is waited for: who knows it sees the first step at once."""
        recording_id = secrets.token_urlsafe(12)
        with self._lock:
            self._promised[recording_id] = None
            if len(self._promised) > MAX_PROMISED:
                del self._promised[next(iter(self._promised))]
        return recording_id

    def is_promised(self, recording_id: str) -> bool:
        """Whether that answer has not begun yet."""
        return recording_id in self._promised

    def begin(self, header: TraceHeader, promised: str | None = None) -> Recording:
        """A new, empty one; under the id that was promised, if one was."""
        recording = Recording(promised or secrets.token_urlsafe(12), header)
        with self._lock:
            self._by_id[recording.id] = recording
            self._promised.pop(recording.id, None)
            self._forget_old()
        return recording

    def open(self, path: Path, *, keep: bool = False) -> Recording:
        """One that was exported, kept for good or like any other. ValueError says what is wrong with the file."""
        header, steps = read_trace(path)
        if keep:
            recording = Recording(path.stem, header, steps)
            self._for_good[recording.id] = recording
            return recording
        recording = self.begin(header)
        recording.steps += steps
        with self._lock:
            self._forget_old()
        return recording

    def of(self, recording_id: str) -> Recording:
        """ValueError if it is no longer kept."""
        with self._lock:
            if recording_id in self._for_good:
                return self._for_good[recording_id]
            recording = self._by_id.get(str(recording_id))
            if recording is None:
                raise ValueError(GONE)
            self._by_id.move_to_end(recording.id)
            return recording

    def _forget_old(self) -> None:
        """The newest stays, however long it is."""
        size = sum(recording.size for recording in self._by_id.values())
        while size > self._max_steps and len(self._by_id) > 1:
            _, oldest = self._by_id.popitem(last=False)
            size -= oldest.size
