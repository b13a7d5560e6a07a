"""The benchmark's clock: whom it calls and when, what it makes of the times; the card and the ceilings on it."""

from __future__ import annotations

import json
import math
import time
from types import SimpleNamespace

import pytest
import torch

from moespec.bench import machine
from moespec.bench.machine import NUM_WARMUP_ROUNDS, Timing, machine_card, measure_ceilings, time_in_rotation

CPU = torch.device("cpu")
BUFFER_BYTES = 4 << 20


class FakeClock:
    """A clock that only moves when it is told to."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def advance(self, seconds: float) -> None:
        self.now_s += seconds


@pytest.fixture
def clock(monkeypatch):
    fake = FakeClock()
    monkeypatch.setattr(machine, "time", SimpleNamespace(perf_counter=lambda: fake.now_s))
    return fake


def test_calls_rotate_and_contestants_take_turns():
    seen: list[str] = []
    contestants = {
        name: [lambda name=name, n=n: seen.append(f"{name}{n}") for n in range(num_calls)]
        for name, num_calls in (("a", 3), ("b", 2), ("c", 1))
    }
    timings = time_in_rotation(contestants, CPU, num_rounds=2)
    lists = {"a": ["a0", "a1", "a2"], "b": ["b0", "b1"], "c": ["c0"]}
    turns = ["abc", "bca", "cab", "abc"]
    assert list(timings) == ["a", "b", "c"] and len(turns) == NUM_WARMUP_ROUNDS + 2
    assert seen == [call for turn in turns for name in turn for call in lists[name]]


def test_a_sample_is_a_list_divided_by_its_length(clock):
    contestants = {
        "four": [lambda: clock.advance(3e-6), lambda: clock.advance(1e-6)] * 2,
        "one": [lambda: clock.advance(5e-6)],
    }
    timings = time_in_rotation(contestants, CPU, num_rounds=5)
    assert timings["four"].median_us == pytest.approx(2) and timings["one"].median_us == pytest.approx(5)


def test_the_first_rounds_are_thrown_away(clock):
    waits_us = iter([1000.0] * NUM_WARMUP_ROUNDS + [1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    timing = time_in_rotation({"a": [lambda: clock.advance(1e-6 * next(waits_us))]}, CPU, num_rounds=6)["a"]
    assert (timing.median_us, timing.p20_us, timing.p80_us) == pytest.approx((3.5, 2.0, 5.0))


def test_percentiles_do_not_depend_on_the_order():
    assert Timing.of([9.0, 1.0, 5.0, 3.0, 7.0, 2.0]) == Timing(4.0, 2.0, 7.0)
    assert Timing.of([4.0]) == Timing(4.0, 4.0, 4.0)


def test_a_sleep_takes_its_time():
    contestants = {"short": [lambda: time.sleep(1e-3)] * 2, "long": [lambda: time.sleep(5e-3)]}
    timings = time_in_rotation(contestants, CPU, num_rounds=5)
    assert timings["short"].p20_us >= 1000 and timings["long"].p20_us >= 5000
    assert timings["short"].median_us < timings["long"].median_us


def test_what_cannot_be_timed_is_named():
    with pytest.raises(ValueError, match="contestant 'empty' has no calls"):
        time_in_rotation({"full": [int], "empty": []}, CPU)
    with pytest.raises(ValueError, match="num_rounds=0"):
        time_in_rotation({"full": [int]}, CPU, num_rounds=0)
    with pytest.raises(ValueError, match="buffer_bytes=100 "):
        measure_ceilings(CPU, buffer_bytes=100)


def test_ceilings_count_what_is_read_and_what_is_written(monkeypatch):
    timings = {"sum": 4.0, "sums of rows": 2.0, "matrix-vector product": 3.0, "copy": 5.0}
    monkeypatch.setattr(
        machine,
        "time_in_rotation",
        lambda contestants, device: {name: Timing(timings[name], 0.0, 0.0) for name in contestants},
    )
    ceilings = measure_ceilings(CPU, BUFFER_BYTES + 5)
    assert ceilings.buffer_bytes == BUFFER_BYTES and ceilings.read_way == "sums of rows"
    assert ceilings.read_bytes_per_s == pytest.approx(BUFFER_BYTES / 2e-6)
    assert ceilings.copy_bytes_per_s == pytest.approx(2 * BUFFER_BYTES / 5e-6)


def test_the_card_says_what_it_was_measured_on():
    card = machine_card(CPU, BUFFER_BYTES)
    assert json.loads(json.dumps(card)) == card
    assert card["name"] and card["torch"] == torch.__version__ and card["threads"] == torch.get_num_threads()
    assert card["driver"] is None and card["ceilings"]["launch_gap_us"] is None
    for name in ("read_bytes_per_s", "copy_bytes_per_s"):
        # From a memory card's speed to a thousand times a core's cache.
        assert math.isfinite(card["ceilings"][name]) and 1e7 < card["ceilings"][name] < 1e15
