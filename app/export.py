"""An answer taken away: as a trace (JSON lines), or as one file that replays it in any browser, offline.

Owns the two forms. The page is the live component itself with its data inside; no text in it is ever markup.
"""

from __future__ import annotations

import json
from typing import Any

from app.live.frames import Sums, detailed_frame, token_facts
from app.live.live import opened, read_part, script
from app.recordings import Recording
from moespec.trace import trace_lines

# What Gradio's theme gives the component on the page.
_COLOURS = """
:root { --body-text-color: #1f2937; --body-text-color-subdued: #52606d; --background-fill-primary: #fff;
  --border-color-primary: #cbd5e1; --color-accent: #0d9488; --font-mono: ui-monospace, "DejaVu Sans Mono", monospace; }
@media (prefers-color-scheme: dark) { :root { --body-text-color: #e5e7eb; --body-text-color-subdued: #a3b0bf;
  --background-fill-primary: #0b1220; --border-color-primary: #3b4a5e; --color-accent: #2dd4bf; } }
body { margin: 16px auto; max-width: 860px; padding: 0 12px; font: 14px system-ui, sans-serif;
  color: var(--body-text-color); background: var(--background-fill-primary); }
h1 { font-size: 18px; margin: 0; } .about { color: var(--body-text-color-subdued); font-size: 12px; }
"""
_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>MoE-Spec Studio: a recorded answer</title><style>{style}</style></head>
<body><h1>A recorded answer</h1><p class="about"></p><main>{body}</main>
<script type="application/json" id="data">{data}</script>
<script>
const data = JSON.parse(document.getElementById("data").textContent);
document.querySelector(".about").textContent = data.about;
const server = {{
  recorded_steps: async ({{ first, last }}) => data.steps.slice(first, last),
  recorded_facts: async ({{ first, last }}) => data.facts.slice(first, last).flat(),
  recorded_so_far: async ({{ last }}) => data.soFar[Math.min(last, data.soFar.length) - 1],
}};
{script}
moeSpecPanels(document.querySelector("main"), {{ value: data.value }}, server, () => {{}}, () => {{}});
</script></body></html>
"""


def trace_file(recording: Recording) -> str:
    """The text of a trace file."""
    return "".join(trace_lines(recording.header, recording.steps))


def replay_page(recording: Recording) -> str:
    """A page that needs nothing else. ValueError where there is no step yet."""
    if not recording.steps:
        raise ValueError("There is nothing to export yet: wait for the first step.")
    sums, so_far = Sums(), []
    for step in recording.steps:
        sums.extend([step])
        so_far.append(sums.to_json())
    data: dict[str, Any] = {
        "value": opened(recording, "recorded", f"Asked: {recording.question}", "recorded"),
        "about": _about(recording),
        "steps": [detailed_frame(step) for step in recording.steps],
        "facts": [token_facts(step) for step in recording.steps],
        "soFar": so_far,
    }
    # Inside a script element "<" alone could end it.
    text = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    style, body = _COLOURS + read_part("live.css"), read_part("live.html")
    return _PAGE.format(style=style, body=body, data=text, script=script())


def _about(recording: Recording) -> str:
    header = recording.header
    device, model = header.device, header.model
    drafter = (header.drafter or {}).get("name", "none")
    return (
        f"{model.get('name')}, {model.get('num_experts')} experts, top-{model.get('top_k')} · drafter {drafter} · "
        f"measured on {device.get('name')}, {device.get('dtype')}, {device.get('backend')} · seed {header.seed}"
    )
