"""Tasks on numbers: arithmetic, lists, units, dates and clocks, word problems."""

from __future__ import annotations

import datetime
import random

from moespec.quality.tasks.base import Task, say

NAMES = [
    "Tom",
    "Anna",
    "Ben",
    "Lucy",
    "Sam",
    "Mia",
    "Jack",
    "Ella",
    "Max",
    "Nora",
    "Leo",
    "Ruby",
    "Finn",
    "Zoe",
    "Amir",
    "Lena",
]
THINGS = ["apples", "books", "pencils", "coins", "stamps", "cards", "shells", "marbles", "cookies", "balloons"]
UNITS = (
    ("kilometres", "metres", 1000), ("metres", "centimetres", 100), ("hours", "minutes", 60), ("minutes", "seconds", 60),  # noqa: E501
    ("kilograms", "grams", 1000), ("days", "hours", 24), ("weeks", "days", 7), ("litres", "millilitres", 1000),
    ("feet", "inches", 12), ("years", "months", 12), ("dozens", "pieces", 12), ("centimetres", "millimetres", 10),
)  # fmt: skip
DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]


def _operand(rng: random.Random) -> int:
    return rng.randrange(10 ** rng.choice((1, 2, 2, 3)))


def arithmetic(rng: random.Random) -> Task:
    kind, a, b = rng.choice("+-*"), _operand(rng), _operand(rng)
    if kind == "-" and a < b:
        a, b = b, a
    if kind == "*":
        a, b = rng.randrange(100), rng.randrange(2, 100)
    answer = {"+": a + b, "-": a - b, "*": a * b}[kind]
    word = {"+": "plus", "-": "minus", "*": "times"}[kind]
    question = say(
        rng, "What is {a} {s} {b}?", "{a} {s} {b} =", "Calculate {a} {s} {b}.", "How much is {a} {w} {b}?",
        "What is {a} {w} {b}?", "Work out {a} {s} {b}.", "{a} {w} {b}?", "Tell me {a} {s} {b}.", a=a, b=b, s=kind, w=word,  # noqa: E501
    )  # fmt: skip
    if kind == "*" and b >= 10:
        tens, ones = b - b % 10, b % 10
        steps = f"{a} * {tens} = {a * tens}\n{a} * {ones} = {a * ones}\n{a * tens} + {a * ones} = {answer}\n"
        return Task("arithmetic", f"{a}{kind}{b}", question, f"{steps}The answer is {answer}.", str(answer))
    return Task("arithmetic", f"{a}{kind}{b}", question, f"{a} {kind} {b} = {answer}", str(answer))


def lists(rng: random.Random) -> Task:
    values = rng.sample(range(100), rng.randint(3, 6))
    kind = rng.choice(("sort", "reverse sort", "max", "min", "compare"))
    shown = ", ".join(map(str, values))
    if kind == "compare":
        a, b = values[:2]
        question = say(rng, "Which is larger, {a} or {b}?", "Which number is bigger: {a} or {b}?", "{a} or {b}, which is more?",  # noqa: E501
                       a=a, b=b)  # fmt: skip
        return Task("lists", f"compare {a} {b}", question, f"{max(a, b)} is larger.", str(max(a, b)))
    if kind in ("max", "min"):
        word = rng.choice({"max": ("largest", "biggest", "highest"), "min": ("smallest", "lowest", "least")}[kind])
        answer = str(max(values) if kind == "max" else min(values))
        question = say(
            rng,
            "What is the {w} of {v}?",
            "Find the {w} number: {v}.",
            "Which of these is the {w}? {v}",
            w=word,
            v=shown,
        )
        return Task("lists", f"{kind} {shown}", question, f"The {word} is {answer}.", answer)
    backwards = kind == "reverse sort"
    answer = ", ".join(map(str, sorted(values, reverse=backwards)))
    order = "from largest to smallest" if backwards else "from smallest to largest"
    question = say(
        rng,
        "Sort these numbers {o}: {v}.",
        "Put {v} in order {o}.",
        "Order {o}: {v}",
        "Arrange {o}: {v}.",
        o=order,
        v=shown,
    )
    return Task("lists", f"{kind} {shown}", question, answer, answer)


