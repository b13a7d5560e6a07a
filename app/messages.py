"""Messages as Gradio's chat shows them, and back. Owns what keeps their text from ever being markup."""

from __future__ import annotations

import html
import re
from typing import Any

History = list[dict[str, Any]]
JOINT = "\u2060"  # of no width


def shown(messages: History, markdown: bool = False) -> History:
    """Messages as the chat shows them: as text, for it renders HTML even without Markdown, and in parts, for it takes
    the indentation off what is not."""
    made = _harmless if markdown else _escaped
    return [message | {"content": [{"type": "text", "text": made(message["content"])}]} for message in messages]


def _escaped(text: str) -> str:
    # A chat that is told to show Markdown may do so before it is told the new text.
    return html.escape(text, quote=False).replace("![", f"!{JOINT}[")


def _harmless(text: str) -> str:
    """Markdown without tags, entities and pictures, which could ask other hosts for something: a joint that is not seen
    stands where one would begin. In code, too, where an escape would be shown."""
    return re.sub(r"<(?=[A-Za-z/!?])|&(?=[A-Za-z#])|!(?=\[)", lambda found: found[0] + JOINT, text)


def plain(history: History) -> History:
    """Gradio's messages as role and text: the inverse of `shown`."""
    messages = []
    for message in history:
        content = message["content"]
        text = content if isinstance(content, str) else "".join(part.get("text", "") for part in content)
        messages.append({"role": message["role"], "content": html.unescape(text).replace(JOINT, "")})
    return messages
