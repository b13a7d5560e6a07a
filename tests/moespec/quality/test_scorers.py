"""Known right and known wrong replies for every kind of answer, and the readers of benchmark files."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path

import pytest

from moespec.quality.items import Item, file_items, own_items
from moespec.quality.scorers import score
from moespec.quality.tasks import FAMILIES, generate_task
from moespec.quality.trials import TEXTS
from moespec.train.prepare import is_held_out


def item(scorer: str, reference: str = "", prelude: str = "", checks: tuple[str, ...] = ()) -> Item:
    return Item("family", "name", ({"role": "user", "content": "?"},), scorer, reference, prelude, checks)


@pytest.mark.parametrize(
    ("scorer", "reference", "right", "wrong"),
    [
        ("exact", "12 + 30 = 42", "12 + 30 = 42\n", "12 + 30 = 43"),
        ("exact", "42", " 42 ", "420"),
        ("number", "18", "She makes 9 * 2 = $18 every day.", "18 ducks, so the answer is 19."),
        ("number", "1234", "The answer is 1,234.", "The answer is 1,235."),
        ("number", "2.5", "It is 2.50", "It is 2.05"),
        ("number", "-3", "The answer is -3.", "The answer is 3."),
        ("number", "7", "7", "no number at all"),
        ("math", r"\frac{3}{4}", r"So it is \boxed{\dfrac34}.", r"So it is \boxed{\frac{4}{3}}."),
        ("math", r"\left( 3, \frac{\pi}{2} \right)", r"\boxed{(3,\frac{\pi}{2})}", r"\boxed{(3,\pi)}"),
        ("math", "11", r"First \boxed{10}, no: \boxed{11}", r"First \boxed{11}, no: \boxed{10}"),
        ("math", r"x^{2}", r"\boxed{x^{2}}", r"\boxed{x^{2}"),
        ("math", "5", "The answer is 5.", "The answer is 6."),
    ],
)
def test_right_and_wrong_replies(scorer, reference, right, wrong):
    assert score(item(scorer, reference), right) == 1
    assert score(item(scorer, reference), wrong) == 0


def test_code_is_right_when_its_checks_pass():
    asked = item("code", checks=("assert add(1, 2) == 3",))
    assert score(asked, "def add(a, b):\n    return a + b") == 1
    assert score(asked, "Here it is:\n```python\ndef add(a, b):\n    return a + b\n```\nGood luck!") == 1
    assert score(asked, "def add(a, b):\n    return a - b") == 0
    assert score(asked, "I cannot do that.") == 0
    assert score(asked, "def add(a, b):\n    return a + b\nexit()") == 0


def test_a_completion_and_a_whole_function_both_count():
    prompt = 'import math\n\ndef root(x):\n    """The integer root."""\n'
    asked = item("code", "root", prompt, ("def check(f):\n    assert f(17) == 4", "check(root)"))
    assert score(asked, "    return math.isqrt(x)\n") == 1
    assert score(asked, "```python\ndef root(x):\n    return math.isqrt(x)\n```") == 1
    assert score(asked, "    return x\n") == 0


def test_load_has_no_score():
    assert score(item("none"), "anything") is None


@pytest.mark.parametrize("family", FAMILIES)
def test_own_references_are_right_and_other_answers_wrong(family):
    asked = [one for one in own_items(12, seed=3) if one.family == family]
    assert len({one.messages[0]["content"] for one in asked}) == len(asked) > 3
    for one, other in itertools.pairwise(asked[:5]):
        reference = one.reference
        assert score(one, reference) == 1
        if other.reference != reference:
            assert score(one, other.reference) == 0


def test_questions_and_texts_are_ones_that_training_never_sees():
    """By operands for tasks, by hash for documents. Definitions ask for what was learnt: they have no operands."""
    questions = {one.messages[0]["content"] for one in own_items(30, seed=0) if one.family != "definitions"}
    rng = random.Random(0)
    assert questions.isdisjoint(generate_task(rng).question for _ in range(20_000))
    documents = [json.loads(line) for line in TEXTS.read_text(encoding="utf-8").splitlines()]
    assert all(is_held_out(document) for document in documents if document["group"] != "tasks")
    with_operands = [d for d in documents if d["group"] == "tasks" and d["source"] != "task: definitions"]
    assert {d["messages"][0]["content"] for d in with_operands}.isdisjoint(
        generate_task(rng).question for _ in range(20_000)
    )


GSM8K = {"question": "How many?", "answer": "1 + 1 = 2\n#### 2"}


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("{not json", "line 2 cannot be read"),
        ('{"answer": "#### 3"}', "line 2 lacks 'question'"),
        ('{"question": "?", "answer": "3"}', "no ####"),
        ('{"question": "?", "answer": "#### "}', "no answer"),
    ],
)
def test_a_bad_line_is_named_or_skipped(tmp_path: Path, line: str, what: str):
    (tmp_path / "gsm8k_test.jsonl").write_text(f"{json.dumps(GSM8K)}\n{line}\n{json.dumps(GSM8K)}\n")
    with pytest.raises(ValueError, match=what):
        file_items(tmp_path)
    assert [one.name for one in file_items(tmp_path, "skip")] == ["gsm8k-0001", "gsm8k-0003"]


def test_a_folder_without_known_files_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="none of the known files"):
        file_items(tmp_path)


def test_published_forms_are_read(tmp_path: Path):
    rows = {
        "humaneval.jsonl": {
            "prompt": "def one():\n",
            "test": "def check(f):\n    assert f() == 1",
            "entry_point": "one",
        },
        "mbpp_test_500.jsonl": {"text": "Return two.", "test_list": ["assert two() == 2"], "test_setup_code": ""},
        "math500.jsonl": {"problem": "1 + 1?", "answer": "2"},
        "svamp.jsonl": {"Body": "Two dvds", "Question": "How many?", "Answer": 2.0},
        "mt_bench_question.jsonl": {"turns": ["Write.", "Again."]},
    }
    for name, row in rows.items():
        (tmp_path / name).write_text(json.dumps(row) + "\n")
    by_family = {one.family: one for one in file_items(tmp_path)}
    assert score(by_family["humaneval"], "    return 1") == 1
    assert score(by_family["mbpp"], "def two():\n    return 2") == 1
    assert score(by_family["math-500"], r"\boxed{2}") == 1
    assert score(by_family["svamp"], "2 dvds") == 1
    assert score(by_family["mt-bench"], "Anything.") is None
