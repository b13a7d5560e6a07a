"""An answer while it is written: what chat and browser memory are sent, and the panels at its beginning and end.

Owns when each of them is told and what a failure says. Knows nothing of the widgets or of how an answer is asked for.
"""

from __future__ import annotations

import contextlib
import html
import logging
import time
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import gradio as gr

from app.controls import read
from app.live import notice
from app.messages import History, shown
from app.places import Asked, Place
from app.recordings import Recordings
from app.service import UNMEASURED, Service
from app.stepping import MAX_TOGETHER
from app.zero import CutOffError
from moespec import RunSummary

ENDINGS = {
    "eos": "The answer ended by itself.",
    "length": "Ended at the maximum number of new tokens.",
    "context": "Ended because the context is full.",
    "stopped": "Stopped.",
    "stop": "Ended at a stop text.",
}
# Between two states of the text that the chat is told: a browser lays the conversation out anew, a long one for longer.
# Plain text is written out by the panels meanwhile (words.js); of Markdown this is all that is seen.
SHOWN_S, MARKDOWN_SHOWN_S, SHOWN_S_PER_CHARACTER = 1.0, 0.25, 0.5 / 10_000
KEEP_S = 1.0  # how often, at the most, an answer that is being written is kept in the browser
MEASURING = "Measuring what steps cost on this machine, once: the governor needs it. About ten seconds."
FORGOTTEN: dict[str, Any] = {"messages": [], "settings": {}}  # what the browser is to keep of no conversation
MAX_ENDED = 1000  # conversations that browsers may not have caught up with
MAX_WORDS = 400  # characters of a refusal, which may quote what was typed
NEVER_BEGUN = (gr.skip(), notice("done", "Stopped before it began."), gr.skip(), gr.skip(), gr.skip())
BESIDE = " Written beside other visitors' answers: the times are those of steps that are shared."


