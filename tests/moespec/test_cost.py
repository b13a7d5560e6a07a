"""The cost formulae against the worked tables of the reference, typed in as printed, and against simulated routing."""

from __future__ import annotations

import random
import statistics
import subprocess
import sys
from decimal import Decimal
from itertools import combinations, pairwise
from pathlib import Path

import pytest

from moespec.cost import (
    WORKED_SHAPES,
    break_even_tokens,
    budget_ladder,
    equivalent_rows,
    expected_union,
    floor_s,
    layer_bytes,
    likeliest_tree,
    step_bytes,
    step_flops,
    union_between,
)

ROOT = Path(__file__).resolve().parents[2]
H200_COPY, H200_SHEET, H100_SHEET = 4.3e12, 4.8e12, 3.35e12  # bytes/s


def assert_prints_as(value: float, printed: str) -> None:
    """Half a unit of the last printed digit, and a tenth of that: the tables round some figures twice
    (4.248 to 4.25 to 4.3).
    """
    unit = 10.0 ** Decimal(printed).as_tuple().exponent
    assert abs(value - float(printed)) <= 0.55 * unit, f"{value} is not {printed}"


# dense GB, AR GB, all experts of a layer in MB, one expert in MB, ms on the H200; tokens/s: H200, its datasheet, H100
PLAIN = {
    "OLMoE-1B-7B": "0.75 2.36 805 12.58 0.55 1824 2036 1421",
    "Qwen3-30B-A3B": "2.46 6.08 1208 9.44 1.41 707 789 551",
    "Mixtral-8x7B": "2.95 25.5 2819 352 5.93 169 188 131",
    "gpt-oss-20b": "2.44 3.71 423 13.2 0.86 1160 1295 904",
}


@pytest.mark.parametrize("name", PLAIN)
def test_plain_decoding_has_the_printed_floor(name):
    shape = WORKED_SHAPES[name]
    num_bytes = step_bytes(shape, shape.top_k)
    values = [
        shape.dense_bytes / 1e9,
        num_bytes / 1e9,
        layer_bytes(shape, shape.num_experts) / 1e6,
        shape.expert_bytes / 1e6,
        1e3 * floor_s(num_bytes, H200_COPY),
        *(1 / floor_s(num_bytes, bandwidth) for bandwidth in (H200_COPY, H200_SHEET, H100_SHEET)),
    ]
    for value, printed in zip(values, PLAIN[name].split(), strict=True):
        assert_prints_as(value, printed)


# union, ms, break-even at T = 4, 8, 16, 32, 64
UNBUDGETED = {
    "OLMoE-1B-7B": "26.5 1.41 2.6 | 42 2.14 3.9 | 56.4 2.82 5.1 | 63.1 3.13 5.7 | 64 3.17 5.8",
    "Qwen3-30B-A3B": "29.1 3.64 2.6 | 52 6.0 4.3 | 82.4 9.25 6.5 | 111.8 12.4 8.7 | 126 13.8 9.8",
    "Mixtral-8x7B": "5.5 15.0 2.5 | 7.2 19.6 3.3 | 7.9 21.5 3.6 | 8 21.7 3.7 | 8 21.7 3.7",
    "gpt-oss-20b": "13.2 1.54 1.8 | 21 2.12 2.5 | 28.2 2.65 3.1 | 31.6 2.89 3.4 | 32 2.93 3.4",
}


@pytest.mark.parametrize("name", UNBUDGETED)
def test_a_tree_without_a_budget_has_the_printed_floor(name):
    shape = WORKED_SHAPES[name]
    for num_rows, cell in zip((4, 8, 16, 32, 64), UNBUDGETED[name].split("|"), strict=True):
        union = expected_union(shape.num_experts, shape.top_k, num_rows)
        for value, printed in zip((union, *_ms_and_break_even(shape, union)), cell.split(), strict=True):
            assert_prints_as(value, printed)


# budget, ms, break-even
BUDGETED = {
    "OLMoE-1B-7B": "16 0.92 1.7 | 32 1.67 3.1 | 48 2.42 4.4",
    "Qwen3-30B-A3B": "16 2.26 1.6 | 32 3.94 2.8 | 64 7.31 5.2 | 96 10.7 7.6",
    "Mixtral-8x7B": "4 11.2 1.9 | 6 16.4 2.8",
    "gpt-oss-20b": "8 1.16 1.3 | 16 1.75 2.0 | 24 2.34 2.7",
}


@pytest.mark.parametrize("name", BUDGETED)
def test_a_tree_with_a_budget_has_the_printed_floor(name):
    for cell in BUDGETED[name].split("|"):
        budget, *printed = cell.split()
        for value, text in zip(_ms_and_break_even(WORKED_SHAPES[name], int(budget)), printed, strict=True):
            assert_prints_as(value, text)


