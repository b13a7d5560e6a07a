"""Known right and known wrong replies for every kind of answer, and the readers of benchmark files."""

from __future__ import annotations

import itertools
import json
import random
import re
from pathlib import Path

import pytest

from moespec.quality import items
from moespec.quality.items import Item, file_items, own_items
from moespec.quality.scorers import score
from moespec.quality.tasks import FAMILIES, Task, generate_task
from moespec.quality.trials import TEXTS
from moespec.train.prepare import is_held_out


def item(scorer: str, reference: str = "", **more) -> Item:
    return Item("family", "name", ({"role": "user", "content": "?"},), scorer, reference, key="key", **more)


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
        ("number", "0.5", "It is .5", "It is 5"),
        ("number", "5", "It is 5.", "It is .5"),
        ("number", "12", "12", "1,2"),
        ("number", "12345", "12,345", "1,2345"),
        ("number", "-3", "It is \N{MINUS SIGN}3.", "It is 3."),
        ("number", "18", "range 1-18", "range 18-1"),
        ("number", "-18", "It is (-18).", "range 1-18"),
        ("number", "9" * 5000, "9" * 5000, "9" * 4999),
        ("math", r"\frac{3}{4}", r"So it is \boxed{\dfrac34}.", r"So it is \boxed{\frac{4}{3}}."),
        ("math", r"\left( 3, \frac{\pi}{2} \right)", r"\boxed{(3,\frac{\pi}{2})}", r"\boxed{(3,\pi)}"),
        ("math", "11", r"First \boxed{10}, no: \boxed{11}", r"First \boxed{11}, no: \boxed{10}"),
        ("math", r"x^{2}", r"\boxed{x^{2}}", r"\boxed{x^{2}"),
        ("math", "5", "The answer is 5.", "The answer is 6."),
        ("math", "18", "The answer is 18, as shown.", "The answer is 81, as shown."),
        ("math", r"\text{even}", r"\boxed{even}", r"\boxed{odd}"),
        ("math", r"\text{Evelyn}", r"\boxed{Evelyn}", r"\boxed{\text{Carla}}"),
        ("math", r"5.4 \text{ cents}", r"\boxed{5.4}", r"\boxed{\text{cents}}"),
        ("math", r"864 \mbox{ inches}^2", r"\boxed{864 \text{ inches}^2}", r"\boxed{864^2}"),
        ("math", r"\frac{270}7\text{ degrees}", r"\boxed{\frac{270}{7}^\circ}", r"\boxed{\frac{27}{7}}"),
        ("math", r"12\pi", r"\boxed{12\pi \text{ cm}}", r"\boxed{12 \text{ cm}}"),
        ("math", r"2 \text{ or } 3", r"\boxed{2\text{ or }3}", r"\boxed{23}"),
        ("math", r"\$18.90", r"\boxed{18.90}", r"\boxed{1890}"),
        ("math", "58,500", r"\boxed{58500}", r"\boxed{58,50}"),
        ("math", "58500", r"\boxed{58{,}500}", r"\boxed{58,501}"),
        ("math", r"11,\! 111,\! 111,\! 100", r"\boxed{11111111100}", r"\boxed{11111111101}"),
        ("math", r"\$32,\!348", "So $32,348.", "So $32,349."),
        ("math", "100, 200", r"\boxed{100, 200}", r"\boxed{100200}"),
        ("math", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\boxed{\begin{pmatrix}1\\2\end{pmatrix}}", r"\boxed{12}"),
        ("math", ".35625", r"\boxed{0.35625}", r"\boxed{35625}"),
        ("math", "-2", "\\boxed{\N{MINUS SIGN}2}", r"\boxed{2}"),
    ],
)
def test_right_and_wrong_replies(scorer, reference, right, wrong):
    assert score(item(scorer, reference), right) == 1
    assert score(item(scorer, reference), wrong) == 0


@pytest.mark.parametrize(
    "reference",
    [
        r"\text{east}",
        r"\text{even}",
        r"\text{ellipse}",
        r"\text{}",
        "$",
        r"\$36",
        r"90^\circ",
        r"5 \text{ cm}",
        "0",
        r"\%",
    ],
)
def test_an_empty_answer_never_scores(reference):
    for reply in ("", " \n", r"\boxed{}", r"\boxed{ \text{ } }", r"\boxed{\$}", "I do not know."):
        assert score(item("math", reference), reply) == 0


