"""How many threads steps are made with: a clock of its own plays machines of which one number is the quicker."""

from __future__ import annotations

import itertools
import threading

import pytest
import torch

from app import threads
from app.threads import Threads, in_own_thread


class Machine:
    """Two cores with a clock. cost(number): seconds of a step with so many threads."""

    def __init__(self) -> None:
        self.now, self.number = 0.0, 2
        self.num_steps_with = {1: 0, 2: 0}
        self.cost = lambda number: 0.003

    def step(self) -> bool:
        self.now += self.cost(self.number)
        self.num_steps_with[self.number] += 1
        return True


@pytest.fixture
def machine(monkeypatch):
    played = Machine()
    monkeypatch.setattr(threads, "most_threads", lambda: 2)
    monkeypatch.setattr(threads.time, "perf_counter", lambda: played.now)
    monkeypatch.setattr(torch, "get_num_threads", lambda: played.number)
    monkeypatch.setattr(torch, "set_num_threads", lambda number: setattr(played, "number", number))
    return played


def run(chosen: Threads, machine, num_steps: int) -> dict[int, int]:
    """Steps made with each number."""
    before = dict(machine.num_steps_with)
    for _ in range(num_steps):
        assert chosen.timed(machine.step)
    return {number: machine.num_steps_with[number] - before[number] for number in before}


def test_the_quicker_number_makes_nearly_all_steps(machine):
    for quicker, slower in ((2, 1), (1, 2)):
        machine.cost = lambda number, slower=slower: 0.02 if number == slower else 0.005
        chosen = Threads()
        assert run(chosen, machine, 4000)[slower] < 20
        assert chosen.num == quicker


def test_a_browser_that_comes_and_goes_is_noticed_within_a_few_steps(machine):
    costs = {"alone": {1: 0.0045, 2: 0.003}, "beside a browser": {1: 0.006, 2: 0.015}}
    chosen = Threads()
    for where, quicker in (("alone", 2), ("beside a browser", 1), ("alone", 2), ("beside a browser", 1)):
        machine.cost = costs[where].__getitem__
        run(chosen, machine, 100)
        assert chosen.num == quicker
        assert run(chosen, machine, 1500)[3 - quicker] < 60


def test_comparisons_in_vain_make_nobody_deaf(machine):
    """Steps that vary by a third are compared more and more rarely; a browser is noticed at once all the same."""
    vary = itertools.cycle([1.0] * 40 + [1.4] * 40)
    machine.cost = lambda number: next(vary) * (0.003 if number == 2 else 0.0045)
    chosen = Threads()
    assert run(chosen, machine, 6000)[1] < 600
    machine.cost = lambda number: 0.015 if number == 2 else 0.006
    run(chosen, machine, 100)
    assert chosen.num == 1


def test_a_step_that_reads_a_prompt_decides_nothing(machine):
    machine.cost = lambda number: (
        0.5 if machine.num_steps_with[2] == 2 and number == 2 else 0.003 + 0.003 * (number == 1)
    )
    chosen = Threads()
    run(chosen, machine, 40)
    assert chosen.num == 2


def test_one_core_is_never_left_alone(machine, monkeypatch):
    monkeypatch.setattr(threads, "most_threads", lambda: 1)
    machine.number, machine.cost = 1, lambda number: 0.01 * number
    run(Threads(), machine, 300)
    assert machine.num_steps_with == {1: 300, 2: 0}


def test_what_is_measured_has_all_threads_and_leaves_none_behind():
    most = threads.most_threads()
    found = in_own_thread(lambda: (threading.current_thread(), torch.get_num_threads()))
    assert found[0] is not threading.current_thread() and found[1] == most
    assert not found[0].is_alive()
    with pytest.raises(ValueError, match="as it was"):
        in_own_thread(lambda: (_ for _ in ()).throw(ValueError("as it was")))
