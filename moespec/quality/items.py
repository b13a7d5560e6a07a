"""Questions that can be scored: the project's own held-out tasks, and benchmark files in their published forms.

Owns the readers and what an item is. Knows nothing of models or of how a reply is scored.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from moespec.quality.tasks import FAMILIES, generate_task

MAX_DRAWS_PER_ITEM = 40  # a small family runs out of new questions


@dataclass(frozen=True)
class Item:
    """One question, and what decides whether a reply is right. `scorer` is a name of `scorers.SCORERS`.

    For code, the program that is run is `prelude`, the reply's code and `checks`, in this order.
    """

    family: str
    name: str
    messages: tuple[dict[str, str], ...]
    scorer: str
    reference: str = ""
    prelude: str = ""
    checks: tuple[str, ...] = ()


def own_items(per_family: int, seed: int) -> list[Item]:
    """Up to `per_family` distinct held-out questions of each family, the same for the same seed."""
    items = []
    for family in FAMILIES:
        rng = random.Random(f"{seed}:{family}")
        seen: set[str] = set()
        for _ in range(per_family * MAX_DRAWS_PER_ITEM):
            task = generate_task(rng, family, held_out=True)
            if task.question not in seen and len(seen) < per_family:
                seen.add(task.question)
                scorer = "code" if task.checks else "exact"
                name = f"{family}-{len(seen) - 1:04}"
                question = {"role": "user", "content": task.question}
                items.append(Item(family, name, (question,), scorer, task.reply, checks=task.checks))
    return items


def file_items(folder: Path, bad_lines: str = "stop") -> list[Item]:
    """All items of the known files in a folder. ValueError names a bad line, unless `bad_lines` is "skip"."""
    found = [folder / name for name in _READERS if (folder / name).is_file()]
    if not found:
        raise ValueError(f"{folder} has none of the known files: {', '.join(_READERS)}.")
    return [item for path in found for item in _items_of(path, bad_lines)]


def _items_of(path: Path, bad_lines: str) -> Iterator[Item]:
    family, read = _READERS[path.name]
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            try:
                yield read(family, f"{family}-{number:04}", json.loads(line))
            except (ValueError, KeyError, TypeError, IndexError) as error:
                if bad_lines == "skip":
                    continue
                what = f"lacks {error}" if isinstance(error, KeyError) else f"cannot be read ({error})"
                raise ValueError(f"{path}, line {number} {what}; --bad-lines skip leaves such lines out.") from error


def _ask(text: str) -> tuple[dict[str, str], ...]:
    if not isinstance(text, str) or not text.strip():
        raise ValueError("no question")
    return ({"role": "user", "content": text.strip()},)


def _needed(text: str, what: str) -> str:
    if not text.strip():
        raise ValueError(f"no {what}")
    return text.strip()


def _gsm8k(family: str, name: str, row: dict) -> Item:
    _, mark, answer = row["answer"].rpartition("####")
    if not mark:
        raise ValueError("no #### before the answer")
    return Item(family, name, _ask(row["question"]), "number", _needed(answer, "answer").replace(",", ""))


def _svamp(family: str, name: str, row: dict) -> Item:
    return Item(family, name, _ask(f"{row['Body']}. {row['Question']}"), "number", f"{float(row['Answer']):g}")


def _math500(family: str, name: str, row: dict) -> Item:
    return Item(family, name, _ask(row["problem"]), "math", _needed(row["answer"], "answer"))


def _humaneval(family: str, name: str, row: dict) -> Item:
    ask = f"Complete this Python function. Answer with the whole function.\n\n{row['prompt']}"
    checks = (_needed(row["test"], "test"), f"check({row['entry_point']})")
    return Item(family, name, _ask(ask), "code", row["entry_point"], row["prompt"], checks)


def _mbpp(family: str, name: str, row: dict) -> Item:
    checks = tuple(row["test_list"])
    if not checks:
        raise ValueError("no tests")
    ask = f"{row['text']}\nYour code should pass these tests:\n" + "\n".join(checks)
    return Item(family, name, _ask(ask), "code", prelude=row.get("test_setup_code", ""), checks=checks)


def _summary(family: str, name: str, row: dict) -> Item:
    ask = f"Summarise this article in three sentences.\n\n{row['article']}"
    return Item(family, name, _ask(ask), "rouge", _needed(row["highlights"], "reference summary"))


def _mt_bench(family: str, name: str, row: dict) -> Item:
    return Item(family, name, _ask(row["turns"][0]), "none")


# File name -> (family, reader of one line).
_READERS: dict[str, tuple[str, Callable[[str, str, dict], Item]]] = {
    "gsm8k_test.jsonl": ("gsm8k", _gsm8k),
    "svamp.jsonl": ("svamp", _svamp),
    "math500.jsonl": ("math-500", _math500),
    "humaneval.jsonl": ("humaneval", _humaneval),
    "mbpp_test_500.jsonl": ("mbpp", _mbpp),
    "cnn_dailymail.jsonl": ("cnn-dailymail", _summary),
    "mt_bench_question.jsonl": ("mt-bench", _mt_bench),
}
