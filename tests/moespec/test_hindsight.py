"""What trees that stop sooner would have brought, against each of them cut by hand; and costs that are corrected."""

from __future__ import annotations

import random

import pytest

from moespec.governors.costs import StepTimes
from moespec.governors.hindsight import (
    MEMORY,
    PLAIN,
    START,
    THRESHOLDS,
    Account,
    Hindsight,
    Shape,
    ShapeCosts,
    Tree,
    likeliest_chain,
)

PLAIN_MS = 1.0


def random_tree(rng: random.Random) -> tuple[Tree, list[int]]:
    """A tree and its accepted rows."""
    path_p, depths, parents, accepted = [1.0], [0], [-1], [0]
    for row in range(1, rng.randint(1, 14)):
        parent = rng.randrange(row)
        path_p.append(path_p[parent] * rng.uniform(0.1, 1))
        depths.append(depths[parent] + 1)
        parents.append(parent)
        if parent == accepted[-1] and rng.random() < path_p[row] ** 0.3:
            accepted.append(row)
    return Tree(path_p, depths, parents), accepted


@pytest.mark.parametrize("row_ms", [0.01, 0.1, 0.3, 1.0, 5.0])
@pytest.mark.parametrize("price", [0.3, 1.0, 2.0])
def test_the_best_threshold_is_the_best_of_all_cuts(row_ms, price):
    rng = random.Random(1)
    trees = [random_tree(rng) for _ in range(200)]
    hindsight = Hindsight()

    def cost_ms(num_rows: int, depth: int) -> float:
        return PLAIN_MS + row_ms * (num_rows - 1) + 0.05 * (depth + 1)

    for tree, accepted in trees:
        hindsight.observe(0, tree, accepted, cost_ms, PLAIN_MS)

    def value(threshold: float) -> float:
        """Of trees cut by hand, the latest counting most."""
        total = 0.0
        for age, ((path_p, depths, _), accepted) in enumerate(reversed(trees)):
            rows = [row for row in range(1, len(path_p)) if path_p[row] >= threshold]
            ms = PLAIN_MS + row_ms * len(rows) + 0.05 * (max((depths[row] for row in rows), default=0) + 1)
            total += MEMORY**age * (1 + len(set(rows) & set(accepted)) - price * ms)
        return total

    values = [value(threshold) for threshold in THRESHOLDS]
    values.append(sum(MEMORY**age * (1 - price * PLAIN_MS) for age in range(len(trees))))  # plain decoding
    assert values[hindsight.best(price).place] == pytest.approx(max(values))


def test_before_enough_was_seen_nothing_is_concluded():
    hindsight = Hindsight()
    for _ in range(8):
        hindsight.observe(0, Tree([1.0], [0], [-1]), [0], lambda num_rows, depth: 9.0, PLAIN_MS)
    assert hindsight.best(1.0).place == START
    for _ in range(16):
        hindsight.observe(0, Tree([1.0], [0], [-1]), [0], lambda num_rows, depth: 9.0, PLAIN_MS)
    assert hindsight.best(1.0).place == PLAIN


def test_trees_that_were_not_grown_are_not_judged():
    """A row at 0.05 that is always accepted and costs nothing is unknown to trees that stop at 0.12."""
    hindsight = Hindsight()
    for _ in range(50):
        hindsight.observe(START, Tree([1.0, 0.5], [0, 1], [-1, 0]), [0, 1], lambda num_rows, depth: 1.0, PLAIN_MS)
    assert hindsight.best(1.0).place >= START
    for _ in range(3):
        hindsight.observe(
            0, Tree([1.0, 0.5, 0.05], [0, 1, 2], [-1, 0, 1]), [0, 1, 2], lambda num_rows, depth: 1.0, PLAIN_MS
        )
    assert THRESHOLDS[hindsight.best(1.0).place] <= 0.05


@pytest.mark.parametrize("seed", range(20))
def test_the_chain_of_a_tree_follows_the_likeliest_child(seed):
    tree, _ = random_tree(random.Random(seed))
    chain = likeliest_chain(tree)
    for row, below in zip(chain, [*chain[1:], None], strict=True):
        children = [child for child, parent in enumerate(tree.parents) if parent == row]
        assert below == (max(children, key=lambda child: tree.path_p[child]) if children else None)


def test_a_chain_is_grown_where_its_siblings_bring_nothing_and_a_tree_where_they_do():
    tree = Tree([1.0, 0.5, 0.4, 0.4, 0.3], [0, 1, 1, 2, 2], [-1, 0, 0, 1, 1])
    costs = ShapeCosts(lambda rows, depth: 1 + 0.1 * rows, lambda rows, depth: 1 + 0.1 * rows, PLAIN_MS)
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
