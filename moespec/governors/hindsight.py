"""What trees that stop sooner or later would have brought, step by step, by the trees that were verified.

Of a verified tree every smaller one that the same drafter would have grown is known: its rows, how many of them were
accepted, and what a table says that it costs. So all thresholds that are no lower than the step's own are compared on
the very same step, with no noise between them and no trust in the drafter's probabilities; to see lower ones, a tree
must be grown further now and then.

Owns the thresholds and their running account. Knows nothing of tables, budgets or machines.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

# Of the least likely path that is kept, likelier and likelier; behind the last one there is plain decoding.
THRESHOLDS = (0.02, 0.03, 0.04, 0.06, 0.08, 0.1, 0.12, 0.16, 0.2, 0.25, 0.3, 0.4, 0.5, 0.65, 0.8)
PLAIN = len(THRESHOLDS)
START = THRESHOLDS.index(0.12)
MEMORY = 0.995  # share of what was seen that is kept at each step: about the last two hundred count
LEAST_SEEN = 2.0  # steps that must show a threshold
FIRST_SEEN = 16.0  # steps before anything is concluded


class Hindsight:
    """Per threshold: what it adds to the next higher one, in tokens and ms, over the steps that show it."""

    def __init__(self) -> None:
        self._num_steps, self._tokens, self._ms = ([0.0] * PLAIN for _ in range(3))

    def observe(
        self,
        lowest: int,
        path_p: Sequence[float],
        depths: Sequence[int],
        accepted: Collection[int],
        cost_ms: Callable[[int, int], float],
        plain_ms: float,
    ) -> None:
        """A step whose tree was grown down to THRESHOLDS[lowest]; `accepted` are rows, the root is row 0.

        cost_ms: of so many rows when the deepest is so deep; of the root alone: its search for children included.
        """
        rows = sorted(range(1, len(path_p)), key=lambda row: path_p[row])
        tokens, depth, num_rows, before_ms = 0, 0, 1, plain_ms
        for place in range(PLAIN - 1, lowest - 1, -1):
            before, threshold = tokens, THRESHOLDS[place]
            while rows and path_p[rows[-1]] >= threshold:
                row = rows.pop()
                tokens, depth, num_rows = tokens + (row in accepted), max(depth, depths[row]), num_rows + 1
            now_ms = cost_ms(num_rows, depth)
            self._num_steps[place] = MEMORY * self._num_steps[place] + 1
            self._tokens[place] = MEMORY * self._tokens[place] + tokens - before
            self._ms[place] = MEMORY * self._ms[place] + now_ms - before_ms
            before_ms = now_ms

    def best(self, price: float) -> int:
        """The place of the threshold that brings the most, where a ms is worth `price` tokens; `PLAIN` if none does."""
        if self._num_steps[-1] < FIRST_SEEN:
            return START
        best, most, gain = PLAIN, 0.0, 0.0
        for place in range(PLAIN - 1, -1, -1):
            if self._num_steps[place] < LEAST_SEEN:
                break
            gain += (self._tokens[place] - price * self._ms[place]) / self._num_steps[place]
            if gain > most:
                best, most = place, gain
        return best
