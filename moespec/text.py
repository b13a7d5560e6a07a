"""Token ids to text, piece by piece: joined pieces equal the final text, whatever a token boundary splits.

Owns the held-back bytes of a split UTF-8 character and of a possible stop string. Knows nothing of engines.
"""

from __future__ import annotations

from typing import Any

REPLACEMENT = "\ufffd"  # what a decoder shows for the start of a character whose other bytes are still to come
CONTEXT_TOKENS = 8  # at least so many are decoded again with each piece: some write a token by what stands before it


class TextStream:
    """Feed token ids with `push`; `finish` gives what is held back. `stopped`: a stop string came."""

    def __init__(self, tokenizer: Any, stop: tuple[str, ...] = ()) -> None:
        self._tokenizer = tokenizer
        self._stop = stop
        self._ids: list[int] = []
        self._start = 0  # the first id that is decoded again
        self._known = ""  # the text from there that is in `_held` or was emitted
        self._held = ""  # decoded, not emitted: may be the beginning of a stop string
        self.stopped = False

    def push(self, token_ids: list[int]) -> tuple[str, int]:
        """(the text that is certain after these tokens, how many were read): those behind a stop string are not.

        The text is empty while something is held back. Without stop strings the tokens are decoded in one go.
        """
        if not self._stop:
            self._ids += token_ids
            return self._certain(), len(token_ids)
        text, num_read = "", 0
        while num_read < len(token_ids) and not self.stopped:
            self._ids.append(token_ids[num_read])
            num_read += 1
            text += self._certain()
        return text, num_read

    def _certain(self) -> str:
        if self._tokenizer is None:
            return ""
        text = self._decode(self._ids[self._start :])
        # A split character waits for its other bytes.
        return "" if text.endswith(REPLACEMENT) else self._release(self._learn(text))

    def finish(self) -> str:
        """Everything still held back, except from a stop string on."""
        if self._tokenizer is None or self.stopped:
            return ""
        return self._release(self._learn(self._decode(self._ids[self._start :])), final=True)

    def _learn(self, text: str) -> str:
        """What is new in the text from `_start` on."""
        piece, self._known = text[len(self._known) :], text
        if len(self._ids) - self._start > 2 * CONTEXT_TOKENS:
            self._start = len(self._ids) - CONTEXT_TOKENS
            self._known = self._decode(self._ids[self._start :])
        return piece

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _release(self, piece: str, final: bool = False) -> str:
        text = self._held + piece
        found = [position for position in (text.find(stop) for stop in self._stop) if position >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        keep = 0 if final else max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest proper beginning of `stop` that `text` ends with."""
    return next((size for size in range(len(stop) - 1, 0, -1) if text.endswith(stop[:size])), 0)
