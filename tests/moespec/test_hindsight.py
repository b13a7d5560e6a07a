"""What trees that stop sooner would have brought, against each of them cut by hand; and costs that are corrected."""

from __future__ import annotations

import itertools
import random

import pytest

from moespec.config import TreeConfig
from moespec.governors.costs import StepTimes
from moespec.governors.hindsight import (
    LEAD,
    MEMORY,
    MOST_BELIEVED,
    PLAIN,
    PRIOR_ROWS,
    RATE_MEMORY,
    THRESHOLDS,
    USUAL,
    Account,
    Shape,
    ShapeCosts,
    Tree,
    added,
    likeliest_chain,
)

PLAIN_MS = 1.0
ASKED = TreeConfig(16, 4, 2, 0)
SEEN = THRESHOLDS.index(0.12)  # the place that trees of a test are grown to


def random_tree(rng: random.Random) -> tuple[Tree, list[int]]:
    """A tree as it is grown down to the least threshold, and its accepted rows."""
    path_p, depths, parents, accepted = [1.0], [0], [-1], [0]
    for row in range(1, rng.randint(1, 14)):
        parent = rng.randrange(row)
        path_p.append(path_p[parent] * rng.uniform(0.1, 1))
        depths.append(depths[parent] + 1)
        parents.append(parent)
        if parent == accepted[-1] and rng.random() < path_p[row] ** 0.3:
            accepted.append(row)
    kept = [0, *sorted(cut(Tree(path_p, depths, parents), THRESHOLDS[0]))]
    tree = Tree([path_p[row] for row in kept], [depths[row] for row in kept], [-1] * len(kept))
    for number, row in enumerate(kept[1:], start=1):
        tree.parents[number] = kept.index(parents[row])
    return tree, [number for number, row in enumerate(kept) if row in accepted]


def cut(tree: Tree, threshold: float) -> set[int]:
    """The drafted rows of the tree that stops at the threshold: likely, and below what was likely enough to look."""
    path_p, _, parents = tree
    rows: set[int] = set()
    for row in range(1, len(path_p)):
        up = parents[row]
        if path_p[row] >= threshold and (up == 0 or (up in rows and path_p[up] >= 2 * threshold)):
            rows.add(row)
    return rows


def num_expanded(tree: Tree, threshold: float) -> list[int]:
    """Nodes that something is looked for below, level by level: likely enough, not the deepest, and the widest."""
    likely = [depth for p, depth in zip(tree.path_p, tree.depths, strict=True) if p >= 2 * threshold]
    return [min(likely.count(depth), ASKED.top_k) for depth in range(1, ASKED.depth) if depth in likely]


def chain_of(tree: Tree) -> Tree:
    rows = likeliest_chain(tree)
    return Tree([tree.path_p[row] for row in rows], [*range(len(rows))], [*range(-1, len(rows) - 1)])


