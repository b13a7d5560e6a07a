"""Who is answered when, and by which engine: a few answers side by side, settings that move while text streams.

One thread loads the engine and then steps it; visitors' streams take their steps from queues. A larger model of the
list is loaded beside the embedded one and takes its place between two answers; on ZeroGPU a worker process runs it.
"""

from __future__ import annotations

import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from app.hosting import HostedModel, Hosting, Room, check_room, named_model
from app.limits import Limits, TooManyError, Visits
from app.loading import Serving, answers_in_worker, lend, load_hosted, request_of, warm_up
from app.models import Models
from app.places import Place, Series
from app.settings import Settings
from app.zero import ZeroEngine, worker_function
from moespec import EMBEDDED_TARGET, Request, StepTrace, TraceHeader

if TYPE_CHECKING:
    from moespec import Batch, Engine, EngineInfo
    from moespec.advise import Advice

MAX_TOGETHER = 4  # answers that are written side by side
UNUSED_S = 300.0  # that a place waits for its browser, which may wait for others' answers
FRAME_S = 0.05  # 20 frames a second is what a page keeps up with
TAKING_OVER = "A larger model has been loaded and takes over when the answers before yours are written: ask again then."
DEAF = " What you move now acts from the next answer on: the process that writes this one cannot be told."
UNMEASURED = ("fixed", "cascade-like")  # governors that need no table of what steps cost
Step = list[StepTrace]


