"""The project's own verifiable tasks: twelve seedable families, each with an exact answer.

Owns the list of families and the split. A task whose operands hash to the held-out side never enters training.
"""

from __future__ import annotations

import random

from moespec.quality.tasks import numbers, texts
from moespec.quality.tasks.base import Task, TaskMaker

_MAKERS: dict[str, TaskMaker] = {
    "arithmetic": numbers.arithmetic,
    "lists": numbers.lists,
    "units": numbers.units,
    "dates": numbers.dates,
    "word problems": numbers.word_problems,
    "counting": texts.counting,
    "letters": texts.letters,
    "json": texts.to_json,
    "tables": texts.tables,
    "copy-edit": texts.copy_edit,
    "functions": texts.functions,
    "definitions": texts.definitions,
}
FAMILIES = tuple(_MAKERS)


def generate_task(rng: random.Random, family: str | None = None, held_out: bool = False) -> Task:
    """A task of the family (or any), on the asked side of the split. ValueError for an unknown family."""
    if family is not None and family not in _MAKERS:
        raise ValueError(f"family={family!r} is not one of {', '.join(FAMILIES)}.")
    make = _MAKERS[family or rng.choice(FAMILIES)]
    while True:
        task = make(rng)
        if task.is_held_out == held_out:
            return task


__all__ = ["FAMILIES", "Task", "generate_task"]
