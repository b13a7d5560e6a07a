"""The engine: a prompt in, a stream of StepTraces out.

Owns the pairing of a target and a drafter, the lock, and the conversations that are kept between turns. The loop itself
is `run.py`'s, and `batch.py`'s for several requests; knows nothing of pages.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moespec.batch import answers
from moespec.config import EMBEDDED_TARGET, BudgetConfig, GenerationConfig, TreeConfig
from moespec.control import Control
from moespec.cost_table import CostTable
from moespec.drafters.base import Drafter
from moespec.drafters.loading import find_drafter
from moespec.drafters.stand_in import StandIn
from moespec.governors.base import Governor
from moespec.models import load_model
from moespec.policies.method import RoutedModel
from moespec.prompts import encode_prompt
from moespec.report import Pieces, device_card, trace_header
from moespec.request import Request
from moespec.run import Run
from moespec.seats import Seat, Seats
from moespec.target import Target
from moespec.trace import StepTrace, TraceHeader
from moespec.tree_check import check_trees
from moespec.verifier import Verifier


@dataclass(frozen=True)
class EngineInfo:
    """What an interface needs to know of the loaded pair."""

    model_name: str
    drafter_name: str
    drafter_reason: str
    tap_layers: tuple[int, ...]  # whose entering residual the drafter reads
    num_experts: int
    top_k: int
    num_moe_layers: int
    max_context: int
    backend: str
    backend_reason: str
    kernels: str  # what runs a step: "compiled", or "torch" with the model's own modules
    graphs: str  # "captured", or why steps are not replayed as CUDA graphs
    router_family: str


def _public_name(target: str | Path, folder: Path | None) -> str:
    """A hub id as it is; of a folder its last part alone, since traces and records leave this machine."""
    if folder is None:
        return str(target)
    return "embedded model" if folder.resolve() == EMBEDDED_TARGET else folder.resolve().name


class Engine:
    """A target, maybe a drafter, and the conversation between them.

    >>> engine = Engine.from_pretrained("assets/model")                        # doctest: +SKIP
    >>> for step in engine.generate("Hello!", budget=BudgetConfig(budget=16)):  # doctest: +SKIP
    ...     print(step.text, end="")
    """

    def __init__(self, target: Target, drafter: Drafter | None, name: str, drafter_reason: str = "asked for") -> None:
        self.target, self.drafter, self.name, self.drafter_reason = target, drafter, name, drafter_reason
        self.verifier = Verifier(target)
        self._lock = threading.Lock()
        self._owner: int | None = None  # the thread whose generator holds the lock
        self.seats = Seats(len(target.layers), drafter)
        self.pieces = Pieces(target.tokenizer)
        self.costs: CostTable | None = None  # what steps cost here, once somebody asked (`kept_costs.py`)

    @staticmethod
    def from_pretrained(
        target: str | Path,
        drafter: str | Path | Drafter | None = "auto",
        *,
        device: str = "auto",
        dtype: str | torch.dtype = "auto",
        backend: str = "auto",
        revision: str | None = None,
        tap_layers: tuple[int, ...] | None = None,
    ) -> Engine:
        """Load a directory or hub id. `drafter`: "auto" (a head beside it, else n-gram), "ngram", None or "none", a
        head's directory or hub id, "model:PATH" for a small model's, or a `Drafter`.

        `tap_layers`: the decoder layers whose entering residual the head reads, where its config does not name them;
        `(2, 8, 15)` for `wantsleep/OLMoE_1B_7B_Eagle3`.
        `backend` runs the experts: "auto", or "reference", "cpu" or "triton", of which ValueError says why not.
        """
        model, tokenizer = load_model(target, device, dtype, revision)
        folder = Path(target) if Path(target).is_dir() else None
        return Engine._attach(model, tokenizer, drafter, folder, _public_name(target, folder), backend, tap_layers)

    @staticmethod
    def from_model(
        model: Any,
        tokenizer: Any = None,
        drafter: str | Path | Drafter | None = None,
        backend: str = "auto",
        tap_layers: tuple[int, ...] | None = None,
    ) -> Engine:
        """Use a transformers model that is already in memory; `close()` gives it back as it was.

        Steps of a small model run on copies of its weights. They follow a model that is written to, from the next
        answer on; not through `.data` and not in inference mode, where torch counts no writes: make a new engine then.
        """
        return Engine._attach(model, tokenizer, drafter, None, type(model).__name__, backend, tap_layers)

    @staticmethod
    def _attach(
        model: Any,
        tokenizer: Any,
        drafter: Any,
        folder: Path | None,
        name: str,
        backend: str,
        tap_layers: tuple[int, ...] | None,
    ) -> Engine:
        attached = Target(model, tokenizer, backend=backend)
        try:
            check_trees(attached)
            choice = find_drafter(drafter, attached, folder, tap_layers)
        except BaseException:
            attached.close()  # the model is its owner's: whatever happened, it is given back as it was
            raise
        if choice.drafter is not None:
            attached.tap(choice.drafter.tap_layers)
        return Engine(attached, choice.drafter, name, choice.reason)

    @property
    def info(self) -> EngineInfo:
        target = self.target
        return EngineInfo(
            model_name=self.name,
            drafter_name="none" if self.drafter is None else self.drafter.name,
            drafter_reason=self.drafter_reason,
            tap_layers=() if self.drafter is None else self.drafter.tap_layers,
            num_experts=target.num_experts,
            top_k=target.top_k,
            num_moe_layers=len(target.moe_layers),
            max_context=target.max_context,
            backend=target.backend.name,
            backend_reason=target.backend.reason,
            kernels="compiled" if target.is_compiled else "torch",
            graphs=self.verifier.graph_reason or "captured",
            router_family=target.moe_layers[0].family.name,
        )

    def card(self) -> dict:
        """The machine and software that a figure of this engine was measured on."""
        info = self.info
        card = device_card(self.target.device, self.target.dtype, info.backend)
        return card | {"backend_reason": info.backend_reason, "graphs": info.graphs}

    @property
    def routed_model(self) -> RoutedModel:
        """What a budget or an expert policy must fit."""
        target = self.target
        return RoutedModel(tuple(moe.layer for moe in target.moe_layers), target.num_experts, target.top_k)

    def check_budget(self, budget: BudgetConfig) -> None:
        """ValueError if the budget is outside this model's [k, E], or its method does not fit this model.

        The engine itself clamps; interfaces refuse.
        """
        self.routed_model.check_budget(budget)

    def header(
        self,
        prompt: Any,
        generation: GenerationConfig,
        budget: BudgetConfig,
        tree: TreeConfig,
        governor: Governor | None = None,
    ) -> TraceHeader:
        """Line 1 of a trace file of this engine."""
        return trace_header(self.info, self.card(), prompt, generation, budget, tree, governor)

    def encode(self, prompt: str | list | Tensor, generation: GenerationConfig | None = None) -> list[int]:
        """The token ids that `generate` would read. ValueError for a prompt that cannot be used."""
        target = self.target
        generation = generation or GenerationConfig()
        return encode_prompt(prompt, generation, target.tokenizer, target.vocab_size, target.max_context)

    def generate(
        self,
        prompt: str | list | Tensor,
        generation: GenerationConfig | None = None,
        budget: BudgetConfig | None = None,
        tree: TreeConfig | None = None,
        control: Control | None = None,
        governor: Governor | None = None,
    ) -> Iterator[StepTrace]:
        """Stream the answer to a text, a list of chat messages, or token ids. The last step carries the summary.

        A governor decides tree and budget step by step, within what is asked for (`governors`).
        ValueError at once for a prompt that cannot be used. Another thread's generation is waited for; closing the
        iterator early, at any point, leaves the engine usable.
        """
        generation, budget, tree = generation or GenerationConfig(), budget or BudgetConfig(), tree or TreeConfig()
        request = Request(prompt, generation, budget, tree, control or Control(), governor)
        return self._steps(self.encode(prompt, generation), request)

    def generate_batch(self, requests: Iterable[Request], max_requests: int = 8) -> Iterator[tuple[int, StepTrace]]:
        """Answer several requests side by side: (number of the request, its step), as they come.

        At most `max_requests` at a time; the next joins when one has ended. Trees under an equal budget and policy are
        verified in one forward; `BudgetConfig.scope` says what the budget is for. A request is stopped and its settings
        are moved by its own `control`. Each yields what `generate` would, and in its steps `verify_ms` is the forward
        that it shared, `other_ms` includes what it waited for, `expert_bytes` is its share (`StepTrace`).

        ValueError at once for a prompt that cannot be used, before any is begun. A request whose own part of a step
        fails ends alone, a failing forward ends those that share it: the others go on, and then the first error is
        raised. Closing the iterator early leaves the engine usable. For requests that come while others are answered,
        use `Batch`.
        """
        return answers(self, requests, max_requests)

    def _steps(self, token_ids: list[int], request: Request) -> Iterator[StepTrace]:
        with self.turn():
            seat = self.seat_for(token_ids)
            steps = self.run_at(seat, token_ids, request).steps()
            try:
                while True:
                    try:
                        step = next(steps)
                    except BaseException:
                        seat.forget()
                        raise
                    if step.summary is not None:
                        break
                    yield step
            finally:
                self.seats.leave(seat)
        # The last step is handed out with the lock released: whoever has it may start the next run.
        yield step

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """Inside: the model is this thread's; another's turn is waited for."""
        if self._owner == threading.get_ident():
            raise RuntimeError("this thread's earlier generation is not finished: exhaust or close its iterator first.")
        with self._lock:
            self._owner = threading.get_ident()
            try:
                yield
            finally:
                self._owner = None

    def seat_for(self, token_ids: list[int]) -> Seat:
        """Where a request with this prompt is answered, until `seats.leave`; in a turn. ValueError if there is none.

        A model that was written to is followed here, unless somebody's answer is under way.
        """
        if not self.seats.any_taken and self.target.refresh():
            self.forget()
            self.verifier.forget_captures()
        return self.seats.take(token_ids)

    def run_at(self, seat: Seat, token_ids: list[int], request: Request) -> Run:
        """A request on its way at a seat."""
        drafter = request.drafter or seat.drafter
        if request.drafter is not None and seat.drafter is not None:
            drafter = StandIn(request.drafter, seat.drafter)
        return Run(
            target=self.target,
            verifier=self.verifier,
            drafter=drafter,
            conversation=seat.conversation,
            pieces=self.pieces,
            prompt_ids=token_ids,
            generation=request.generation,
            budget=request.budget,
            tree=request.tree,
            control=request.control,
            governor=request.governor,
            card=self.card,
        )

    def forget(self) -> None:
        """Drop the conversations that nobody is in: the next prompt is read from its beginning."""
        self.seats.forget()

    def close(self) -> None:
        """Detach from the model: hooks and the experts function are removed."""
        self.target.close()