def test_a_summary_scores_by_what_it_shares_with_the_reference():
    asked = item("rouge", "The river flooded the old town on Monday night.")
    half = score(asked, "The river flooded a village in the north last year.")
    assert score(asked, asked.reference) == 1
    assert score(asked, "Quarterly profits rose again, said analysts.") < 0.1
    assert 0.2 < half < 0.8
    assert score(asked, "") == 0


def test_code_is_right_when_its_checks_pass():
    asked = item("code", checks=("assert add(1, 2) == 3",))
    assert score(asked, "def add(a, b):\n    return a + b") == 1
    assert score(asked, "Here it is:\n```python\ndef add(a, b):\n    return a + b\n```\nGood luck!") == 1
    assert score(asked, "```python \ndef add(a, b):\n    return a + b\n```") == 1
    assert score(asked, "``` \ndef add(a, b):\n    return a + b\n```") == 1
    assert score(asked, "def add(a, b):\n    return a - b") == 0
    assert score(asked, "I cannot do that.") == 0
    assert score(asked, "def add(a, b):\n    return a + b\nexit()") == 0


def test_a_completion_and_a_whole_function_both_count():
    prompt = 'import math\n\ndef root(x):\n    """The integer root."""\n'
    checks = ("def check(f):\n    assert f(17) == 4", "check(root)")
    asked = item("code", prelude=prompt, checks=checks, entry_point="root")
    assert score(asked, "    return math.isqrt(x)\n") == 1
    assert score(asked, "```python\ndef root(x):\n    return math.isqrt(x)\n```") == 1
    assert score(asked, "    return x\n") == 0


def test_without_an_entry_point_the_reply_continues_nothing():
    asked = item("code", "def two():\n    return 1 + 1", prelude="import math", checks=("assert two() == 2",))
    assert score(asked, "def two():\n    return math.isqrt(4)") == 1


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


def test_questions_of_one_key_have_one_answer():
    asked = own_items(40, seed=1)
    by_key = {one.key: (one.family, one.reference) for one in asked if one.family in ("functions", "definitions")}
    assert all(by_key[one.key] == (one.family, one.reference) for one in asked if one.key in by_key)
    assert len(set(by_key.values())) == len(by_key) < 80


def test_drawing_stops_when_enough_is_found_and_says_what_is_short(monkeypatch, capsys):
    draws = []

    def draw(rng, family, held_out):
        draws.append(family)
        question = str(len(draws)) if family == "many" else str(len(draws) % 3)
        return Task(family, question, question, "reply", "answer")

    monkeypatch.setattr(items, "FAMILIES", ("many", "few", "fewer"))
    monkeypatch.setattr(items, "generate_task", draw)
    assert [one.family for one in own_items(5, seed=0)] == ["many"] * 5 + ["few"] * 3 + ["fewer"] * 3
    assert draws.count("many") == 5
    assert capsys.readouterr().err == "few: 3, fewer: 3 questions of 5; there are no more that differ.\n"
    own_items(3, seed=0)
    assert capsys.readouterr().err == ""


ROWS = {
    "gsm8k_test.jsonl": {"question": "How many?", "answer": "1 + 1 = 2\n#### 2"},
    "humaneval.jsonl": {"prompt": "def one():\n", "test": "def check(f):\n    assert f() == 1", "entry_point": "one"},
    "mbpp_test_500.jsonl": {"text": "Return two.", "test_list": ["assert two() == 2"], "test_setup_code": ""},
    "math500.jsonl": {"problem": "1 + 1?", "answer": "2"},
    "svamp.jsonl": {"Body": "Many dvds", "Question": "How many?", "Answer": 22090603.0},
    "cnn_dailymail.jsonl": {"article": "It rained all day in Rome.", "highlights": "Rain fell in Rome.\n", "id": "1"},
    "mt_bench_question.jsonl": {"turns": ["Write.", "Again."]},
}