def _ms_and_break_even(shape, num_experts_read):
    step_s = floor_s(step_bytes(shape, num_experts_read), H200_COPY)
    return 1e3 * step_s, break_even_tokens(step_s, floor_s(step_bytes(shape, shape.top_k), H200_COPY))


def _simulated_unions(weights_E, top_k, num_rows, num_trials=3000):
    """Experts used by rows that each draw top_k different ones, an expert's chance growing with its weight."""
    rng = random.Random(0)
    # The largest of u^(1/w) is a weighted draw without replacement (Efraimidis and Spirakis).
    return [
        len(
            {
                expert
                for _ in range(num_rows)
                for _, expert in sorted((rng.random() ** (1 / w), e) for e, w in enumerate(weights_E))[-top_k:]
            }
        )
        for _ in range(num_trials)
    ]


@pytest.mark.parametrize(
    ("num_experts", "top_k", "num_rows"),
    [
        (16, 4, 4),  # about two thirds of all: drawing with replacement would give 10.3, not 10.9
        (13, 1, 9),  # a prime number of experts, one each
        (8, 7, 2),  # nearly all in the first row
    ],
)
def test_the_union_is_that_of_uniform_independent_rows(num_experts, top_k, num_rows):
    unions = _simulated_unions([1.0] * num_experts, top_k, num_rows)
    standard_error = statistics.stdev(unions) / len(unions) ** 0.5
    union = expected_union(num_experts, top_k, num_rows)
    assert abs(statistics.fmean(unions) - union) < 4 * standard_error < 0.1  # 4: wrong once in 16,000 seeds


def test_preferred_experts_make_the_union_smaller():
    weights_E = [1.0] * 12 + [6.0] * 4
    assert statistics.fmean(_simulated_unions(weights_E, 4, 4)) < expected_union(16, 4, 4) - 0.5


def test_the_union_grows_from_one_rows_experts_towards_all():
    for num_experts, top_k in ((64, 8), (8, 2), (5, 5)):
        unions = [expected_union(num_experts, top_k, num_rows) for num_rows in range(40)]
        assert unions[0] == 0 and unions[1] == pytest.approx(top_k)
        assert unions == sorted(unions) and unions[-1] <= num_experts
        assert all(union <= min(num_experts, rows * top_k) + 1e-9 for rows, union in enumerate(unions))
        by_top_k = [expected_union(num_experts, k, 3) for k in range(1, num_experts + 1)]
        assert by_top_k == sorted(by_top_k) and by_top_k[-1] == num_experts


def test_equivalent_rows_invert_the_union():
    for num_rows in (1, 2, 7.5, 30):
        assert equivalent_rows(64, 8, expected_union(64, 8, num_rows)) == pytest.approx(num_rows)
    assert equivalent_rows(8, 2, 8 * (1 - 0.75**3)) == pytest.approx(3)


def test_a_union_between_measured_ones():
    """The reference's trees of OLMoE are worth 7.0 independent rows of 31, and 13.9 of 127."""
    olmoe = {31: 39.0, 127: 54.0}
    for num_rows, union in {1: 8.0, **olmoe}.items():
        assert union_between(64, 8, olmoe, num_rows) == pytest.approx(union)
    # Half-way in logarithms between 31 and 127 rows: the geometric mean of the rows and of what they are worth.
    assert union_between(64, 8, olmoe, (31 * 127) ** 0.5) == pytest.approx(
        64 * (1 - 0.875 ** (7.04 * 13.90) ** 0.5), rel=1e-3
    )
    # Beyond the last: 4 times its rows are worth 4 ** (log 13.9 / log 127) = 2.14 times as much.
    assert union_between(64, 8, olmoe, 508) == pytest.approx(64 * (1 - 0.875 ** (13.9 * 2.136)), rel=1e-3)
    curve = [union_between(64, 8, olmoe, num_rows) for num_rows in range(1, 600)]
    assert curve == sorted(curve) and curve[-1] < 64
    assert union_between(4, 4, {8: 4.0}, 3) == 4


def test_the_independent_curve_is_found_again_from_two_of_its_points():
    measured = {rows: expected_union(128, 8, rows) for rows in (4, 40)}
    for num_rows in (2, 4, 11, 40, 100):
        assert union_between(128, 8, measured, num_rows) == pytest.approx(expected_union(128, 8, num_rows))


def test_arithmetic_is_two_for_every_weight_that_a_row_meets():
    shape = WORKED_SHAPES["Qwen3-30B-A3B"]
    active = 48 * (2 * 2048 * 4096 + 2 * 2048 * 512 + 128 * 2048 + 8 * 3 * 2048 * 768) + 151_936 * 2048
    assert step_flops(shape, 3) == 6 * active
    assert active == pytest.approx(3.0e9, rel=0.02)  # the A3B of its name, embeddings left out