class Service:
    """Loads the engine in the background; hands out coalesced steps and each visitor's place in the queue.

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
        self._target, self.hosting, self._wanted = target, hosting, wanted
        self.limits = limits or Limits()
        self._visits = Visits()
        self._models = Models(notice)
        self._batches: list[Batch] = []
        self._asked = threading.Event()
        self._lock = threading.Lock()
        self._places: dict[str, Place] = {}  # of everyone whose answer is being written or waited for, in order
        self._tickets = 0
        self.knows_costs = False  # what steps cost here, which governors ask for
        self._advice: dict[str | Path, Advice] = {}
        self._advice_lock = threading.Lock()
        self._thread: threading.Thread | None = None

    @staticmethod
    def of(environment: Mapping[str, str]) -> Service:
        """For the host that the environment describes, with the model that it names."""
        hosting, limits = Hosting.of(environment), Limits.from_environment(environment)
        try:
            return Service(hosting=hosting, wanted=named_model(environment), limits=limits)
        except ValueError as error:
            return Service(hosting=hosting, notice=str(error), limits=limits)

    def prepare(self) -> None:
        """What must be done before the page is launched, by the main thread: ZeroGPU lends what is loaded then."""
        if self.hosting is Hosting.ZERO_GPU:
            lent: list[tuple[Any, Any]] = []
            run = worker_function(answers_in_worker(self._wanted, lent), self._wanted)
            if self._wanted is not None:
                self._load_wanted(self._wanted, lambda wanted: lend(wanted, lent, run))

    def start(self) -> None:
        """Begin to load, once."""
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, daemon=True)
                self._thread.start()

    def _run(self) -> None:
        if self._models.now is not None:
            return  # in a worker of ZeroGPU's
        self._models.load_first(self._first)
        if self._wanted is not None and self.hosting is not Hosting.ZERO_GPU:
            threading.Thread(target=self._load_wanted, args=(self._wanted, self._beside), daemon=True).start()
        while self._batches:
            self._asked.wait()
            self._asked.clear()
            try:
                while any([batch.step() for batch in self._batches]):
                    pass
            except Exception:
                logging.exception("a step failed")  # those whose step it was have been told
                self._asked.set()  # the others go on

    def _first(self) -> Serving:
        from moespec import Engine  # here, because torch and transformers take seconds

        # The GPU is for the named model: no graph can be captured while weights move there. ZeroGPU only pretends.
        device = "auto" if self._wanted is None and self.hosting is not Hosting.ZERO_GPU else "cpu"
        return self._batched(Engine.from_pretrained(self._target, device=device), self._target)

    def _beside(self, wanted: HostedModel) -> Serving:
        return self._batched(load_hosted(wanted), wanted.hub_id)

    def _batched(self, engine: Engine, target: str | Path) -> Serving:
        """The engine, warm, with the batch that this service steps."""
        from moespec import Batch

        warm_up(engine)
        batch = Batch(engine, MAX_TOGETHER)
        self._batches.append(batch)
        return Serving(engine, target, batch)

    def _load_wanted(self, wanted: HostedModel, load: Callable[[HostedModel], Serving]) -> None:
        def checked() -> Serving:
            check_room(self.hosting, wanted, Room.of(self.hosting, wanted, os.environ))
            return load(wanted)

        self._models.load_wanted(wanted.name, checked)
        with self._lock:
            self._take_over()

    def _take_over(self) -> None:
        """A model that waits answers from now on, unless somebody's prompt has been read for the one before; locked."""
        if all(place.begun for place in self._places.values()):
            self._models.take_over()

    @property
    def engine(self) -> Engine | ZeroEngine:
        """The engine that answers now, waited for. ValueError says why there is none."""
        return self._serving.engine

    @property
    def _serving(self) -> Serving:
        self.start()
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

    @property
    def piece(self) -> Callable[[int], str]:
        """Token id to its text."""
        return self.engine.pieces

    def enter(self, session: str, visitor: str = "", series: Series | None = None) -> Place:
        """Join the queue. ValueError if this session's answer is being written, or another model answers than began the
        series; TooManyError if all places are taken or this visitor, who is the session unless named, has asked too
        often."""
        limits = self.limits
        with self._lock:
            self._drop_unused()
            if session in self._places:
                raise ValueError("Your last answer is still being written: stop it, or wait for its end.")
            self._take_over()
            if self._models.is_one_waiting:
                raise ValueError(TAKING_OVER)
            if len(self._places) >= limits.num_places:
                raise TooManyError(f"{limits.num_places} visitors are waiting already: try again in a minute.", 60)
            is_first = series is None or series.engine is None
            if is_first and limits.requests_per_minute is not None:
                self._visits.admit(visitor or session, limits.requests_per_minute, time.monotonic())
            if series is not None and self._models.now is not None:
                series.engine = series.engine or self._models.now.engine
                if series.engine is not self._models.now.engine:
                    raise ValueError("Another model has taken over in between: start again to have all of one.")
            self._tickets += 1
            place = self._places[session] = Place(self._tickets, len(self._places), series=series)
            return place

    def _drop_unused(self) -> None:
        """Places whose browser never came for its answer; locked."""
        long_ago = time.monotonic() - UNUSED_S
        for session, place in list(self._places.items()):
            if not place.begun and place.taken_s < long_ago:
                del self._places[session]

    def num_beside(self, session: str) -> int:
        """How many others' answers are being written in shared steps."""
        others = [place.serving for name, place in list(self._places.items()) if name != session]
        return sum(serving is not None and serving.batch is not None for serving in others)

    def remark(self, session: str) -> str:
        """What a visitor should know of the answer that is being written; "" for nothing."""
        place = self._places.get(session)
        return DEAF if place is not None and place.is_deaf else ""

    def expects(self, session: str, ticket: int) -> bool:
        """Whether this visitor has joined the queue with this ticket and not left it."""
        place = self._places.get(session)
        return place is not None and place.ticket == ticket

    def leave(self, session: str, ticket: int | None = None) -> None:
        """Stop this visitor's answer, wherever it stands, or the one of a ticket, if it is still that one's turn."""
        with self._lock:
            place = self._places.get(session)
            if place is None or ticket not in (None, place.ticket):
                return
            del self._places[session]
            self._take_over()
        place.stop()

    def update(self, session: str, settings: Settings) -> None:
        """Move a visitor's budget and tree: they act from the next step of their answer on. ValueError leaves them."""
        place = self._places.get(session)
        if (
            place is not None and place.series is None and self.is_loaded
        ):  # not while the model loads: nothing is written yet
            engine = self.engine if place.serving is None else place.serving.engine
            engine.check_budget(settings.budget_config)
            place.move(settings)

    def stop(self, session: str, series: Series | None = None) -> None:
        """End this visitor's answer, or the one of a series; one that has not begun loses its place."""
        place = self._places.get(session)
        if place is None or place.series is not series:
            return
        if place.begun:
            place.stop()
        else:
            self.leave(session)

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
        self, session: str, ticket: int, messages: list[dict], settings: Settings, stop: tuple[str, ...] = ()
    ) -> Iterator[Step]:
        """The steps since the last frame, at most 20 times a second, the last ones always. Closing it stops the run.

        stop: texts before which the answer ends. Nothing for a ticket that was given back.
        """
        serving = self._serving
        with self._lock:
            place = self._places.get(session)
            if place is None or place.ticket != ticket:
                return
            place.serving = serving
            self._take_over()
        try:
            self._check(serving, settings)
            yield from _frames(self._ask(serving, place, messages, settings, stop))
        finally:
            self.leave(session, place.ticket)

    def _ask(
        self, serving: Serving, place: Place, messages: list[dict], settings: Settings, stop: tuple[str, ...]
    ) -> Iterator[StepTrace]:
        """The steps of an answer, as they are made."""
        prompt = _prompt(messages, settings)
        if isinstance(serving.engine, ZeroEngine):
            return serving.engine.answer(place, prompt, settings, stop)
        assert serving.batch is not None
        request = request_of(serving.engine, prompt, settings, stop, place.control)
        self.knows_costs = self.knows_costs or settings.governor not in UNMEASURED
        return self._ask_batch(serving.batch, request)

    def _ask_batch(self, batch: Batch, request: Request) -> Iterator[StepTrace]:
        outcomes: queue.SimpleQueue[StepTrace | BaseException] = queue.SimpleQueue()
        batch.join(request, outcomes.put)
        self._asked.set()
        while True:
            outcome = outcomes.get()
            if isinstance(outcome, BaseException):
                raise outcome
            yield outcome
            if outcome.summary is not None:
                return


def _prompt(messages: list[dict], settings: Settings) -> list[dict]:
    """The conversation as the model reads it."""
    system = settings.system.strip()
    return [{"role": "system", "content": system}, *messages] if system else messages


def _frames(steps: Iterator[StepTrace]) -> Iterator[Step]:
    """The steps as they are shown: a frame's at a time, the last ones always."""
    pending: Step = []
    shown = 0.0
    for step in steps:
        pending.append(step)
        if step.summary is not None or time.monotonic() - shown >= FRAME_S:
            yield pending
            pending, shown = [], time.monotonic()
