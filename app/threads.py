"""How many threads compute: for steps as many as are quickest now; for what is measured all, in a thread that ends.

A browser beside the model takes a core now and then. Where every core has its part of each step, the others wait for
the one that is late: one thread fewer is then quicker, with two cores twice as quick. Where the browser is somebody
else's machine all cores are. Owns the choice; knows nothing of engines.
"""

from __future__ import annotations

import functools
import math
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

NUM_COMPARED = 4  # steps with each number in a row, twice
AT_MOST_EVERY, AT_LEAST_EVERY = (12, 512), 1024  # steps between comparisons; the first the more, the more were in vain
HOPELESS = 1.5  # times as slow: two such steps are enough of the other number, which takes the cores from all others
LEAST_SHARE = 0.05  # of the time of a step, below which it was none
OFF, FAR_OFF = 1.3, 1.6  # how much steps may change until there is another; until it is one at once
MEMORY = 0.9  # share of what was seen that is kept at each step
Result = TypeVar("Result")


@functools.cache
def most_threads() -> int:
    """As many as torch takes by itself. To be asked for before `Threads` has chosen."""
    import torch

    return torch.get_num_threads()


def in_own_thread(work: Callable[[], Result]) -> Result:
    """`work` with all threads, from a thread that ends with it. OpenMP keeps a team for each thread that has computed,
    as long as it lives; where they are more than there are cores, teams wait asleep instead of awake, and steps take
    twice as long."""
    import torch

    with ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(most_threads(),)) as thread:
        return thread.submit(work).result()


class Threads:
    """The number for the thread that makes steps, which alone calls this: all, or one fewer."""

    def __init__(self) -> None:
        most = most_threads()
        self.num = most
        self._numbers = (most, most - 1) if most > 1 else (most,)
        self._seen: dict[int, list[float]] = {number: [] for number in self._numbers}  # seconds
        self._plan: list[int] = []  # of the comparison under way, the last one first
        self._known_s, self._recent_s = 0.0, 0.0  # per step: in the last comparison, and of late
        self._num_since, self._patience = AT_LEAST_EVERY, AT_MOST_EVERY[0]

    def timed(self, step: Callable[[], bool], *, may_compare: bool = True) -> bool:
        """What the step returns, made with the number of now; with another only if it may be compared."""
        if not may_compare:
            self._use(self.num)
            return step()
        if not self._plan and self._is_due:
            self._plan = [number for _ in range(2) for number in self._numbers for _ in range(NUM_COMPARED)]
        self._use(self._plan[-1] if self._plan else self.num)
        began = time.perf_counter()
        is_more = step()
        seconds = time.perf_counter() - began
        if seconds < LEAST_SHARE * self._known_s:
            return is_more  # there was nobody to make a step for
        if self._plan:
            self._compare(self._plan.pop(), seconds)
        else:
            self._num_since += 1
            self._recent_s += (1 - MEMORY) * (min(seconds, 4 * self._known_s) - self._recent_s)
        return is_more

    @property
    def _is_due(self) -> bool:
        off = max(self._recent_s, self._known_s) / (min(self._recent_s, self._known_s) or 1)
        wait = AT_LEAST_EVERY if off < OFF else self._patience if off < FAR_OFF else AT_MOST_EVERY[0]
        return len(self._numbers) > 1 and self._num_since >= wait

    def _use(self, number: int) -> None:
        import torch

        if torch.get_num_threads() != number:
            torch.set_num_threads(number)

    def _compare(self, number: int, seconds: float) -> None:
        """One more step is known. The slowest with each number is left out: it may have read a prompt."""
        self._seen[number].append(seconds)
        means = {tried: statistics.fmean(sorted(seen)[:-1] or [math.inf]) for tried, seen in self._seen.items()}
        if not self._plan:
            quickest = min(self._numbers, key=means.__getitem__)
            self._settle(quickest, means[quickest])
        elif number != self.num and self._known_s and HOPELESS * self._recent_s < means[number] < math.inf:
            self._settle(self.num, self._recent_s)

    def _settle(self, number: int, seconds: float) -> None:
        """This one is used from now on."""
        self._patience = min(2 * self._patience, AT_MOST_EVERY[1]) if number == self.num else AT_MOST_EVERY[0]
        self.num, self._num_since = number, 0
        self._known_s = self._recent_s = seconds
        self._plan.clear()
        for seen in self._seen.values():
            seen.clear()
