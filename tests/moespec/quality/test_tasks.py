"""Every family's answer, recomputed from the question alone by other means."""

from __future__ import annotations

import datetime
import json
import random
import re

import pytest

from moespec.quality.tasks import FAMILIES, Task, generate_task

NUM_TASKS = 200


def tasks(family: str, held_out: bool = False) -> list[Task]:
    rng = random.Random(7)
    return [generate_task(rng, family, held_out) for _ in range(NUM_TASKS)]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_seed_gives_the_same_tasks_and_the_answer_stands_in_the_reply(family):
    assert tasks(family) == tasks(family)
    assert all(task.answer in task.reply for task in tasks(family))


@pytest.mark.parametrize("family", FAMILIES)
def test_held_out_operands_never_enter_training(family):
    held_out = {task.key for task in tasks(family, held_out=True)}
    assert held_out.isdisjoint(task.key for task in tasks(family))


def test_arithmetic_is_right():
    words = {"plus": "+", "minus": "-", "times": "*"}
    for task in tasks("arithmetic"):
        a, sign, b = re.search(r"(\d+) (\+|-|\*|plus|minus|times) (\d+)", task.question).groups()
        sign = words.get(sign, sign)
        assert int(task.answer) == {"+": int(a) + int(b), "-": int(a) - int(b), "*": int(a) * int(b)}[sign]
        for left, value in re.findall(r"([\d +*-]+) = (\d+)", task.reply):
            assert sum_of_terms(left) == int(value)


def sum_of_terms(expression: str) -> int:
    total, sign = 0, 1
    for token in re.findall(r"[+-]|\d+(?: \* \d+)*", expression):
        if token in "+-":
            sign = 1 if token == "+" else -1
        else:
            product = 1
            for factor in token.split(" * "):
                product *= int(factor)
            total += sign * product
    return total


def test_lists_are_right():
    for task in tasks("lists"):
        values = [int(value) for value in re.findall(r"\d+", task.question)]
        answer = [int(value) for value in re.findall(r"\d+", task.answer)]
        text = task.question.lower()
        if "from largest" in text or "from smallest" in text:
            assert answer == sorted(values, reverse="from largest" in text)
        elif re.search(r"smallest|lowest|least", text):
            assert answer == [min(values)]
        else:
            assert answer == [max(values)]


def test_dates_are_right():
    days = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
    for task in tasks("dates"):
        clock = re.search(r"(\d\d):(\d\d)", task.question)
        date = re.search(r"\d{4}-\d\d-\d\d", task.question)
        if clock:
            more = int(re.search(r"(\d+) minutes", task.question)[1])
            end = datetime.datetime(2024, 1, 1, int(clock[1]), int(clock[2])) + datetime.timedelta(minutes=more)
            assert task.answer == end.strftime("%H:%M")
        elif date:
            later = int(re.search(r"(\d+) days", task.question)[1])
            start = datetime.date.fromisoformat(date[0])
            assert task.answer == str(datetime.date.fromordinal(start.toordinal() + later))
        else:
            day = next(name for name in days if name.lower() in task.question.lower())
            later = int(re.search(r"(\d+) days", task.question)[1])
            start = datetime.date(2024, 1, 1 + days.index(day))  # 1 January 2024 was a Monday
            assert task.answer == (start + datetime.timedelta(days=later)).strftime("%A")


def test_letters_and_counts_are_right():
    for task in tasks("letters"):
        kind, word = task.key.split()
        assert task.answer.replace("-", "") in (word, word[::-1], word.upper(), word[0]), kind
        assert word in task.question
    for task in tasks("counting"):
        if task.key.startswith("letter"):
            _, letter, word = task.key.split()
            assert int(task.answer) == len(word) - len(word.replace(letter, ""))
        else:
            assert int(task.answer) == len(task.key.split()) - 1


def test_tables_and_json_are_right():
    for task in tasks("tables"):
        name = re.search(r"(?:does|of) (\w+)", task.question)[1]
        _, points, colour = next(
            line.split(" | ") for line in task.question.splitlines() if line.startswith(f"{name} |")
        )
        assert task.answer == (colour if "colour" in task.question.splitlines()[-1] else points)
    for task in tasks("json"):
        packed = json.loads(re.search(r"\{.*\}", task.question + task.answer)[0])
        sentence = f"{packed['name']} is {packed['age']} years old and lives in {packed['city']}."
        assert sentence.lower() in (task.question + task.answer).lower()


def test_functions_pass_their_checks():
    for task in tasks("functions")[:50]:
        space: dict = {}
        exec(task.answer, space)  # our own generated code, one expression long
        for check in task.checks:
            exec(check, space)
        assert len(task.checks) == 3
