"""What the panels draw, as small JSON: projections of StepTraces. Owns the form that the scripts beside it read.

Pure. What grows with an answer (tokens, their origins, the time line) is text to which every token or step adds a few
characters: a part of an answer is a part of its text. What takes longer to make, for it is made from trees and layers
(the step that is drawn, what is looked at), is made of those steps alone that are asked for.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from moespec import StepTrace
from moespec.trace import LayerTrace, TreeTrace, unpack_ids, unpack_routing

SEPARATOR = "\x1f"  # between tokens; taken out of their text
DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"
MOST = len(DIGITS) ** 2 - 1  # of two digits
NATURAL, KEPT, ACTIVE = 1, 2, 4
LEAST_P = 1e-6  # a trace has six digits
MASS_STEPS = (1 << 13) - 1  # a cell is 13 bits of mass share and 3 bits of state
Frame = dict[str, Any]


def notice(status: str, message: str = "") -> Frame:
    """A frame's status (data-status of the panels) and its sentence for the visitor."""
    return {"status": status, "message": message}


def written(steps: Sequence[StepTrace]) -> Frame:
    """Tokens, their origins (a digit: depth in the draft, or 0) and the time line, as text. Of two parts of an answer,
    one after the other, it is the whole's."""
    pieces = (piece.replace(SEPARATOR, "") + SEPARATOR for step in steps for piece in step.pieces)
    origins = (DIGITS[origin] for step in steps for origin in step.origins)
    return {"tokens": "".join(pieces), "origins": "".join(origins), "series": "".join(map(_series_entry, steps))}


def worth_drawing(steps: Sequence[StepTrace]) -> StepTrace | None:
    """The newest step with a tree. The last token of an answer often needs none: what was drawn before stays."""
    trees = [step for step in steps if step.kind == "tree"]
    return trees[-1] if trees else None if not steps or steps[-1].summary is not None else steps[-1]


def added_frame(first: int, steps: Sequence[StepTrace]) -> Frame:
    """What is new of an answer to panels that know `first` steps of it: as `written`, its text, and the step to draw,
    of which they always have one."""
    drawn = worth_drawing(steps) or (steps[-1] if steps and first == 0 else None)
    about = {"first": first, "is_end": bool(steps) and steps[-1].summary is not None}
    now = {"now": None if drawn is None else step_frame(drawn), "text": "".join(step.text for step in steps)}
    return about | now | written(steps)


def token_facts(step: StepTrace) -> list[str]:
    """Digits per emitted token, of the row that chose it: its depth in the draft or 0, natural experts missing there
    over all layers (2), the drafter's and the target's probability of it (2 each, 0 for unknown), its rank among the
    drafter's guesses (0 for none); then, where any is missing, how many in each layer."""
    tree = step.tree
    if tree is None:
        return [f"{DIGITS[origin]}0000000" for origin in step.origins]
    path = [row for row, accepted in enumerate(tree.accepted) if accepted]
    by_layer = _missing_by_layer(step.layers, [row for row in path if tree.missing[row]], len(tree.parents))
    found = []
    for place, (token, origin) in enumerate(zip(step.token_ids, step.origins, strict=True)):
        row = path[min(place, len(path) - 1)]
        by_target, by_drafter = _find(tree.target_top[row], token), _find(tree.draft_top[row], token)
        node = path[place + 1] if origin and place + 1 < len(path) else None
        draft_p = by_drafter[1] if node is None else tree.draft_p[node]
        target_p = by_target[1] if node is None else tree.target_p[node]
        parts = _two(tree.missing[row]), _probability(draft_p), _probability(target_p)
        found.append(f"{DIGITS[origin]}{''.join(parts)}{DIGITS[by_drafter[0]]}{by_layer.get(row, '')}")
    return found


def _missing_by_layer(layers: list[LayerTrace], rows: list[int], num_rows: int) -> dict[int, str]:
    """By row, a digit per layer: natural experts that were not run. Empty where the trace does not know them."""
    if not (rows and layers and all(layer.natural_ids for layer in layers)):
        return {}
    ran = [unpack_routing(layer, num_rows) for layer in layers]
    ids_LRK, weights_LRK = (np.stack([part[rows] for part in parts]) for parts in zip(*ran, strict=True))
    natural_LRK = np.stack([unpack_ids(layer.natural_ids).reshape(num_rows, -1)[rows] for layer in layers])
    was_run_LRKK = (natural_LRK[..., None] == ids_LRK[..., None, :]) & (weights_LRK != 0)[..., None, :]
    missing_RL = (~was_run_LRKK.any(-1)).sum(-1).T.clip(max=len(DIGITS) - 1)
    return {row: "".join(DIGITS[count] for count in counts) for row, counts in zip(rows, missing_RL, strict=True)}


def _find(alternatives: list[list], token: int) -> tuple[int, float | None]:
    """(rank from 1, or 0; probability, or None)"""
    return next(((n, p) for n, (other, _, p) in enumerate(alternatives, start=1) if other == token), (0, None))