@pytest.mark.parametrize("row_ms", [0.01, 0.1, 0.3, 1.0, 5.0])
@pytest.mark.parametrize("price", [0.3, 1.0, 2.0])
def test_the_best_shape_is_the_best_of_all_cuts(row_ms, price):
    rng = random.Random(1)
    trees = [random_tree(rng) for _ in range(200)]

    def tree_ms(num_rows: int, num_levels: int, num_expanded: int) -> float:
        return PLAIN_MS + row_ms * (num_rows - 1) + 0.03 * num_levels + 0.02 * num_expanded

    account = Account()
    for tree, accepted in trees:
        account.observe(Shape(0, False), tree, accepted, ShapeCosts(tree_ms, PLAIN_MS, ASKED))

    def rows_of(tree: Tree, place: int, is_branch: bool) -> set[int]:
        rows = cut(tree, THRESHOLDS[place]) if place < PLAIN else set()
        return rows - set(likeliest_chain(tree)) if is_branch else rows & set(likeliest_chain(tree))

    def odds(p: float) -> float:
        return p / (1 - p)

    def rates_of(is_branch: bool) -> list[float]:
        """Of rows that each threshold adds, the latest counting most, and of what is expected of some more: the
        drafter's own odds, as wrong as those of likelier rows were."""
        found, believed = [], 1.0
        for place in range(PLAIN - 1, -1, -1):
            middle = odds((THRESHOLDS[place] + (THRESHOLDS[place + 1] if place + 1 < PLAIN else 1)) / 2)
            rows, kept = PRIOR_ROWS, PRIOR_ROWS * middle * believed / (1 + middle * believed)
            for age, (tree, accepted) in enumerate(reversed(trees)):
                new = rows_of(tree, place, is_branch) - rows_of(tree, place + 1, is_branch)
                rows, kept = rows + RATE_MEMORY**age * len(new), kept + RATE_MEMORY**age * len(new & set(accepted))
            believed = sorted([1 / MOST_BELIEVED, odds(kept / rows) / middle, MOST_BELIEVED])[1]
            found.append(kept / rows)
        return found[::-1]

    rates = [rates_of(False), rates_of(True)]

    def value(place: int, is_chain: bool) -> float:
        """Tokens per step less what the time is worth, of trees cut by hand."""
        total = weights = 0.0
        for age, (tree, _) in enumerate(reversed(trees)):
            whole = chain_of(tree) if is_chain else tree
            expanded = num_expanded(whole, THRESHOLDS[place])
            ms = tree_ms(1 + len(cut(whole, THRESHOLDS[place])), 1 + len(expanded), sum(expanded))
            tokens = sum(
                rates[branch][n] * (len(rows_of(tree, n, branch)) - len(rows_of(tree, n + 1, branch)))
                for n, branch in itertools.product(range(place, PLAIN), (False,) if is_chain else (False, True))
            )
            total, weights = total + MEMORY**age * (1 + tokens - price * ms), weights + MEMORY**age
        return total / weights

    below = [*range(PLAIN - 1, -1, -1)]
    straight = [*itertools.accumulate(account._chain.gains(price))]
    branching = [a + b for a, b in zip(straight, itertools.accumulate(account._branches.gains(price)), strict=True)]
    plain = 1 - price * PLAIN_MS
    assert straight == pytest.approx([value(place, True) - plain for place in below])
    assert branching == pytest.approx([value(place, False) - plain for place in below])
    values = {(place, is_chain): value(place, is_chain) for place in range(PLAIN) for is_chain in (False, True)}
    values[PLAIN, True] = 1 - price * PLAIN_MS
    best, most = account.best(price), max(values.values())
    if values[USUAL] > max(plain, most - LEAD):
        assert best == USUAL
    else:
        assert values[best.place, best.is_chain] == pytest.approx(most)


def test_before_enough_was_seen_nothing_is_concluded():
    account, costs = Account(), ShapeCosts(lambda *_: 9.0, PLAIN_MS, ASKED)
    for _ in range(8):
        account.observe(Shape(0, False), Tree([1.0], [0], [-1]), [0], costs)
    assert account.best(1.0) == USUAL
    for _ in range(16):
        account.observe(Shape(0, False), Tree([1.0], [0], [-1]), [0], costs)
    assert account.best(1.0).place == PLAIN


@pytest.mark.parametrize(("row_ms", "best"), [(0.92, USUAL), (0.7, Shape(SEEN, is_chain=True))])
def test_the_usual_shape_is_left_only_for_one_that_brings_more(row_ms, best):
    """A row at 0.13, behind one at 0.5, is nearly always accepted: worth its time, by some 0.03 tokens or by 0.25."""
    account, costs = Account(), ShapeCosts(lambda num_rows, *_: PLAIN_MS + row_ms * (num_rows - 1), PLAIN_MS, ASKED)
    for _ in range(200):
        account.observe(Shape(SEEN, False), Tree([1.0, 0.5, 0.13], [0, 1, 2], [-1, 0, 1]), [0, 1, 2], costs)
    assert account.best(1.0) == best


