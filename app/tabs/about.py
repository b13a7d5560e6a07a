"""The About tab: the method in one minute in the panels' own drawings, where each part of it is, what may be trusted.

Tables and cards are read from README.md and the cards of the model and the head: nothing is said twice.
"""

from __future__ import annotations

import re
from pathlib import Path

import gradio as gr

from app.live import live_panels, opened
from app.recordings import Recording, Recordings
from moespec import StepTrace

ROOT = Path(__file__).resolve().parent.parent.parent
PARTS = (
    (
        "tree",
        "## 1 · Guess\nA small drafter proposes a **tree** of what may come next: it costs little. Then the model "
        "checks the whole tree in *one* pass, where it would have needed one pass for each token. From the root on, "
        "guesses that equal its own choice are **accepted**; the first that does not is replaced by its own.",
    ),
    (
        "heat",
        "## 2 · What the pass costs\nIn a Mixture-of-Experts every token asks each layer for a few **experts**. One "
        "token reads 8 of 64 here; a tree of guesses asks for 25 to 35, and reading their weights *is* what a pass "
        "costs. So guessing more makes each pass dearer: that is why speculation backfires on these models.",
    ),
    (
        "tail",
        "## 3 · The budget\nMost of what the tree asks for hangs on a few experts; a long **tail** gets hardly any "
        "router probability. MoE-Spec adds up the probability that each expert gets over the tree, keeps the **B** "
        "with the most, and drops the rest for this one pass. No training. A little quality for speed.",
    ),
)
LOSSY = """## What is lossy, and what is not
- **No budget: lossless.** The text is the model's own, token for token, whatever the drafter guesses and whatever the
  tree.  The tests hold it against `transformers`' own `generate`; at a temperature, against its distribution.
- **A budget: lossy**, and said so in the panels, in every step of a trace and in the API: from the first step whose
  routing changed to the end of the conversation that reuses it.
- **Never budgeted:** the prompt, steps of one row, shared experts, dense layers, the drafter.
- **Measured or modelled.** What is shown beside an answer was measured while it was written. What is computed from a
  model of the hardware is called *modelled*, what others published *reported*.
"""


def build(recordings: Recordings, example: Recording) -> None:
    """example: the recording whose step illustrates the method: the one in which most guesses were rejected."""
    at = max(range(len(example.steps)), key=lambda number: _num_rejected(example.steps[number]))
    value = opened(example, "still", "", "recorded") | {"at": at}
    for part, text in PARTS:
        with gr.Row(elem_classes="about-part"):
            gr.Markdown(text)
            live_panels(recordings, f"about-{part}", value, movable=False, only=part)
    gr.Markdown(LOSSY)
    gr.Markdown("## Where it is\n" + paper_to_code((ROOT / "README.md").read_text(encoding="utf-8")))
    for title, folder in (("The model, its data and their licences", "model"), ("The draft head", "drafter")):
        with gr.Accordion(title, open=False):
            gr.Markdown((ROOT / "assets" / folder / "README.md").read_text(encoding="utf-8"))


def _num_rejected(step: StepTrace) -> int:
    return 0 if step.tree is None else len(step.tree.accepted) - sum(step.tree.accepted)


def paper_to_code(readme: str) -> str:
    """README's table of paper item, code and test."""
    found = re.search(r"^\| paper \| code \| test \|\n(?:\|.*\n)+", readme, re.MULTILINE)
    assert found is not None, "README.md has the table"
    return found[0]
