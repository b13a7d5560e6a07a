"""What trees that stop sooner or later would have brought, step by step, by the trees that were verified.

Of a verified tree every smaller one that the same drafter would have grown is known: its rows, how many of them were
accepted, and what a table says that it costs. So all thresholds that are no lower than the step's own are compared on
the very same step, with no noise between them and no trust in the drafter's probabilities; to see lower ones, a tree
must be grown further now and then.

Every tree holds a chain, too, which takes less time to draft: what that would have brought is known as well.

Owns the thresholds and their running account. Knows nothing of tables, budgets or machines.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

# Of the least likely path that is kept, likelier and likelier; behind the last one there is plain decoding.
THRESHOLDS = (0.02, 0.03, 0.04, 0.06, 0.08, 0.1, 0.12, 0.16, 0.2, 0.25, 0.3, 0.4, 0.5, 0.65, 0.8)
PLAIN = len(THRESHOLDS)
START = THRESHOLDS.index(0.12)
MEMORY = 0.99  # share of what was seen that is kept at each step: about the last hundred count
LEAST_SEEN, FEW_SEEN = 1.9, 4.0  # steps that must show a threshold; that count where the past counts for little
FIRST_SEEN = 16  # steps before anything is concluded
SURE, FIRST_MEMORY = 0.6, 0.9  # of a first guess, as a rule; share of that rule that is kept at each step

# Of so many rows when the deepest is so deep; of the root alone: its search for children included.
CostMs = Callable[[int, int], float]


class Tree(NamedTuple):
    """Rows, the root first: probability of the path by the drafter, depth, parent's row."""

    path_p: Sequence[float]
    depths: Sequence[int]
    parents: Sequence[int]


class ShapeCosts(NamedTuple):
    """Of trees as wide as asked for, of chains, and of a plain step."""

    wide_ms: CostMs
    chain_ms: CostMs
    plain_ms: float


class Found(NamedTuple):
    """A place in THRESHOLDS, or `PLAIN`, and the tokens that it gains over plain decoding, per step."""

    place: int
    gain: float


class Hindsight:
    """Per threshold: what it adds to the next higher one, in tokens and ms, over the steps that show it."""

    def __init__(self) -> None:
        self._num_steps, self._tokens, self._ms = ([0.0] * PLAIN for _ in range(3))
        self._num_seen = 0

    def observe(self, lowest: int, tree: Tree, accepted: Collection[int], cost_ms: CostMs, plain_ms: float) -> bool:
        """A step whose tree was grown down to THRESHOLDS[lowest]; `accepted` are rows.

        Whether at some threshold this step alone would have been quicker than plain decoding.
        """
        path_p, depths = tree.path_p, tree.depths
        rows = sorted(range(1, len(path_p)), key=lambda row: path_p[row])
        self._num_seen += 1
        tokens, depth, num_rows, before_ms, paid = 0, 0, 1, plain_ms, False
        for place in range(PLAIN - 1, lowest - 1, -1):
            before, threshold = tokens, THRESHOLDS[place]
            while rows and path_p[rows[-1]] >= threshold:
                row = rows.pop()
                tokens, depth, num_rows = tokens + (row in accepted), max(depth, depths[row]), num_rows + 1
            now_ms = cost_ms(num_rows, depth)
            self._num_steps[place] = MEMORY * self._num_steps[place] + 1
            self._tokens[place] = MEMORY * self._tokens[place] + tokens - before
            self._ms[place] = MEMORY * self._ms[place] + now_ms - before_ms
            before_ms, paid = now_ms, paid or (1 + tokens) * plain_ms > now_ms
        return paid

    def shorten(self) -> None:
        """Let what was seen count for no more than a few steps."""
        for place, num_steps in enumerate(self._num_steps):
            share = min(1.0, FEW_SEEN / num_steps) if num_steps else 1.0
            for sums in (self._num_steps, self._tokens, self._ms):
                sums[place] *= share

    def best(self, price: float) -> Found:
        """The threshold that brings the most, where a ms is worth `price` tokens; `PLAIN` if none brings anything."""
        if self._num_seen < FIRST_SEEN:
            return Found(START, 0.0)
        best, gain = Found(PLAIN, 0.0), 0.0
        for place in range(PLAIN - 1, -1, -1):
            if self._num_steps[place] < LEAST_SEEN:
                break
            gain += (self._tokens[place] - price * self._ms[place]) / self._num_steps[place]
            if gain > best.gain:
                best = Found(place, gain)
        return best


class Shape(NamedTuple):
    """What to grow: down to a place in THRESHOLDS, as wide as asked for or a chain; nothing at `PLAIN`."""

    place: int
    is_chain: bool


class Account:
    """What was seen of trees as wide as asked for, and of chains, which every tree shows."""

    def __init__(self) -> None:
        self._wide, self._chain = Hindsight(), Hindsight()

    def observe(self, grown: Shape, tree: Tree, accepted: Collection[int], costs: ShapeCosts) -> bool:
        """A step of so grown a tree; `accepted` are rows. Whether some part of it was quicker than plain decoding."""
        wide_paid = not grown.is_chain and self._wide.observe(
            grown.place, tree, accepted, costs.wide_ms, costs.plain_ms
        )
        chain = likeliest_chain(tree)
        part = Tree([tree.path_p[row] for row in chain], [*range(len(chain))], [*range(-1, len(chain) - 1)])
        kept = [number for number, row in enumerate(chain) if row in accepted]
        return self._chain.observe(grown.place, part, kept, costs.chain_ms, costs.plain_ms) or wide_paid

    def shorten(self) -> None:
        """Let what was seen count for less: text may have changed."""
        self._wide.shorten()
        self._chain.shorten()

    def best(self, price: float) -> Shape:
        """What brings the most, where a ms is worth `price` tokens."""
        wide, chain = self._wide.best(price), self._chain.best(price)
        return Shape(chain.place, True) if chain.gain > wide.gain else Shape(wide.place, False)


class Accounts:
    """One of text where the drafter is sure of its first guess, one of text where it is not: unlikely rows are worth
    more there. Which it is now, its own recent probabilities say, whatever is grown and accepted."""

    def __init__(self) -> None:
        self._of_unsure_text, self._of_sure_text = Account(), Account()
        self._first_p = 1.0  # of recent trees' likeliest first guess, fading

    @property
    def now(self) -> Account:
        """That of text like this."""
        return self._of_sure_text if self._first_p > SURE else self._of_unsure_text

    def observe(self, grown: Shape, tree: Tree, accepted: Collection[int], costs: ShapeCosts) -> bool:
        """As an account's."""
        paid = self.now.observe(grown, tree, accepted, costs)
        first_p = max((p for p, depth in zip(tree.path_p, tree.depths, strict=True) if depth == 1), default=0.0)
        self._first_p = FIRST_MEMORY * self._first_p + (1 - FIRST_MEMORY) * first_p
        return paid


def likeliest_chain(tree: Tree) -> list[int]:
    """Rows of the chain that a tree holds: the root, its likeliest child, that one's, and so on."""
    likeliest: dict[int, int] = {}
    for row, parent in enumerate(tree.parents):
        if parent not in likeliest or tree.path_p[row] > tree.path_p[likeliest[parent]]:
            likeliest[parent] = row
    chain = [0]
    while chain[-1] in likeliest:
        chain.append(likeliest[chain[-1]])
    return chain