def test_budgets_go_up_from_the_top_k_to_below_all_experts():
    assert budget_ladder(8, 64) == [8, 12, 16, 24, 32, 48]
    assert budget_ladder(2, 8) == [2, 3, 4, 6]
    assert budget_ladder(1, 4) == [1, 2, 3]
    assert budget_ladder(4, 4) == []


RATES = [[0.6, 0.2, 0.05], [0.5, 0.3], [0.4]]  # by depth and rank


def all_nodes(rates):
    """Every path of ranks from the root, and its probability."""
    paths = {(): 1.0}
    for depth, ranks in enumerate(rates):
        above = [path for path in paths if len(path) == depth]
        paths |= {(*path, rank): paths[path] * p for path in above for rank, p in enumerate(ranks)}
    del paths[()]
    return paths


@pytest.mark.parametrize("num_rows", [1, 2, 3, 4, 5, 6, 7])
def test_no_tree_of_so_many_rows_has_more_accepted(num_rows):
    nodes = all_nodes(RATES)
    trees = [
        chosen
        for chosen in combinations(nodes, num_rows - 1)
        if all(len(path) == 1 or path[:-1] in chosen for path in chosen)
    ]
    best = max(trees, key=lambda chosen: sum(nodes[path] for path in chosen))
    found = likeliest_tree(RATES, num_rows)
    assert found.num_rows == num_rows
    assert found.num_accepted == pytest.approx(sum(nodes[path] for path in best))
    assert found.depth == max((len(path) for path in best), default=0)
    assert found.top_k == max((1 + path[-1] for path in best), default=0)


def test_expected_accepted_tokens_are_those_of_simulated_walks():
    rng, nodes = random.Random(0), all_nodes(RATES)
    num_rows = 9
    tree = sorted(nodes, key=lambda path: -nodes[path])[: num_rows - 1]
    lengths = []
    for _ in range(40_000):
        path = ()
        while len(path) < len(RATES):
            ranks = RATES[len(path)]
            (rank,) = rng.choices(range(len(ranks) + 1), [*ranks, 1 - sum(ranks)])  # the last: none of them
            if (*path, rank) not in tree:
                break
            path = (*path, rank)
        lengths.append(len(path))
    error = statistics.stdev(lengths) / len(lengths) ** 0.5
    assert abs(statistics.fmean(lengths) - likeliest_tree(RATES, num_rows).num_accepted) < 4 * error < 0.05


def test_a_chain_and_the_end_of_what_is_known():
    chain = likeliest_tree([[0.8]] * 8, 64)
    assert (chain.num_rows, chain.depth, chain.top_k) == (9, 8, 1)
    assert chain.num_accepted == pytest.approx(sum(0.8**depth for depth in range(1, 9)))
    assert likeliest_tree([[0.0, 0.0]], 8).num_rows == 1


def test_bytes_are_affine_in_the_experts_and_the_kv_is_on_top():
    shape = WORKED_SHAPES["OLMoE-1B-7B"]
    steps = [step_bytes(shape, n) for n in range(shape.num_experts + 1)]
    slopes = {after - before for before, after in pairwise(steps)}
    assert steps[0] == shape.dense_bytes and slopes == {16 * 3 * 2048 * 1024 * 2}
    assert step_bytes(shape, 8, kv_bytes=1000) == steps[8] + 1000


def test_drafting_raises_the_break_even():
    assert break_even_tokens(3.0, 2.0) == 1.5
    assert break_even_tokens(3.0, 2.0, draft_s=1.0) == 2.0


@pytest.mark.parametrize(
    ("call", "offending"),
    [
        (lambda: expected_union(8, 9, 4), "top_k=9"),
        (lambda: expected_union(8, 2, -1), "num_rows=-1"),
        (lambda: layer_bytes(WORKED_SHAPES["Mixtral-8x7B"], 9), "num_experts_read=9"),
        (lambda: step_bytes(WORKED_SHAPES["Mixtral-8x7B"], 2, -1), "kv_bytes=-1"),
        (lambda: floor_s(1.0, 0.0), "bytes_per_s=0.0"),
        (lambda: break_even_tokens(1.0, 0.0), "plain_step_s=0.0"),
        (lambda: break_even_tokens(1.0, 1.0, -0.5), "draft_s=-0.5"),
        (lambda: equivalent_rows(8, 2, 8), "union=8"),
        (lambda: equivalent_rows(8, 2, 1.5), "union=1.5"),
        (lambda: likeliest_tree([[0.9, 0.2]], 4), "depth 0"),
        (lambda: likeliest_tree([[0.9], [0.1, 0.2]], 4), "depth 1"),
        (lambda: likeliest_tree([[-0.1]], 4), "acceptance="),
        (lambda: likeliest_tree([[0.9]], 0), "num_rows=0"),
    ],
)
def test_a_wrong_value_is_named(call, offending):
    with pytest.raises(ValueError, match=offending):
        call()


def test_the_formulae_need_no_torch():
    code = "import sys, moespec.cost; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
