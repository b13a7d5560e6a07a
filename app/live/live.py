"""The live panels' frames: a small JSON projection of an answer's newest step, and the component that draws it.

Owns the frame's form, which `*.js` beside it reads. Strings that grow (tokens, origins) cost only what is new, because
Gradio sends differences. Knows nothing of the engine: it sees StepTraces.
"""

from __future__ import annotations

import base64
import math
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradio as gr

from moespec import StepTrace
from moespec.trace import LayerTrace

SEPARATOR = "\x1f"  # between tokens; taken out of their text
ORIGINS = "0123456789abcdefg"  # one character per token: 0 is the target's own, else the depth of the accepted draft
NATURAL, KEPT, ACTIVE = 1, 2, 4
LEAST_P = 1e-6  # a trace has six digits
MASS_STEPS = (1 << 13) - 1  # a cell is 13 bits of mass share and 3 bits of state
_FOLDER = Path(__file__).parent
_SCRIPTS = ("draw.js", "tree.js", "layers.js", "live.js")


def live_panels() -> gr.HTML:
    """The component. Its template is constant: model text reaches the page through the script's `textContent` alone."""
    return gr.HTML(
        value=notice("idle"),
        html_template=(_FOLDER / "live.html").read_text(encoding="utf-8"),
        css_template=(_FOLDER / "live.css").read_text(encoding="utf-8"),
        js_on_load="\n".join((_FOLDER / name).read_text(encoding="utf-8") for name in _SCRIPTS),
        apply_default_css=False,
        elem_id="live",
    )


def notice(status: str, message: str = "") -> dict[str, Any]:
    """A frame without a step: "idle", "waiting", "error" or "done", and a sentence for the visitor."""
    return {"status": status, "message": message}


class LiveRun:
    """One answer as the panels see it: its tokens so far, its running means, its newest step."""

    def __init__(self, piece: Callable[[int], str], num_experts: int) -> None:
        self._piece, self._num_experts = piece, num_experts
        self._tokens, self._origins = "", ""
        self._num_tokens = self._num_steps = self._num_accepted = 0
        self._engine_ms = 0.0  # the page's own work between two steps is not the method's
        self._drawn: StepTrace | None = None
        self._by_tree_step: dict[str, list[float]] = {"natural": [], "active": [], "mass": []}

    def frame(self, steps: list[StepTrace], message: str = "") -> dict[str, Any]:
        """The frame after these further steps."""
        for step in steps:
            self._add(step)
        newest = steps[-1]
        done = newest.summary is not None
        trees = [step for step in steps if step.kind == "tree"]
        # The last token of an answer often needs no tree: what stays on the page is the last step that had one.
        drawn = self._drawn = trees[-1] if trees else self._drawn if done and self._drawn else newest
        return {
            "status": "done" if done else "writing",
            "message": message,
            "tokens": self._tokens,
            "origins": self._origins,
            "figures": self._figures(newest),
            "settings": {
                "budget": drawn.settings.effective_budget,
                "coverage": drawn.settings.coverage,
                "policy": drawn.settings.policy,
            },
            "tree": _tree(drawn),
            "layers": _layers(drawn.layers, self._num_experts),
        }

    def _add(self, step: StepTrace) -> None:
        for token, origin in zip(step.token_ids, step.origins, strict=True):
            self._tokens += self._piece(token).replace(SEPARATOR, "") + SEPARATOR
            self._origins += ORIGINS[origin]
        if step.kind == "prefill":
            return
        self._num_tokens += len(step.token_ids)
        self._num_accepted += sum(origin > 0 for origin in step.origins)
        self._num_steps += 1
        self._engine_ms += step.draft_ms + step.verify_ms + step.other_ms
        if step.kind == "tree":
            for name in ("natural", "active"):
                by_layer = getattr(step, f"experts_{name}")
                self._by_tree_step[name].append(sum(by_layer) / len(by_layer))
            self._by_tree_step["mass"].append(step.mass_kept)

    def _figures(self, newest: StepTrace) -> dict[str, Any]:
        means = {name: _mean(values) for name, values in self._by_tree_step.items()}
        return {
            "step": newest.step,
            "tokens_per_s": _rounded(1e3 * self._num_tokens / self._engine_ms, 1) if self._engine_ms else None,
            "accepted": _rounded(self._num_accepted / self._num_steps, 2) if self._num_steps else None,
            "natural": _rounded(means["natural"], 1),
            "active": _rounded(means["active"], 1),
            "mass": _rounded(means["mass"], 3),
            "lossless": newest.lossless,
        }


def _tree(step: StepTrace) -> dict[str, Any] | None:
    if step.tree is None:
        return None
    tree = step.tree
    return {
        "pieces": tree.pieces,
        "parents": tree.parents,
        "depths": tree.depths,
        "draft_logp": [round(math.log(max(p, LEAST_P)), 2) for p in tree.draft_p],
        "accepted": [int(yes) for yes in tree.accepted],
        "missing": tree.missing,
    }


def _layers(layers: list[LayerTrace], num_experts: int) -> dict[str, Any] | None:
    """Every (layer, expert) as 16 bits: its share of the layer's router mass, and natural / kept / active."""
    if not layers:
        return None
    cells: list[int] = []
    for layer in layers:
        total = sum(layer.score) or 1.0
        state = [0] * num_experts
        for bit, members in ((NATURAL, layer.natural), (KEPT, layer.kept), (ACTIVE, layer.active)):
            for expert in members:
                state[expert] |= bit
        cells += [round(score / total * MASS_STEPS) << 3 | bits for score, bits in zip(layer.score, state, strict=True)]
    return {
        "numbers": [layer.layer for layer in layers],
        "num_experts": num_experts,
        "cells": base64.b64encode(struct.pack(f"<{len(cells)}H", *cells)).decode(),
        "mass_kept": [round(layer.mass_kept, 4) for layer in layers],
    }


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _rounded(value: float | None, digits: int) -> float | None:
    return None if value is None else round(value, digits)
