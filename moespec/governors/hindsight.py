"""What trees that stop sooner or later would have brought, step by step, by the trees that were verified.

Of a verified tree every smaller one that the same drafter would have grown is known (but for rows that had no place in
a tree of the size asked for), and what a table says that it costs. What its rows would have brought is how often rows
about as likely were accepted: single steps tell little of what a tree brings, but every row tells something of that, of
rows a little less likely, too. To know of lower thresholds, a tree must be grown further now and then.

Every tree holds a chain, too, which takes less time to draft: what that would have brought is known as well.

Owns the thresholds and their running account. Knows nothing of tables, budgets or machines.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import NamedTuple

from moespec.config import TreeConfig
from moespec.tree import SEARCHED

# Of the least likely path that is kept, likelier and likelier; behind the last one there is plain decoding.
THRESHOLDS = (0.02, 0.03, 0.04, 0.06, 0.08, 0.1, 0.12, 0.16, 0.2, 0.25, 0.3, 0.4, 0.5, 0.65, 0.8)
PLAIN = len(THRESHOLDS)
# Of a row's odds by the drafter, in the middle between a threshold and the next.
_MIDDLES = [(low + high) / 2 for low, high in itertools.pairwise((*THRESHOLDS, 1.0))]
ODDS = [p / (1 - p) for p in _MIDDLES]
MEMORY, RATE_MEMORY = 0.99, 0.98  # shares kept at each step: of what trees were like, of how often rows were accepted
PRIOR_ROWS = 8.0  # that what is expected of rows by likelier ones counts for
MOST_BELIEVED = 10.0  # times the drafter's odds, or as many times less
LEAST_SEEN = 1.9  # steps that must show a threshold
FEW_SEEN, FEW_TRIED = 4.0, 16.0  # steps, and rows, that count where the past counts for little
FIRST_SEEN = 16  # steps before anything is concluded

# Of so many rows when so many levels were drafted, for which so many nodes below the root were expanded. Of the root
# alone: one level, its search for children.
CostMs = Callable[[int, int, int], float]


class Tree(NamedTuple):
    """Rows, the root first: probability of the path by the drafter, depth, parent's row."""

    path_p: Sequence[float]
    depths: Sequence[int]
    parents: Sequence[int]


class ShapeCosts(NamedTuple):
    """Of trees within the one that is asked for, and of a plain step."""

    tree_ms: CostMs
    plain_ms: float
    asked: TreeConfig


class Shape(NamedTuple):
    """What to grow: down to a place in THRESHOLDS, as wide as asked for or a chain; nothing at `PLAIN`."""

    place: int
    is_chain: bool


class Added(NamedTuple):
    """Per place in THRESHOLDS: what the tree that stops there has more than the one that stops at the next, in rows,
    accepted rows and ms. `paid`: whether one of those trees was quicker than plain decoding at this step."""

    rows: list[float]
    accepted: list[float]
    ms: list[float]
    paid: bool


def added(lowest: int, tree: Tree, accepted: Collection[int], costs: ShapeCosts) -> Added:
    """Of a tree that was grown down to THRESHOLDS[lowest], of which all lower ones are unknown; `accepted` are rows."""
    path_p, depths, parents = tree
    below = range(1, len(path_p))
    # A row is there if it is likely enough, and if its parent is so likely that it was looked for. All of this tree's
    # are there at its own threshold: look-up drafters find children without looking.
    reach_p = [min(p, path_p[up] / SEARCHED) if up else p for p, up in zip(path_p, parents, strict=True)]
    found = sorted((max(reach_p[row], THRESHOLDS[lowest]), row in accepted) for row in below)
    looked_below = sorted((path_p[row] / SEARCHED, depths[row]) for row in below if depths[row] < costs.asked.depth)
    num_expanded = [0] * costs.asked.depth  # by depth
    rows, kept, ms = ([0.0] * PLAIN for _ in range(3))
    num_rows, num_tokens, before_ms, paid = 1, 1, costs.plain_ms, False
    for place in range(PLAIN - 1, lowest - 1, -1):
        threshold, is_same = THRESHOLDS[place], place < PLAIN - 1
        while found and found[-1][0] >= threshold:
            is_same, is_accepted = False, found.pop()[1]
            rows[place], kept[place] = rows[place] + 1, kept[place] + is_accepted
            num_rows, num_tokens = num_rows + 1, num_tokens + is_accepted
        while looked_below and looked_below[-1][0] >= threshold:
            is_same, depth = False, looked_below.pop()[1]
            num_expanded[depth] = min(num_expanded[depth] + 1, costs.asked.top_k)
        if is_same:
            continue
        now_ms = costs.tree_ms(num_rows, 1 + sum(map(bool, num_expanded)), sum(num_expanded))
        ms[place], before_ms = now_ms - before_ms, now_ms
        paid = paid or num_tokens * costs.plain_ms > now_ms
    return Added(rows, kept, ms, paid)


