"""Questions that can be scored: the project's own held-out tasks, and benchmark files in their published forms.

Owns the readers and what an item is. Knows nothing of models or of how a reply is scored.
"""

from __future__ import annotations

import json
import random
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from moespec.quality.tasks import FAMILIES, Task, generate_task

MAX_DRAWS_PER_ITEM = 40  # a small family runs out of new questions

_NUMBER = re.compile(r"-?(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d*)?|\.\d+)(?:e[+-]?\d+)?")


@dataclass(frozen=True)
class Item:
    """One question, and what decides whether a reply is right. `scorer` is a name of `scorers.SCORERS`.

    Questions of one `key` ask the same in other words: statistics count them as one. For code, the program that is run
    is `prelude`, the reply's code and `checks`, in this order; `entry_point` names the function that the prelude begins
    and the reply completes or writes anew, if there is one.
    """

    family: str
    name: str
    messages: tuple[dict[str, str], ...]
    scorer: str
    reference: str = ""
    prelude: str = ""
    checks: tuple[str, ...] = ()
    entry_point: str = ""
    key: str = field(kw_only=True)


def own_items(per_family: int, seed: int) -> list[Item]:
    """Up to `per_family` distinct held-out questions of each family, the same for the same seed.

    Names the families with fewer on stderr.
    """
    items, short = [], []
    for family in FAMILIES:
        tasks = _distinct_tasks(family, per_family, random.Random(f"{seed}:{family}"))
        if len(tasks) < per_family:
            short.append(f"{family}: {len(tasks)}")
        items += [_own_item(f"{family}-{index:04}", task) for index, task in enumerate(tasks)]
    if short:
        print(f"{', '.join(short)} questions of {per_family}; there are no more that differ.", file=sys.stderr)
    return items


def _distinct_tasks(family: str, wanted: int, rng: random.Random) -> list[Task]:
    by_question: dict[str, Task] = {}
    for _ in range(wanted * MAX_DRAWS_PER_ITEM):
        if len(by_question) == wanted:
            break
        task = generate_task(rng, family, held_out=True)
        by_question.setdefault(task.question, task)
    return list(by_question.values())


def _own_item(name: str, task: Task) -> Item:
    # A definition's operand is its word; the number in the task's key only decides the split.
    operands = task.answer if task.family == "definitions" else task.key
    scorer = "code" if task.checks else "exact"
    key = f"{task.family}: {operands}"
    return Item(task.family, name, _ask(task.question), scorer, task.reply, checks=task.checks, key=key)


def file_items(folder: Path, bad_lines: str = "stop") -> list[Item]:
    """All items of the known files in a folder. ValueError names a bad line; "skip" names it on stderr and goes on."""
    found = [folder / name for name in _READERS if (folder / name).is_file()]
    if not found:
        raise ValueError(f"{folder} has none of the known files: {', '.join(_READERS)}.")
    return [item for path in found for item in _items_of(path, bad_lines)]


def _items_of(path: Path, bad_lines: str) -> Iterator[Item]:
    family, read = _READERS[path.name]
    with path.open("rb") as file:  # decoded line by line, so that a line of other bytes is one bad line
        for number, line in enumerate(file, start=1):
            try:
                row = json.loads(line.decode("utf-8"))
                if not isinstance(row, dict):
                    raise ValueError("not a JSON object")
                item = read(family, f"{family}-{number:04}", row)
            except (ValueError, KeyError) as error:
                why = f"lacks {error}" if isinstance(error, KeyError) else f"cannot be read ({error})"
                if bad_lines != "skip":
                    raise ValueError(f"{path}, line {number} {why}; --bad-lines skip leaves such lines out.") from error
                print(f"skipped: {path}, line {number}: {why}", file=sys.stderr)
            else:
                yield item


def _ask(text: str) -> tuple[dict[str, str], ...]:
    return ({"role": "user", "content": text.strip()},)


def _text(row: dict, name: str) -> str:
    text = row[name]
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"{name!r} must be a text")
    return text


def _texts(row: dict, name: str) -> tuple[str, ...]:
    texts = row[name]
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) and text.strip() for text in texts):
        raise ValueError(f"{name!r} must be a list of texts")
    return tuple(texts)


def _number(text: str) -> str:
    if not _NUMBER.fullmatch(text):
        raise ValueError(f"the answer {text!r} is not a number")
    return text.replace(",", "")


def _gsm8k(family: str, name: str, row: dict) -> Item:
    _, mark, answer = _text(row, "answer").rpartition("####")
    if not mark:
        raise ValueError("no #### before the answer")
    return Item(family, name, _ask(_text(row, "question")), "number", _number(answer.strip()), key=name)


def _svamp(family: str, name: str, row: dict) -> Item:
    ask = f"{_text(row, 'Body')}. {_text(row, 'Question')}"
    return Item(family, name, _ask(ask), "number", _number(str(row["Answer"]).removesuffix(".0")), key=name)


def _math500(family: str, name: str, row: dict) -> Item:
    return Item(family, name, _ask(_text(row, "problem")), "math", _text(row, "answer").strip(), key=name)


def _humaneval(family: str, name: str, row: dict) -> Item:
    prompt, entry_point = _text(row, "prompt"), _text(row, "entry_point")
    ask = f"Complete this Python function. Answer with the whole function.\n\n{prompt}"
    checks = (_text(row, "test"), f"check({entry_point})")
    return Item(family, name, _ask(ask), "code", prelude=prompt, checks=checks, entry_point=entry_point, key=name)


def _mbpp(family: str, name: str, row: dict) -> Item:
    checks = _texts(row, "test_list")
    ask = f"{_text(row, 'text')}\nYour code should pass these tests:\n" + "\n".join(checks)
    # The setup may use what the reply defines.
    setup = (_text(row, "test_setup_code"),) if row.get("test_setup_code") else ()
    return Item(family, name, _ask(ask), "code", checks=(*setup, *checks), key=name)


def _summary(family: str, name: str, row: dict) -> Item:
    ask = f"Summarise this article in three sentences.\n\n{_text(row, 'article')}"
    return Item(family, name, _ask(ask), "rouge", _text(row, "highlights").strip(), key=name)


def _mt_bench(family: str, name: str, row: dict) -> Item:
    return Item(family, name, _ask(_texts(row, "turns")[0]), "none", key=name)


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
