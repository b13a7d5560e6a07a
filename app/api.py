"""Named endpoints for `gradio_client`: /generate, /settings, /advise.

Owns their names and parameters; what they carry is `programs.py`'s. All else that the page's queue knows is the page's.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any
from uuid import uuid4

import gradio as gr

from app.programs import Counters, allowed, defaults, messages_of, step_json, stop_texts
from app.service import Service
from app.settings import Settings, presets
from app.stepping import MAX_TOGETHER


def add_endpoints(service: Service) -> None:
    """To the page that is being built. What is refused reaches the client as an error with one sentence."""

    def generate(
        request: gr.Request,
        prompt: str | list[dict[str, Any]],
        settings: dict[str, Any] | None = None,
        stop: str | list[str] | None = None,
    ) -> Iterator[dict[str, Any]]:
        """Streams an answer by steps: new text, token ids, what it cost, counters so far; the last with the summary.

        prompt: a text, or chat messages of role and content. settings: what is to differ from the defaults, by the
        names that /settings gives. stop: texts before which the answer ends. Leaving or cancelling ends the answer.
        """
        session, counters = f"program {uuid4().hex}", Counters()
        try:
            with _refusals():
                messages, stops = messages_of(prompt), stop_texts(stop)
                asked = Settings.from_json(settings or {}, defaults(service.info, service.limits))
                place = service.queue.enter(session, service.limits.visitor(request))
                for steps in service.stream(session, place.ticket, messages, asked, stops):
                    for step in steps:
                        counters.add(step)
                        yield step_json(step, counters)
        finally:
            service.queue.leave(session)

    def describe() -> dict[str, Any]:
        """The loaded model, every setting's default and allowed values, the presets, and the limits."""
        with _refusals():
            return _settings(service)

    def advise() -> dict[str, Any]:
        """Whether speculation pays for this model on this machine, and with which tree and budget. All modelled."""
        with _refusals():
            return service.advise().to_json()

    # Answers wait in one line with the page's.
    gr.api(generate, api_name="generate", concurrency_id="engine", concurrency_limit=MAX_TOGETHER)
    gr.api(describe, api_name="settings", concurrency_limit=None)
    gr.api(advise, api_name="advise", concurrency_limit=None)


@contextlib.contextmanager
def _refusals() -> Iterator[None]:
    """What goes wrong inside reaches the client as one sentence: Gradio hides every error but its own."""
    try:
        yield
    except ValueError as error:
        raise gr.Error(str(error), print_exception=False) from error
    except Exception as error:
        logging.exception("a request failed")
        raise gr.Error(f"The request failed ({type(error).__name__}): ask again.", print_exception=False) from error


def _settings(service: Service) -> dict[str, Any]:
    info, limits = service.info, service.limits
    return {
        "model": asdict(info),
        "defaults": defaults(info, limits).to_json(),
        "allowed": allowed(info, limits),
        "presets": {name: one.to_json() for name, one in presets(info.top_k, info.num_experts).items()},
        "limits": asdict(limits),
    }
