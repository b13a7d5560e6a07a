"""Several requests side by side: every step drafts for each, verifies all in one forward, and commits each.

Owns who takes part in a step, which trees share a forward, and whose error is whose. What a request does in a step is
`run.py`'s. Knows nothing of pages or threads but that requests may come from any.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from moespec.clock import Clock
from moespec.config import BudgetConfig, GenerationConfig, TreeConfig
from moespec.control import Control
from moespec.governors.base import Governor
from moespec.run import Proposal, Run
from moespec.seats import Seat
from moespec.trace import StepTrace

if TYPE_CHECKING:
    from moespec.engine import Engine

Deliver = Callable[[StepTrace | Exception], None]
Result = TypeVar("Result")


@dataclass(frozen=True)
class Request:
    """What `Engine.generate` is asked, as a thing. `control` moves its settings and stops it, and no other's."""

    prompt: str | list | Tensor
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    budget: BudgetConfig = field(default_factory=BudgetConfig)
    tree: TreeConfig = field(default_factory=TreeConfig)
    control: Control = field(default_factory=Control)
    governor: Governor | None = None  # of its own: it learns from the request's steps


@dataclass(eq=False)
class _Member:
    """A request that takes part, and when its step began."""

    run: Run
    seat: Seat
    deliver: Deliver
    began: float


_Proposed = tuple[_Member, Proposal]


class Batch:
    """Requests that are answered together. `join` from any thread; `step` and `close` from one.

    Trees under an equal budget and policy share a forward, whatever else they ask; those without one share another. A
    request whose budget is moved changes its group with its next step. On a GPU a request alone runs in steps of fixed
    shape, several together through the model's modules.
    """

    def __init__(self, engine: Engine, max_requests: int = 4) -> None:
        if max_requests < 1:
            raise ValueError(f"max_requests={max_requests} is not allowed: use 1 or more.")
        self._engine, self._max_requests = engine, max_requests
        self._waiting: deque[tuple[list[int], Request, Deliver]] = deque()
        self._members: list[_Member] = []
        self._clock = Clock(engine.target.device)

    def join(self, request: Request, deliver: Deliver) -> None:
        """Answer from the next step on in which there is room.

        `deliver` is called by the thread that calls `step`: with every StepTrace, the last one with its summary, or
        with the error that ended this request. ValueError at once for a prompt that cannot be used.
        """
        self._waiting.append((self._engine.encode(request.prompt, request.generation), request, deliver))

    @torch.inference_mode()
    def step(self) -> bool:
        """Read the prompts of those who join, then one step of everyone; whether anyone is left.

        What fails in a request's own part (its prompt, its drafter, its text) ends that request; what fails in a
        forward ends those that share it. The others go on.
        """
        with self._engine.turn():
            try:
                self._admit()
                committed = [pair for group in _groups(self._propose()) for pair in self._verify(group)]
                for member, step in committed:
                    self._hand_out(member, member.run.finished(step, member.began))
            except BaseException:  # no request's error: an interrupt, say
                for member in list(self._members):
                    member.seat.forget()
                    self._leave(member)
                raise
        return bool(self._members or self._waiting)

    def close(self) -> None:
        """Let everyone go, between two steps; what they wrote is kept for a next turn."""
        self._waiting.clear()
        for member in list(self._members):
            self._leave(member)

    def _admit(self) -> None:
        """Read the prompts of those for whom there is room. The others' step begins before, for they wait."""
        began = time.perf_counter()
        for member in self._members:
            member.began = began
        while self._waiting and len(self._members) < self._max_requests:
            token_ids, request, deliver = self._waiting.popleft()
            try:
                seat = self._engine.seat_for(token_ids)
            except ValueError as error:
                deliver(error)
                continue
            member = _Member(self._engine.run_at(seat, token_ids, request), seat, deliver, began)
            self._members.append(member)
            step = self._own_part(member, member.run.prefill)
            if step is not None:
                self._hand_out(member, step)
            member.began = time.perf_counter()

    def _propose(self) -> list[_Proposed]:
        proposed = [(member, self._own_part(member, member.run.propose)) for member in list(self._members)]
        return [(member, proposal) for member, proposal in proposed if proposal is not None]

    def _verify(self, group: list[_Proposed]) -> list[tuple[_Member, StepTrace]]:
        """One forward over the trees of a group, and what each makes of it."""
        before, first = self._clock.mark(), group[0][1]
        try:
            drafts, is_shared = [proposal.draft for _, proposal in group], first.budget.scope == "batch"
            verified = self._engine.verifier.verify_together(drafts, first.policy, is_shared)
        except Exception as error:
            for member, _ in group:
                self._fail(member, error)
            return []
        marks, committed = (before, self._clock.mark()), []
        for (member, proposal), own in zip(group, verified, strict=True):
            step = self._own_part(member, partial(member.run.commit, proposal, own, marks))
            if step is not None:
                committed.append((member, step))
        return committed

    def _own_part(self, member: _Member, part: Callable[[], Result]) -> Result | None:
        """What a member's own part of a step gives; None where it failed, which ends this member alone."""
        try:
            return part()
        except Exception as error:
            self._fail(member, error)
            return None

    def _fail(self, member: _Member, error: Exception) -> None:
        member.seat.forget()
        self._leave(member)
        member.deliver(error)

    def _hand_out(self, member: _Member, step: StepTrace) -> None:
        if step.summary is not None:
            self._leave(member)
        member.deliver(step)

    def _leave(self, member: _Member) -> None:
        self._members.remove(member)
        self._engine.seats.leave(member.seat)


def _groups(proposed: list[_Proposed]) -> list[list[_Proposed]]:
    """Those that may share a forward: whose policy and its settings are equal, or that have none."""
    groups: list[list[_Proposed]] = []
    for one in proposed:
        same = next((group for group in groups if _setting(group[0]) == _setting(one)), None)
        if same is None:
            groups.append([one])
        else:
            same.append(one)
    return groups


def _setting(proposed: _Proposed) -> BudgetConfig | None:
    _, proposal = proposed
    return None if proposal.policy is None else proposal.budget


def answers(engine: Engine, requests: Iterable[Request], max_requests: int) -> Iterator[tuple[int, StepTrace]]:
    """`Engine.generate_batch`."""
    batch = Batch(engine, max_requests)
    outcomes: deque[tuple[int, StepTrace | Exception]] = deque()
    for number, request in enumerate(requests):
        try:
            batch.join(request, partial(_put, outcomes, number))
        except ValueError as error:
            raise ValueError(f"request {number} cannot be answered: {error}") from error
    return _drive(batch, outcomes)


def _put(outcomes: deque, number: int, outcome: StepTrace | Exception) -> None:
    outcomes.append((number, outcome))


def _drive(batch: Batch, outcomes: deque[tuple[int, StepTrace | Exception]]) -> Iterator[tuple[int, StepTrace]]:
    failed: list[Exception] = []
    anyone = True
    try:
        while anyone:
            anyone = batch.step()
            while outcomes:
                number, outcome = outcomes.popleft()
                if isinstance(outcome, Exception):
                    failed.append(outcome)
                else:
                    yield number, outcome
    finally:
        batch.close()
    if failed:
        raise failed[0]