def units(rng: random.Random) -> Task:
    large, small, factor = rng.choice(UNITS)
    amount = rng.randint(2, 60)
    back = rng.random() < 0.3
    have, want = (amount * factor, amount) if back else (amount, amount * factor)
    source, target = (small, large) if back else (large, small)
    question = say(
        rng, "How many {t} are {h} {s}?", "Convert {h} {s} to {t}.", "{h} {s} in {t}?", "Turn {h} {s} into {t}.",
        "What is {h} {s} in {t}?", h=have, s=source, t=target,
    )  # fmt: skip
    return Task("units", f"{have} {source} {target}", question, f"{have} {source} are {want} {target}.", str(want))


def dates(rng: random.Random) -> Task:
    kind = rng.choice(("weekday", "clock", "days"))
    if kind == "weekday":
        day, later = rng.randrange(7), rng.randint(1, 20)
        answer = DAYS[(day + later) % 7]
        question = say(
            rng,
            "Today is {d}. Which day is it in {n} days?",
            "If today is {d}, what day comes {n} days later?",
            d=DAYS[day],
            n=later,
        )
        return Task("dates", f"weekday {day} {later}", question, f"It is {answer}.", answer)
    if kind == "clock":
        start, more = rng.randrange(24 * 12) * 5, rng.randrange(1, 60) * 5
        end = (start + more) % (24 * 60)
        shown, answer = f"{start // 60:02}:{start % 60:02}", f"{end // 60:02}:{end % 60:02}"
        question = say(
            rng,
            "It is {s}. What time is it in {m} minutes?",
            "What is {m} minutes after {s}?",
            "{s} plus {m} minutes?",
            s=shown,
            m=more,
        )
        return Task("dates", f"clock {start} {more}", question, f"It is {answer}.", answer)
    first = datetime.date(2024, 1, 1) + datetime.timedelta(days=rng.randrange(700))
    later = rng.randint(1, 40)
    answer = (first + datetime.timedelta(days=later)).isoformat()
    question = say(
        rng, "Which date is {n} days after {d}?", "What is the date {n} days after {d}?", n=later, d=first.isoformat()
    )
    return Task("dates", f"days {first} {later}", question, f"It is {answer}.", answer)


def word_problems(rng: random.Random) -> Task:
    name, other = rng.sample(NAMES, 2)
    thing, a, b, c = rng.choice(THINGS), rng.randint(5, 60), rng.randint(2, 40), rng.randint(2, 9)
    kind = rng.choice(("get", "give", "share", "two steps"))
    if kind == "give":
        a, b = max(a, b) + 1, min(a, b)
        text, steps, answer = (
            f"{name} has {a} {thing} and gives {b} to {other}. How many {thing} does {name} have left?",
            f"{a} - {b} = {a - b}",
            a - b,
        )
    elif kind == "share":
        a = b * c
        text, steps, answer = (
            f"{name} shares {a} {thing} equally among {c} friends. How many does each friend get?",
            f"{a} / {c} = {b}",
            b,
        )
    elif kind == "get":
        text, steps, answer = (
            f"{name} has {a} {thing}. {other} gives {name} {b} more. How many {thing} does {name} have now?",
            f"{a} + {b} = {a + b}",
            a + b,
        )
    else:
        answer = a + b * c
        text = f"{name} has {a} {thing} and buys {c} bags with {b} {thing} each. How many {thing} does {name} have in total?"  # noqa: E501
        steps = f"{c} * {b} = {b * c}\n{a} + {b * c} = {answer}"
    return Task("word problems", f"{kind} {a} {b} {c}", text, f"{steps}\nThe answer is {answer}.", str(answer))