def _two(number: int) -> str:
    number = min(max(number, 0), MOST)
    return DIGITS[number // len(DIGITS)] + DIGITS[number % len(DIGITS)]


def _probability(p: float | None) -> str:
    return "00" if p is None else _two(1 + round(p * (MOST - 1)))


def _series_entry(step: StepTrace) -> str:
    """One step of the time line, its numbers in the order in which `run.js` names them."""
    natural, active = (_mean(experts) for experts in (step.experts_natural, step.experts_active))
    budget = step.settings.effective_budget
    parts = (
        step.kind[:2],
        *(len(step.token_ids), step.num_accepted, f"{natural:.1f}", f"{active:.1f}", f"{step.mass_kept:.3f}"),
        *(f"{ms:.2f}" for ms in (step.draft_ms, step.verify_ms, step.other_ms)),
        *("" if budget is None else budget, int(step.lossless)),
    )
    return ",".join(map(str, parts)) + ";"


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def step_frame(step: StepTrace) -> Frame:
    """The tree and the layers of one step, and what was asked of it."""
    settings = step.settings
    return {
        "step": step.step,
        "settings": {
            "budget": settings.effective_budget,
            "coverage": settings.coverage,
            "policy": settings.policy,
            "tree": settings.tree,
        },
        "tree": None if step.tree is None else _tree(step.tree),
        "layers": _layers(step.layers, 1 if step.tree is None else len(step.tree.parents)),
    }


def detailed_frame(step: StepTrace) -> Frame:
    """The same with what a selected node or expert shows: alternatives, and every row's routing."""
    frame = step_frame(step)
    if step.tree is not None and step.layers:
        tops = {"target_top": _named(step.tree.target_top), "draft_top": _named(step.tree.draft_top)}
        frame["details"] = tops | {"target_p": step.tree.target_p} | _routing(step.layers, len(step.tree.parents))
    return frame


def _named(alternatives: list[list[list]]) -> list[list[list]]:
    return [[[piece, round(p, 4)] for _, piece, p in one] for one in alternatives]


def _tree(tree: TreeTrace) -> Frame:
    """As text, shorter than lists. nodes: parent, log-probability given it, whether accepted, experts missing."""
    logp = (f"{math.log(max(p, LEAST_P)):.2f}" for p in tree.draft_p)
    nodes = zip(tree.parents, logp, map(int, tree.accepted), tree.missing, strict=True)
    return {
        "pieces": "".join(piece.replace(SEPARATOR, "") + SEPARATOR for piece in tree.pieces),
        "nodes": ";".join(",".join(map(str, node)) for node in nodes),
    }


def _layers(layers: list[LayerTrace], num_rows: int) -> Frame | None:
    """Every (layer, expert) as 16 bits: its share of the layer's router mass, and natural / kept / active."""
    if not layers:
        return None
    score_LE = np.array([layer.score for layer in layers])
    state_LE = np.zeros(score_LE.shape, int)
    for state_E, layer in zip(state_LE, layers, strict=True):
        for bit, members in ((NATURAL, layer.natural), (KEPT, layer.kept), (ACTIVE, layer.active)):
            state_E[members] |= bit
    share_LE = score_LE / np.maximum(score_LE.sum(axis=1, keepdims=True), LEAST_P)
    return {
        "numbers": ",".join(str(layer.layer) for layer in layers),
        "num_experts": score_LE.shape[1],
        "top_k": len(unpack_ids(layers[0].ids)) // num_rows,
        "cells": _packed("H", np.rint(share_LE * MASS_STEPS).astype(int) << 3 | state_LE),
        "mass_kept": ",".join(f"{layer.mass_kept:.4f}" for layer in layers),
    }


def _routing(layers: list[LayerTrace], num_rows: int) -> Frame:
    """[L, T, K] as they lie: what was run (ids, weights in 255ths), and what the router had chosen ("" if unknown)."""
    ids, weights = zip(*(unpack_routing(layer, num_rows) for layer in layers), strict=True)
    # Weights that are not renormalised may exceed 1, and one that is used is never drawn as none.
    parts = [np.where(one != 0, np.rint(255 * one.astype(float)).clip(1, 255), 0) for one in weights]
    return {
        "ids": _packed("H", np.stack(ids)),
        "weights": _packed("B", np.stack(parts)),
        "natural": _packed("H", np.concatenate([unpack_ids(layer.natural_ids) for layer in layers])),
    }


class Sums:
    """The layers over an answer's tree steps: mean share of mass, and how often an expert was asked for and read."""

    def __init__(self) -> None:
        self.num_seen = self._num_trees = 0  # all steps, and those with a tree

    def extend(self, steps: Sequence[StepTrace]) -> None:
        """Those after the `num_seen` that were seen."""
        for step in steps:
            self.num_seen += 1
            if step.kind != "tree":
                continue
            shape = len(step.layers), len(step.layers[0].score)
            if not self._num_trees:
                self._mass_LE, self._natural_LE, self._active_LE = (np.zeros(shape) for _ in range(3))
            self._num_trees += 1
            score_LE = np.array([layer.score for layer in step.layers])
            self._mass_LE += score_LE / np.maximum(score_LE.sum(axis=1, keepdims=True), LEAST_P)
            for row, layer in enumerate(step.layers):
                self._natural_LE[row, layer.natural] += 1
                self._active_LE[row, layer.active] += 1

    def to_json(self) -> Frame | None:
        """Mass in 65535ths, shares of the steps in 255ths; None before the first tree."""
        if not self._num_trees:
            return None
        return {
            "num_steps": self._num_trees,
            "mass": _packed("H", self._in_parts(self._mass_LE, 65535)),
            "natural": _packed("B", self._in_parts(self._natural_LE, 255)),
            "active": _packed("B", self._in_parts(self._active_LE, 255)),
        }

    def _in_parts(self, sums_LE: np.ndarray, num_parts: int) -> np.ndarray:
        return np.rint(sums_LE / self._num_trees * num_parts).clip(0, num_parts)


def _packed(code: str, values: np.ndarray) -> str:
    return base64.b64encode(values.astype(f"<{code}").tobytes()).decode()