class Answering:
    """Streams answers of the chat: each frame gives (chat, live, finished recording's id, prompt, kept history).

    recorded: what the panels play where there is no conversation.
    """

    def __init__(self, service: Service, recordings: Recordings, recorded: dict[str, Any]) -> None:
        self._service, self._recordings, self._recorded = service, recordings, recorded
        self._ended: OrderedDict[str, History] = OrderedDict()  # each session's last conversation, by its end

    def join(
        self, session: str, visitor: str, messages: History, held: str, *, markdown: bool = False
    ) -> tuple[int, dict]:
        """(the ticket, what the panels say): they ask for the first step from now on, if it is to come soon. ValueError
        if it cannot be answered, which changes nothing."""
        settings = read(held)
        place = self._service.queue.enter(session, visitor)
        place.asked, place.as_markdown = Asked(messages, held, self._recordings.promise()), markdown
        if place.num_before >= MAX_TOGETHER:
            first = f"{MAX_TOGETHER} answers are written at a time, and {place.num_before} came first."
            return place.ticket, notice("waiting", f"{first} Yours comes after.")
        if settings.governor not in UNMEASURED and not self._service.knows_costs:
            return place.ticket, notice("waiting", MEASURING)
        return place.ticket, notice("waiting", "Reading the prompt…") | {"run": place.asked.recording_id}

    def view(self, session: str, history: History, *, markdown: bool) -> History:
        """The conversation as it is to be shown from now on; of an answer that is being written, all that is there."""
        place = self._service.queue.places.get(session)
        if place is None or place.asked is None:
            return shown(self.caught_up(session, history), markdown)
        place.as_markdown, messages = markdown, place.asked.messages
        with contextlib.suppress(ValueError):  # it has not begun
            text = "".join(step.text for step in self._recordings.of(place.asked.recording_id).steps)
            messages = [*messages, {"role": "assistant", "content": text}] if text else messages
        return shown(messages, markdown)

    def caught_up(self, session: str, history: History) -> History:
        """The conversation that a browser has, with the last words of its answer, which may be on their way to it."""
        ended = self._ended.get(session, [])
        is_behind = (
            len(ended) == len(history) > 0
            and ended[:-1] == history[:-1]
            and ended[-1]["content"].startswith(history[-1]["content"])
        )
        return ended if is_behind else history

    def answer(self, request: gr.Request, ticket: int) -> Iterator[tuple]:
        session, answered = request.session_hash or "", {"role": "assistant", "content": ""}
        place = self._service.queue.places.get(session)
        if place is None or place.ticket != ticket or place.asked is None:
            yield NEVER_BEGUN
            return
        messages, held = place.asked.messages, place.asked.held

        def written() -> Any:
            """What was held back, too."""
            return shown([*messages, answered], place.as_markdown) if answered["content"] else gr.skip()

        def kept() -> Any:
            return kept_history([*messages, answered], held) if answered["content"] else gr.skip()

        try:
            yield from self._stream(session, place, place.asked, answered)
        except CutOffError as error:
            yield written(), notice("error", str(error)), gr.skip(), gr.skip(), kept()
        except ValueError as error:
            # Nothing is lost: the message goes back to where it can be changed.
            back = messages[-1]["content"] if messages else gr.skip()
            yield shown(messages[:-1], place.as_markdown), refusal(error), gr.skip(), back, gr.skip()
        except Exception as error:
            logging.exception("an answer failed")
            failed = f"The answer failed ({type(error).__name__}). What was written stays; retry, or ask again."
            yield written(), notice("error", failed), gr.skip(), gr.skip(), kept()
        finally:
            if answered["content"]:
                self._ended[session] = [*messages, answered]
                self._ended.move_to_end(session)
                while len(self._ended) > MAX_ENDED:
                    self._ended.popitem(last=False)
            self._service.queue.leave(session, ticket)

    def _stream(self, session: str, place: Place, asked: Asked, answered: dict) -> Iterator[tuple]:
        """(chat, panels' notice, id, prompt, kept): the notice at first, at the end and where its sentence changes, the
        recording's id once, at the end. The panels ask for steps as they are made (`routes.py`)."""
        service, ticket, settings, messages = self._service, place.ticket, read(asked.held), asked.messages
        kept = service.fit(messages, settings)
        num_dropped = len(messages) - len(kept)
        remark = f"The oldest {num_dropped} messages no longer fit the context and are not read." if num_dropped else ""
        recording = self._recordings.begin(service.header(kept, settings), asked.recording_id)
        said, kept_at, shown_at = None, time.monotonic(), 0.0
        for steps in service.stream(session, ticket, kept, settings, tell=recording.steps.append):
            if not service.queue.expects(session, ticket):
                if session not in service.queue.places:  # cleared: frames on their way have filled the chat again
                    yield [], self._recorded, "", gr.skip(), FORGOTTEN
                return
            answered["content"] += "".join(step.text for step in steps)
            if steps[0].kind == "prefill" and settings.is_lossless and not steps[0].lossless:
                remark += " Lossy already: what stands before was written under a budget. Clear begins anew."
            if service.queue.num_beside(session) and BESIDE not in remark:
                remark += BESIDE
            if (told := service.queue.remark(session)) not in remark:
                remark += told
            message, is_done = f"{remark} {_ending(steps[-1].summary)}".strip(), steps[-1].summary is not None
            now, least_s = time.monotonic(), MARKDOWN_SHOWN_S if place.as_markdown else SHOWN_S
            rest_s = least_s + len(answered["content"]) * SHOWN_S_PER_CHARACTER
            if not is_done and message == said and now - shown_at < rest_s:
                continue
            shown_at = now if answered["content"].strip() else 0.0  # Gradio shows no blank answer to write on
            chat = shown([*messages, answered], place.as_markdown)
            frame: Any = gr.skip()
            if is_done or message != said:
                said, frame = message, notice("done" if is_done else "writing", message) | {"run": recording.id}
            # A page that loses its connection begins anew with what its browser has kept.
            is_due = is_done or now - kept_at > KEEP_S
            kept_at = now if is_due else kept_at
            kept_now = kept_history([*messages, answered], asked.held, is_cut=not is_done) if is_due else gr.skip()
            yield chat, frame, recording.id if is_done else gr.skip(), gr.skip(), kept_now
        if not recording.steps:
            yield NEVER_BEGUN


def kept_history(messages: History, held: str, *, is_cut: bool = False) -> Any:
    """What the browser is to keep of a conversation; nothing new where the settings are none. is_cut: as far as its
    answer has come."""
    with contextlib.suppress(ValueError):
        return {"messages": messages, "settings": read(held).to_json(), "isCut": is_cut}
    return gr.skip()


def refusal(error: ValueError) -> dict:
    """Says why where the visitor looks; no gr.Error, which would cover the panels."""
    text = str(error) if len(str(error)) <= MAX_WORDS else f"{str(error)[:MAX_WORDS]}…"
    gr.Warning(html.escape(text))  # Gradio takes it for HTML
    return notice("error", text)


def _ending(summary: RunSummary | None) -> str:
    return "" if summary is None else ENDINGS[summary.finish_reason]
