"""Several requests side by side: every step drafts for each, verifies all in one forward, and commits each.

Owns who takes part in a step, which trees share a forward, and whose error is whose. What a request does in a step is
`run.py`'s. Knows nothing of pages or threads but that requests may come from any.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from moespec.clock import Clock
from moespec.config import BudgetConfig
from moespec.drafters.base import propose_together
from moespec.request import Request
from moespec.run import Aim, Run
from moespec.seats import Seat
from moespec.trace import StepTrace
from moespec.types import DraftTree

if TYPE_CHECKING:
    from moespec.engine import Engine

Deliver = Callable[[StepTrace | BaseException], None]
Result = TypeVar("Result")


@dataclass(eq=False)
class _Member:
    """A request that takes part, and when its step began."""

    run: Run
    seat: Seat
    deliver: Deliver
    began: float


@dataclass(eq=False)
class _Turn:
    """A member's step on its way. marks: of the clock, before and after drafting."""

    member: _Member
    aim: Aim
    tree: DraftTree | None = None
    marks: tuple[Any, Any] = (None, None)

    @property
    def setting(self) -> BudgetConfig | None:
        """What is equal for all that share a forward: the budget, or None where no policy acts."""
        return None if self.aim.policy is None else self.aim.budget


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
                committed = [pair for group in _groups(self._draft()) for pair in self._verify(group)]
                for member, step in committed:
                    last = self._own_part(member, partial(member.run.finished, step, member.began))
                    if last is not None:
                        self._hand_out(member, last)
            except BaseException as error:  # no request's own: an interrupt, say
                for member in list(self._members):
                    self._fail(member, error)
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
            except Exception as error:
                deliver(error)
                continue
            member = _Member(self._engine.run_at(seat, token_ids, request), seat, deliver, began)
            self._members.append(member)
            step = self._own_part(member, member.run.prefill)
            if step is not None:
                self._hand_out(member, step)
            member.began = time.perf_counter()

    def _draft(self) -> list[_Turn]:
        """A tree for everyone, from passes that the drafters share where there are such."""
        pairs = [(member, self._own_part(member, member.run.aim)) for member in list(self._members)]
        turns = [_Turn(member, aim) for member, aim in pairs if aim is not None]
        asking = [turn for turn in turns if turn.aim.context is not None]
        for kind in {type(turn.member.run.drafter) for turn in asking}:
            alike = [turn for turn in asking if type(turn.member.run.drafter) is kind]
            if len(alike) > 1:
                self._draft_together(alike)
        for turn in turns:
            if turn.tree is None and turn.member in self._members:
                before = self._clock.mark()
                turn.tree = self._own_part(turn.member, partial(turn.member.run.draft, turn.aim))
                turn.marks = before, self._clock.mark()
        return [turn for turn in turns if self._govern(turn)]

    def _govern(self, turn: _Turn) -> bool:
        """Whether there is a tree to verify, of which the request's governor has taken its part."""
        if turn.tree is None:
            return False
        chosen = self._own_part(turn.member, partial(turn.member.run.governed, turn.aim, turn.tree))
        if chosen is not None:
            turn.aim, turn.tree = chosen
        return chosen is not None

    def _draft_together(self, turns: list[_Turn]) -> None:
        before = self._clock.mark()
        asked = [(turn.member.run.drafter, turn.aim.context) for turn in turns]
        try:
            trees = propose_together([(drafter, context) for drafter, context in asked if drafter and context])
        except Exception as error:
            for turn in turns:
                self._fail(turn.member, error)
            return
        for turn, tree in zip(turns, trees or [], strict=trees is not None):
            turn.tree, turn.marks = tree, (before, self._clock.mark())

    def _verify(self, turns: list[_Turn]) -> list[tuple[_Member, StepTrace]]:
        """One forward over the trees of a group, and what each makes of it."""
        before, aim = self._clock.mark(), turns[0].aim
        drafts = [turn.member.run.to_verify(turn.tree) for turn in turns if turn.tree is not None]
        try:
            verified = self._engine.verifier.verify_together(drafts, aim.policy, aim.budget.scope == "batch")
        except Exception as error:
            for turn in turns:
                self._fail(turn.member, error)
            return []
        marks, committed = (before, self._clock.mark()), []
        for turn, own in zip(turns, verified, strict=True):
            commit = partial(turn.member.run.commit, turn.aim, own, (*turn.marks, *marks))
            step = self._own_part(turn.member, commit)
            if step is not None:
                committed.append((turn.member, step))
        return committed

    def _own_part(self, member: _Member, part: Callable[[], Result]) -> Result | None:
        """What a member's own part of a step gives; None where it failed, which ends this member alone."""
        try:
            return part()
        except Exception as error:
            self._fail(member, error)
            return None

    def _fail(self, member: _Member, error: BaseException) -> None:
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


def _groups(turns: list[_Turn]) -> list[list[_Turn]]:
    """Those that share a forward."""
    groups: list[list[_Turn]] = []
    for one in turns:
        same = next((group for group in groups if group[0].setting == one.setting), None)
        if same is None:
            groups.append([one])
        else:
            same.append(one)
    return groups


def answers(engine: Engine, requests: Iterable[Request], max_requests: int) -> Iterator[tuple[int, StepTrace]]:
    """`Engine.generate_batch`."""
    batch = Batch(engine, max_requests)
    outcomes: deque[tuple[int, StepTrace | BaseException]] = deque()
    for number, request in enumerate(requests):
        try:
            batch.join(request, partial(_put, outcomes, number))
        except ValueError as error:
            raise ValueError(f"request {number} cannot be answered: {error}") from error
    return _drive(batch, outcomes)


def _put(outcomes: deque, number: int, outcome: StepTrace | BaseException) -> None:
    outcomes.append((number, outcome))


def _drive(batch: Batch, outcomes: deque[tuple[int, StepTrace | BaseException]]) -> Iterator[tuple[int, StepTrace]]:
    failed: list[BaseException] = []
    anyone = True
    try:
        while anyone:
            anyone = batch.step()
            while outcomes:
                number, outcome = outcomes.popleft()
                if isinstance(outcome, BaseException):
                    failed.append(outcome)
                else:
                    yield number, outcome
    finally:
        batch.close()
    if failed:
        raise failed[0]