class Means:
    """What is added at each place, means over the steps that show it; and how often such rows are accepted."""

    def __init__(self) -> None:
        self.num_steps, self._rows, self._ms = ([0.0] * PLAIN for _ in range(3))
        self._tried, self._accepted = [0.0] * PLAIN, [0.0] * PLAIN

    def observe(self, lowest: int, seen: Added) -> None:
        for place in range(lowest, PLAIN):
            num_rows = seen.rows[place]
            self.num_steps[place] = MEMORY * self.num_steps[place] + 1
            self._rows[place] = MEMORY * self._rows[place] + num_rows
            self._ms[place] = MEMORY * self._ms[place] + seen.ms[place]
            self._tried[place] = RATE_MEMORY * self._tried[place] + num_rows
            self._accepted[place] = RATE_MEMORY * self._accepted[place] + seen.accepted[place]

    def shorten(self) -> None:
        """Let what was seen count for no more than a few steps, and a few rows."""
        for place in range(PLAIN):
            steps_share = FEW_SEEN / max(FEW_SEEN, self.num_steps[place])
            rows_share = FEW_TRIED / max(FEW_TRIED, self._tried[place])
            for share, sums in (
                (steps_share, (self.num_steps, self._rows, self._ms)),
                (rows_share, (self._tried, self._accepted)),
            ):
                for each in sums:
                    each[place] *= share

    def gains(self, price: float) -> Iterator[float]:
        """Place by place from the likeliest: what stopping there instead of at the next brings, where a ms is worth
        `price` tokens. It ends where too few steps show more."""
        believed = 1.0  # times the drafter's odds, as rows a little likelier are
        for place in reversed(range(PLAIN)):
            if self.num_steps[place] < LEAST_SEEN:
                return
            odds = ODDS[place] * believed
            rate = (self._accepted[place] + PRIOR_ROWS * odds / (1 + odds)) / (self._tried[place] + PRIOR_ROWS)
            believed = min(max(rate / (1 - rate) / ODDS[place], 1 / MOST_BELIEVED), MOST_BELIEVED)
            yield (self._rows[place] * rate - price * self._ms[place]) / self.num_steps[place]


# Where answers begin. Several shapes are about as good, and which of them recent steps favour is often luck: this one
# is left only for one that seems better by so many tokens per step. It has branches: such steps show what a chain would
# have brought, too; a chain's do not show what branches would.
USUAL, LEAD = Shape(THRESHOLDS.index(0.16), is_chain=False), 0.1


class Account:
    """What was seen of chains, which every tree shows, and of what branches add to them."""

    def __init__(self) -> None:
        self._chain, self._branches = Means(), Means()
        self._num_seen = 0

    def observe(self, grown: Shape, tree: Tree, accepted: Collection[int], costs: ShapeCosts) -> bool:
        """A step of so grown a tree; `accepted` are rows. Whether some part of it was quicker than plain decoding."""
        self._num_seen += 1
        chain = range(len(tree.path_p)) if grown.is_chain else likeliest_chain(tree)
        part = Tree([tree.path_p[row] for row in chain], range(len(chain)), range(-1, len(chain) - 1))
        kept = [number for number, row in enumerate(chain) if row in accepted]
        straight = added(grown.place, part, kept, costs)
        self._chain.observe(grown.place, straight)
        if grown.is_chain:
            return straight.paid
        whole = added(grown.place, tree, accepted, costs)
        self._branches.observe(grown.place, _difference(whole, straight))
        return straight.paid or whole.paid

    def shorten(self) -> None:
        """Let what was seen count for less: text may have changed."""
        self._chain.shorten()
        self._branches.shorten()

    def best(self, price: float) -> Shape:
        """What brings the most, where a ms is worth `price` tokens, or `USUAL` if that brings hardly less; `PLAIN` if
        nothing brings anything."""
        if self._num_seen < FIRST_SEEN:
            return USUAL
        best, most, straight, branching, usual = Shape(PLAIN, is_chain=True), 0.0, 0.0, 0.0, 0.0
        unknown = itertools.repeat(-float("inf"))  # of branches fewer steps tell
        gains = zip(self._chain.gains(price), itertools.chain(self._branches.gains(price), unknown), strict=False)
        for place, (of_chain, of_branches) in zip(reversed(range(PLAIN)), gains, strict=False):
            straight, branching = straight + of_chain, branching + of_branches
            if place == USUAL.place:
                usual = straight + branching
            if straight > most:
                best, most = Shape(place, is_chain=True), straight
            if straight + branching > most:
                best, most = Shape(place, is_chain=False), straight + branching
        return USUAL if usual > max(0.0, most - LEAD) else best


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


def _difference(whole: Added, part: Added) -> Added:
    """What the whole tree adds more."""
    rows, accepted = _minus(whole.rows, part.rows), _minus(whole.accepted, part.accepted)
    return Added(rows, accepted, _minus(whole.ms, part.ms), whole.paid)


def _minus(ours: list[float], theirs: list[float]) -> list[float]:
    return [one - other for one, other in zip(ours, theirs, strict=True)]
