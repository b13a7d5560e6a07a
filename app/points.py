"""A table whose rows are settings that can be loaded, and the line that says what came of it.

Owns how their files become a gr.HTML. The table is a figure's text alternative, and the figure's points load what its
rows do. Templates are constant: text reaches the page through `textContent` alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr

_FOLDER = Path(__file__).parent
# The bar keeps its room while it is hidden.
_SAID_CSS = """
.said p { margin: 0; min-height: 18px; font-size: 12px; overflow-wrap: anywhere; white-space: pre-line; }
.said progress { appearance: none; width: 100%; height: 4px; border: 0; background: var(--border-color-primary); }
.said progress::-webkit-progress-bar { background: var(--border-color-primary); }
.said progress::-webkit-progress-value { background: var(--color-accent); }
.said progress::-moz-progress-bar { background: var(--color-accent); }
.said progress[hidden] { display: block; visibility: hidden; }
"""
_SAID_JS = """
const line = element.querySelector("p"), bar = element.querySelector("progress");
function say() {
  const { message, done, total } = props.value || {};
  if (line.textContent !== (message || "")) line.textContent = message || "";
  bar.hidden = !total;
  if (total) { bar.max = total; bar.value = done; }
}
say();
watch("value", say);
"""
EMPTY: dict[str, Any] = {"caption": "", "columns": [], "rows": []}


def points_table(elem_id: str, *, plot: str = "", empty: str = "") -> gr.HTML:
    """Its value: {caption, columns, rows}; a row is {name, cells, settings?}, a cell a text or {text, low, at, high},
    shares of a scale on which it is drawn.

    Event `chosen`, with {settings}: a row's button, or a point of the gr.Plot with the elem_id `plot`, whose customdata
    are settings as JSON. empty: what will stand there.
    """
    return gr.HTML(
        value=EMPTY,
        html_template='<div class="points"><p class="points-empty"></p>'
        '<div class="points-room" role="region" tabindex="0"><table></table></div></div>',
        css_template=(_FOLDER / "points.css").read_text(encoding="utf-8"),
        js_on_load=(_FOLDER / "points.js").read_text(encoding="utf-8"),
        apply_default_css=False,
        elem_id=elem_id,
        plot=plot,
        empty=empty,
    )


def said_line(elem_id: str, message: str = "") -> gr.HTML:
    """A line that is read out when it changes: {message, done, total}; a bar where there is a total."""
    return gr.HTML(
        value=said(message),
        html_template='<div class="said"><p role="status"></p><progress hidden aria-label="done"></progress></div>',
        css_template=_SAID_CSS,
        js_on_load=_SAID_JS,
        apply_default_css=False,
        elem_id=elem_id,
    )


def said(message: str, done: int = 0, total: int = 0) -> dict[str, Any]:
    """What `said_line` shows."""
    return {"message": message, "done": done, "total": total}
