"""Answers for the page and for programs: what may be asked of the model that answers now, and the steps of an answer.

Settings move while text streams. Who is answered when is `queue.py`'s, by which engine and on which thread
`stepping.py`'s.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from app.hosting import HostedModel, Hosting, named_model
from app.limits import Limits
from app.loading import Serving, request_of
from app.models import Models
from app.places import Place
from app.queue import Queue
from app.settings import Settings
from app.stepping import FRAME_S, Stepper, Tell
from app.zero import ZeroEngine
from moespec import EMBEDDED_TARGET, StepTrace, TraceHeader

if TYPE_CHECKING:
    from moespec import Engine, EngineInfo
    from moespec.advise import Advice

UNMEASURED = ("fixed", "cascade-like")  # governors that need no table of what steps cost
Step = list[StepTrace]


class Service:
    """Checks, answers and advises. `queue` hands out the places without which nothing is answered.

    Loading begins with `start`, or with the first who asks for the engine: a page is served before its model is there.
    limits: what is given to everyone, wherever they ask.
    """

    def __init__(
        self,
        target: str | Path = EMBEDDED_TARGET,
        hosting: Hosting = Hosting.OWN,
        wanted: HostedModel | None = None,
        notice: str = "",
        limits: Limits | None = None,
    ) -> None:
        self.hosting, self._wanted = hosting, wanted
        self.limits = limits or Limits()
        self._models = Models(notice)
        self.queue = Queue(self.limits, self._models)
        self.stepper = Stepper(self._models, target, hosting, wanted, self.queue.take_over)
        self.knows_costs = False  # what steps cost here, which governors ask for
        self._advice: dict[str | Path, Advice] = {}
        self._advice_lock = threading.Lock()

    @staticmethod
    def of(environment: Mapping[str, str]) -> Service:
        """For the host that the environment describes, with the model that it names."""
        hosting, limits = Hosting.of(environment), Limits.from_environment(environment)
        try:
            return Service(hosting=hosting, wanted=named_model(environment), limits=limits)
        except ValueError as error:
            return Service(hosting=hosting, notice=str(error), limits=limits)

    @property
    def engine(self) -> Engine | ZeroEngine:
        """The engine that answers now, waited for. ValueError says why there is none."""
        return self._serving.engine

    @property
    def _serving(self) -> Serving:
        self.stepper.start()
        return self._models.wait()

    @property
    def notice(self) -> str:
        """Why another model answers than the one that was named; "" where none does."""
        return self._models.notice

    @property
    def is_to_change(self) -> bool:
        """Whether another model may take over."""
        return self._wanted is not None

    @property
    def info(self) -> EngineInfo:
        return self.engine.info

    @property
    def is_loaded(self) -> bool:
        return self._models.now is not None

    @property
    def unready(self) -> str:
        """Why nobody can be answered now, for those who will not wait; empty where they can."""
        return self._models.unready

    def advise(self) -> Advice:
        """What is modelled for this model on this machine; measures the machine the first time, for seconds."""
        from moespec.advise import advise

        with self._advice_lock:
            engine, target = self._serving.engine, self._serving.target
            if isinstance(engine, ZeroEngine):
                raise ValueError("a GPU that is there for the time of an answer cannot be measured.")
            if target not in self._advice:
                with engine.turn():  # a machine that runs a model is no measure
                    self._advice[target] = advise(target)
            return self._advice[target]

    def update(self, session: str, settings: Settings) -> None:
        """Move a visitor's budget and tree: they act from the next step of their answer on. ValueError leaves them."""
        place = self.queue.places.get(session)
        # Not while the model loads: nothing is written yet.
        if place is not None and place.series is None and self.is_loaded:
            engine = self.engine if place.serving is None else place.serving.engine
            engine.check_budget(settings.budget_config)
            place.move(settings)

    def check(self, settings: Settings) -> None:
        """ValueError where the model that answers now cannot be asked with these settings, or not for so much."""
        self._check(self._serving, settings)

    def _check(self, serving: Serving, settings: Settings) -> None:
        self.limits.check_length(settings.max_new_tokens)
        serving.engine.check_budget(settings.budget_config)
        if settings.governor != "fixed" and serving.engine.drafter is None:
            raise ValueError(f"governor={settings.governor!r} needs a drafter, and none is loaded: use fixed.")
        if serving.batch is None and settings.governor not in UNMEASURED:
            raise ValueError(
                f"governor={settings.governor!r} first measures what steps cost, for longer than ZeroGPU gives: "
                f"use {' or '.join(UNMEASURED)}."
            )

    def fit(self, messages: list[dict], settings: Settings) -> list[dict]:
        """The newest messages that leave room for an answer. ValueError if the last one alone is too long."""
        limit = self.info.max_context
        room = min(settings.max_new_tokens, limit // 2)
        while len(messages) > 1:
            try:
                if len(self.engine.encode(_prompt(messages, settings))) + room <= limit:
                    return messages
            except ValueError:  # longer than the context by itself
                pass
            messages = messages[1:]
            while len(messages) > 1 and messages[0]["role"] == "assistant":
                messages = messages[1:]
        self.engine.encode(_prompt(messages, settings))
        return messages

    def header(self, messages: list[dict], settings: Settings) -> TraceHeader:
        """Line 1 of the trace of an answer."""
        parts = settings.generation_config, settings.budget_config, settings.tree_config
        header = self.engine.header(_prompt(messages, settings), *parts)
        drafter = {"auto": header.drafter, "ngram": {"name": "n-gram", "reason": "asked for"}}.get(settings.drafter)
        return replace(header, settings=header.settings | {"governor": settings.governor}, drafter=drafter)

    def stream(
        self,
        session: str,
        ticket: int,
        messages: list[dict],
        settings: Settings,
        stop: tuple[str, ...] = (),
        tell: Tell = lambda step: None,
    ) -> Iterator[Step]:
        """The steps since the last frame, at most 20 times a second, the last ones always. Closing it stops the run.

        stop: texts before which the answer ends. tell: hears each step as it comes, from the thread that makes it where
        this process does. Nothing for a ticket that was given back.
        """
        serving = self._serving
        place = self.queue.begin(session, ticket, serving)
        if place is None:
            return
        try:
            self._check(serving, settings)
            yield from self._ask(serving, place, messages, settings, stop, tell)
        finally:
            self.queue.leave(session, place.ticket)

    def _ask(
        self,
        serving: Serving,
        place: Place,
        messages: list[dict],
        settings: Settings,
        stop: tuple[str, ...],
        tell: Tell,
    ) -> Iterator[Step]:
        prompt = _prompt(messages, settings)
        if isinstance(serving.engine, ZeroEngine):
            return _frames(serving.engine.answer(place, prompt, settings, stop), tell)
        assert serving.batch is not None
        request = request_of(serving.engine, prompt, settings, stop, place.control)
        self.knows_costs = self.knows_costs or settings.governor not in UNMEASURED
        return self.stepper.steps(serving.batch, request, tell)


def _prompt(messages: list[dict], settings: Settings) -> list[dict]:
    """The conversation as the model reads it."""
    system = settings.system.strip()
    return [{"role": "system", "content": system}, *messages] if system else messages


def _frames(steps: Iterator[StepTrace], tell: Tell) -> Iterator[Step]:
    """The steps of another process, a frame's at a time, the last ones always."""
    pending: Step = []
    shown = 0.0
    try:
        for step in steps:
            tell(step)
            pending.append(step)
            if step.summary is not None or time.monotonic() - shown >= FRAME_S:
                yield pending
                pending, shown = [], time.monotonic()
    except Exception:
        if pending:
            yield pending
        raise