def test_trees_that_were_not_grown_are_not_judged():
    """A row at 0.05 that is always accepted and costs nothing is unknown to trees that stop at 0.25."""
    account, costs, place = Account(), ShapeCosts(lambda *_: 1.0, PLAIN_MS, ASKED), THRESHOLDS.index(0.25)
    for _ in range(50):
        account.observe(Shape(place, False), Tree([1.0, 0.5], [0, 1], [-1, 0]), [0, 1], costs)
    assert account.best(1.0).place >= place
    for _ in range(3):
        account.observe(Shape(0, False), Tree([1.0, 0.5, 0.05], [0, 1, 2], [-1, 0, 1]), [0, 1, 2], costs)
    assert THRESHOLDS[account.best(1.0).place] <= 0.05


def test_all_rows_count_at_their_trees_own_threshold():
    """Also those that another drafter would not have looked for: look-up finds them without looking."""
    tree = Tree([1.0] + 5 * [0.4], [*range(6)], [*range(-1, 5)])
    lowest = THRESHOLDS.index(0.25)
    found = added(lowest, tree, range(4), ShapeCosts(lambda rows, *_: 1.0 * rows, PLAIN_MS, ASKED))
    assert (sum(found.rows), sum(found.accepted), sum(found.ms)) == (5, 3, 5.0)
    assert found.rows[THRESHOLDS.index(0.4)] == 1 and found.rows[lowest] == 4


@pytest.mark.parametrize(("ms", "is_paid"), [(1.9, True), (2.1, False)])
def test_a_step_pays_where_some_part_of_it_was_quicker_than_plain(ms, is_paid):
    """Two tokens in so long; a longer part, which was not accepted, cost more."""
    costs = ShapeCosts(lambda rows, *_: ms if rows <= 2 else 9.0, PLAIN_MS, ASKED)
    tree = Tree([1.0, 0.9, 0.5], [0, 1, 2], [-1, 0, 1])
    assert Account().observe(Shape(0, True), tree, [0, 1], costs) == is_paid


@pytest.mark.parametrize("seed", range(20))
def test_the_chain_of_a_tree_follows_the_likeliest_child(seed):
    tree, _ = random_tree(random.Random(seed))
    chain = likeliest_chain(tree)
    for row, below in zip(chain, [*chain[1:], None], strict=True):
        children = [child for child, parent in enumerate(tree.parents) if parent == row]
        assert below == (max(children, key=lambda child: tree.path_p[child]) if children else None)


def test_a_chain_is_grown_where_its_siblings_bring_nothing_and_a_tree_where_they_do():
    tree = Tree([1.0, 0.5, 0.4, 0.4, 0.3], [0, 1, 1, 2, 2], [-1, 0, 0, 1, 1])
    costs = ShapeCosts(lambda rows, *_: 0.7 + 0.3 * rows, PLAIN_MS, ASKED)
    straight, branching = Account(), Account()
    for _ in range(40):
        straight.observe(Shape(0, False), tree, [0, 1, 3], costs)
        branching.observe(Shape(0, False), tree, [0, 2], costs)
    assert straight.best(1.0).is_chain and THRESHOLDS[straight.best(1.0).place] <= 0.4
    assert not branching.best(1.0).is_chain and branching.best(1.0).place < PLAIN


def test_step_times_find_a_slow_machine_and_sizes_that_the_table_has_wrong():
    rng, times = random.Random(0), StepTimes()
    truth = {1: 1.0, 2: 1.0, 4: 1.3, 8: 1.6}
    for _ in range(1500):
        rows = rng.choice([*truth])
        disturbed = 20 if rng.random() < 0.02 else 1
        times.observe(rows, 2.0 * truth[rows] * rng.uniform(0.95, 1.05) * disturbed, table_ms=1.0)
    for rows, ratio in truth.items():
        assert times.slowness * times.ratio(rows) == pytest.approx(2.0 * ratio, rel=0.12)
    assert times.ratio(16) > 1.2 * times.ratio(1)  # of a size never seen, the nearest tells more than the table
