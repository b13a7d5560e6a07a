"""An engine in another process, as on ZeroGPU: a worker has the GPU for one answer, and pickles are all that passes.

The page's process holds the model without ever running it: ZeroGPU lends its weights to the worker, which makes the
engine. Nothing a worker kept is relied upon; what it did keep (the engine, a conversation's keys and values) saves
time. Owns what passes between the two and the file that carries a visitor's changes. Knows nothing of queues.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import tempfile
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from app.settings import Settings
from moespec import BudgetConfig, Control, EngineInfo, GenerationConfig, StepTrace, TraceHeader, TreeConfig

if TYPE_CHECKING:
    from app.hosting import HostedModel
    from app.places import Place

START_S, TOKENS_PER_S = 30, 15  # what an answer is given: to make the engine and read the prompt, then by its length


@dataclass(frozen=True)
class Begun:
    """What the worker says first. hears: whether it sees the file that carries changes."""

    info: EngineInfo
    card: dict[str, Any]
    hears: bool


@dataclass(frozen=True)
class Refusal:
    """A ValueError of the worker's: only its text would be lost on the way."""

    reason: str


class CutOffError(ValueError):
    """The worker ended before its answer did; what was written stays."""


class ChangeFile:
    """What a visitor changes while another process writes their answer: a small file, written whole, read each step."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._last = ""

    @staticmethod
    def new() -> ChangeFile:
        handle, name = tempfile.mkstemp(prefix="moespec-", suffix=".json")
        os.close(handle)
        return ChangeFile(Path(name))

    def write(self, settings: Settings | None, stopped: bool) -> None:
        """Nothing where nobody reads any more. OSError where it cannot be written."""
        if self.exists:
            beside = self.path.with_suffix(".new")
            beside.write_text(json.dumps({"settings": settings and settings.to_json(), "stopped": stopped}))
            beside.replace(self.path)

    @property
    def exists(self) -> bool:
        return self.path.is_file()

    def pass_on(self, control: Control) -> None:
        """Tell a run what is new. A file that is gone has nobody who waits for the answer."""
        try:
            text = self.path.read_text()
        except FileNotFoundError:
            control.stop()
            return
        if text == self._last:
            return
        try:
            values = json.loads(text)
        except ValueError:  # not whole yet
            return
        self._last = text
        if values["settings"] is not None:
            settings = Settings.from_json(values["settings"])
            control.update(budget=settings.budget_config, tree=settings.tree_config)
        if values["stopped"]:
            control.stop()

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)


Outcome = Begun | Refusal | StepTrace
Answers = Callable[[list[dict], Settings, tuple[str, ...], ChangeFile], Iterator[Begun | StepTrace]]
Run = Callable[[list[dict], dict[str, Any], tuple[str, ...], str], Generator[Outcome]]


def seconds(messages: list[dict], values: dict[str, Any], stop: tuple[str, ...], changes: str) -> int:
    """How long a worker is asked for. Shorter waits less and costs visitors less of their quota."""
    return START_S + -(-values["max_new_tokens"] // TOKENS_PER_S)


def worker_function(answers: Answers, hosted: HostedModel | None) -> Run:
    """`answers` in ZeroGPU's worker: called with messages, settings as JSON, stop texts, and the path of the
    change file.

    To be made before the page is launched, with or without a model: ZeroGPU counts the functions that want a GPU then.
    """
    import spaces  # type: ignore[import-not-found]  # of ZeroGPU's own image; to be imported before CUDA is asked for

    def answer(messages: list[dict], values: dict[str, Any], stop: tuple[str, ...], changes: str) -> Generator[Outcome]:
        try:
            yield from answers(messages, Settings.from_json(values), stop, ChangeFile(Path(changes)))
        except ValueError as error:
            yield Refusal(str(error))

    return spaces.GPU(answer, duration=seconds, size="large" if hosted is None else hosted.zero_gpu_size)


class ZeroEngine:
    """What the page asks of an engine, where a worker has it. Until the first answer, part of `info` is expectation."""

    def __init__(self, hosted: HostedModel, model: Any, tokenizer: Any, run: Run) -> None:
        from moespec.policies.method import RoutedModel
        from moespec.report import Pieces
        from moespec.shapes import shape_of

        shape, config = shape_of(model, hosted.name), model.config.get_text_config()
        self._tokenizer, self._vocab_size, self._run = tokenizer, config.vocab_size, run
        self.routed_model = RoutedModel(tuple(range(shape.num_moe_layers)), shape.num_experts, shape.top_k)
        self.pieces, self.drafter = Pieces(tokenizer), hosted.drafter
        later = "chosen when the first answer begins"
        info = EngineInfo(
            model_name=hosted.hub_id,
            drafter_name=hosted.drafter,
            drafter_reason="asked for",
            tap_layers=hosted.tap_layers or (),
            num_experts=shape.num_experts,
            top_k=shape.top_k,
            num_moe_layers=shape.num_moe_layers,
            max_context=config.max_position_embeddings,
            backend="undecided",
            backend_reason=later,
            kernels="undecided",
            graphs=later,
            router_family="",
        )
        dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
        card = {"device": "cuda", "name": "ZeroGPU", "threads": os.cpu_count(), "dtype": dtype, "backend": info.backend}
        self._begun = Begun(info, card | {"backend_reason": later}, hears=True)

    @property
    def info(self) -> EngineInfo:
        return self._begun.info

    def card(self) -> dict[str, Any]:
        """Of the worker that answered last."""
        return self._begun.card

    def check_budget(self, budget: BudgetConfig) -> None:
        """See `Engine.check_budget`."""
        self.routed_model.check_budget(budget)

    def encode(self, prompt: list[dict], generation: GenerationConfig | None = None) -> list[int]:
        """See `Engine.encode`."""
        from moespec.prompts import encode_prompt

        limits = self._vocab_size, self.info.max_context
        return encode_prompt(prompt, generation or GenerationConfig(), self._tokenizer, *limits)

    def header(
        self, prompt: list[dict], generation: GenerationConfig, budget: BudgetConfig, tree: TreeConfig
    ) -> TraceHeader:
        """See `Engine.header`."""
        from moespec.report import trace_header

        return trace_header(self.info, self.card(), prompt, generation, budget, tree)

    def answer(
        self, place: Place, messages: list[dict], settings: Settings, stop: tuple[str, ...]
    ) -> Iterator[StepTrace]:
        """The steps of an answer, as a worker makes them; closing it ends the worker's run.

        ValueError where there is no answer at all, `CutOffError` where the worker ended in the middle of one.
        """
        with contextlib.suppress(OSError):  # nowhere to write: the worker will say that it hears nothing
            place.changes = ChangeFile.new()
        path = "" if place.changes is None else str(place.changes.path)
        place.pass_on()  # what was moved while this answer waited
        outcomes, step = self._run(messages, settings.to_json(), stop, path), None
        try:
            for outcome in outcomes:
                if isinstance(outcome, Refusal):
                    raise ValueError(outcome.reason)
                if isinstance(outcome, Begun):
                    self._begun, place.is_deaf = outcome, not outcome.hears
                    continue
                step = outcome
                yield step
                if place.is_deaf and place.control.stopped:
                    break
        except ValueError:
            raise
        except Exception as error:  # gr.Error and whatever else ZeroGPU raises
            raise _ended(step, _said(error)) from error
        finally:
            outcomes.close()
            with place.passing_on:
                if place.changes is not None:
                    place.changes.remove()
        if step is None or step.summary is None:
            raise _ended(step, "it was stopped, or its time was up")


def _ended(step: StepTrace | None, reason: str) -> Exception:
    if step is None:
        return ValueError(f"ZeroGPU gave no answer: {reason}. Ask again, or for fewer tokens.")
    return CutOffError(f"The GPU worker ended before its answer did: {reason}. What was written stays; ask again.")


def _said(error: Exception) -> str:
    """An error's text without its markup."""
    return re.sub(r"<[^>]*>", "", str(getattr(error, "message", error))).strip().rstrip(".") or type(error).__name__
