"""How far a run has come, in tokens or in trained minutes, and the learning rate there. Knows nothing of models."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

MAX_GAP_S = 5.0  # a longer pause between steps is the machine's, not the run's


@dataclass
class Progress:
    """Counts trained seconds and tokens against a budget of minutes or of tokens; `fraction` runs from 0 to 1.

    `first_tokens` were trained by earlier runs: they count towards `max_tokens`, in no time of this run's.
    """

    minutes: float | None
    max_tokens: int | None
    first_tokens: int = 0
    tokens: int = field(init=False)
    seconds: float = 0.0
    _last: float | None = None

    def __post_init__(self) -> None:
        if (self.minutes is None) == (self.max_tokens is None):
            raise ValueError(f"give either minutes or tokens, not minutes={self.minutes}, tokens={self.max_tokens}.")
        self.tokens = self.first_tokens

    def step(self, num_tokens: int) -> None:
        now = time.monotonic()
        if self._last is not None:
            self.seconds += min(now - self._last, MAX_GAP_S)
        self._last = now
        self.tokens += num_tokens

    @property
    def fraction(self) -> float:
        if self.max_tokens is not None:
            return min(1.0, self.tokens / self.max_tokens)
        assert self.minutes is not None
        return min(1.0, self.seconds / (60 * self.minutes))

    @property
    def seconds_left(self) -> float:
        earlier = self.first_tokens / self.max_tokens if self.max_tokens is not None else 0.0
        return self.seconds * (1 - self.fraction) / max(self.fraction - earlier, 1e-6)


def learning_rate(peak: float, fraction: float, step: int, warmup_steps: int, decay_from: float = 0.7) -> float:
    """Linear warm-up, constant, then linear decay to 1 % of the peak over the last part of the budget."""
    warm = min(1.0, (step + 1) / warmup_steps)
    decay = 1.0 if fraction < decay_from else max(0.01, (1 - fraction) / (1 - decay_from))
    return peak * warm * decay