@pytest.mark.parametrize(
    ("name", "bad", "what"),
    [
        ("gsm8k_test.jsonl", b"{not json", "cannot be read"),
        ("gsm8k_test.jsonl", b"5", "not a JSON object"),
        ("gsm8k_test.jsonl", b'{"question": "\xff", "answer": "#### 3"}', "can't decode byte 0xff"),
        ("gsm8k_test.jsonl", b'{"answer": "#### 3"}', "lacks 'question'"),
        ("gsm8k_test.jsonl", {"question": " "}, "'question' must be a text"),
        ("gsm8k_test.jsonl", {"answer": "3"}, "no ####"),
        ("gsm8k_test.jsonl", {"answer": "#### "}, "the answer '' is not a number"),
        ("gsm8k_test.jsonl", {"answer": "#### two"}, "the answer 'two' is not a number"),
        ("gsm8k_test.jsonl", {"answer": "#### 1,2"}, "the answer '1,2' is not a number"),
        ("gsm8k_test.jsonl", {"answer": None}, "'answer' must be a text"),
        ("math500.jsonl", {"answer": 5}, "'answer' must be a text"),
        ("svamp.jsonl", {"Body": None}, "'Body' must be a text"),
        ("svamp.jsonl", {"Answer": None}, "the answer 'None' is not a number"),
        ("svamp.jsonl", {"Answer": float("nan")}, "the answer 'nan' is not a number"),
        ("humaneval.jsonl", {"entry_point": 1}, "'entry_point' must be a text"),
        ("mbpp_test_500.jsonl", {"text": None}, "'text' must be a text"),
        ("mbpp_test_500.jsonl", {"test_list": "assert f() == 1"}, "'test_list' must be a list of texts"),
        ("mbpp_test_500.jsonl", {"test_list": []}, "'test_list' must be a list of texts"),
        ("mbpp_test_500.jsonl", {"test_setup_code": 5}, "'test_setup_code' must be a text"),
        ("cnn_dailymail.jsonl", {"highlights": ""}, "'highlights' must be a text"),
        ("mt_bench_question.jsonl", {"turns": "Hello"}, "'turns' must be a list of texts"),
        ("mt_bench_question.jsonl", {"turns": [5]}, "'turns' must be a list of texts"),
    ],
)
def test_a_bad_line_is_named_or_skipped(tmp_path: Path, capsys, name: str, bad: bytes | dict, what: str):
    path = tmp_path / name
    good = json.dumps(ROWS[name]).encode()
    bad = bad if isinstance(bad, bytes) else json.dumps(ROWS[name] | bad).encode()
    path.write_bytes(b"\n".join([good, bad, good]))
    with pytest.raises(ValueError, match=rf"^{re.escape(str(path))}, line 2 .*{re.escape(what)}"):
        file_items(tmp_path)
    assert [one.name[-5:] for one in file_items(tmp_path, "skip")] == ["-0001", "-0003"]
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith(f"skipped: {path}, line 2: ") and what in said


def test_a_folder_without_known_files_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="none of the known files"):
        file_items(tmp_path)


def test_published_forms_are_read(tmp_path: Path):
    for name, row in ROWS.items():
        (tmp_path / name).write_text(json.dumps(row) + "\n")
    by_family = {one.family: one for one in file_items(tmp_path)}
    assert all(one.key == one.name for one in by_family.values())
    for family, right, wrong in (
        ("gsm8k", "2", "3"),
        ("humaneval", "    return 1", "    return 2"),
        ("mbpp", "def two():\n    return 2", "def two():\n    return 1"),
        ("math-500", r"\boxed{2}", r"\boxed{3}"),
        ("svamp", "22090603 dvds", "22090600 dvds"),
        ("cnn-dailymail", "Rain fell in Rome.", "Quarterly profits rose."),
    ):
        assert score(by_family[family], right) == 1
        assert score(by_family[family], wrong) == 0
    assert "It rained all day in Rome." in by_family["cnn-dailymail"].messages[0]["content"]
    assert by_family["mt-bench"].messages[0]["content"] == "Write."
    assert score(by_family["mt-bench"], "Anything.") is None
