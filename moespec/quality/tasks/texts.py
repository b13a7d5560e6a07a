"""Tasks on words and texts: counting, spelling, JSON, tables, copy-editing, definitions, tiny functions."""

from __future__ import annotations

import json
import random

from moespec.quality.tasks.base import Task, say
from moespec.quality.tasks.lexicon import LEXICON
from moespec.quality.tasks.numbers import NAMES

WORDS = tuple(LEXICON)
COLOURS = ["red", "blue", "green", "yellow", "black", "white", "brown", "orange"]
CITIES = ["Paris", "Rome", "Cairo", "Oslo", "Lima", "Tokyo", "Berlin", "Madrid", "Delhi", "Boston"]


def counting(rng: random.Random) -> Task:
    if rng.random() < 0.5:
        word = rng.choice(WORDS)
        letter = rng.choice(word)
        answer = str(word.count(letter))
        question = say(
            rng,
            'How many times does the letter {l} appear in "{w}"?',
            "Count the letter {l} in {w}.",
            "How many {l}s are in {w}?",
            l=letter,
            w=word,
        )
        spelled = "-".join(word)
        return Task("counting", f"letter {letter} {word}", question, f"{spelled}: {answer}", answer)
    words = [rng.choice(WORDS) for _ in range(rng.randint(3, 8))]
    text, answer = " ".join(words), str(len(words))
    question = say(rng, 'How many words are in "{t}"?', "Count the words: {t}", "How many words: {t}?", t=text)
    return Task("counting", f"words {text}", question, f"{answer} words.", answer)


def letters(rng: random.Random) -> Task:
    word, kind = rng.choice(WORDS), rng.choice(("reverse", "upper", "spell", "first"))
    forms = {
        "reverse": (("Reverse the word {w}.", "Write {w} backwards.", "What is {w} spelled backwards?"), word[::-1]),
        "upper": (("Write {w} in capital letters.", "Put {w} in uppercase.", "{w} in capitals?"), word.upper()),
        "spell": (("Spell the word {w}.", "How do you spell {w}?", "Can you spell {w}?"), "-".join(word)),
        "first": (("What is the first letter of {w}?", "Which letter does {w} begin with?"), word[0]),
    }
    questions, answer = forms[kind]
    return Task("letters", f"{kind} {word}", say(rng, *questions, w=word), answer, answer)


def to_json(rng: random.Random) -> Task:
    name, age, city = rng.choice(NAMES), rng.randint(5, 90), rng.choice(CITIES)
    sentence = f"{name} is {age} years old and lives in {city}."
    packed = json.dumps({"name": name, "age": age, "city": city})
    if rng.random() < 0.5:
        question = say(
            rng,
            "Turn this into JSON: {s}",
            "Write as JSON with name, age and city: {s}",
            "JSON please: {s}",
            s=sentence,
        )
        return Task("json", f"to {name} {age} {city}", question, packed, packed)
    question = say(
        rng,
        "Write this as a sentence: {j}",
        "Say it in a sentence: {j}",
        "Turn this JSON into a sentence: {j}",
        j=packed,
    )
    return Task("json", f"from {name} {age} {city}", question, sentence, sentence)


def tables(rng: random.Random) -> Task:
    rows = [(name, rng.randint(1, 99), rng.choice(COLOURS)) for name in rng.sample(NAMES, rng.randint(3, 5))]
    table = "\n".join(f"{name} | {points} | {colour}" for name, points, colour in rows)
    name, points, colour = rng.choice(rows)
    if rng.random() < 0.5:
        ask, answer = rng.choice((f"How many points does {name} have?", f"What is the score of {name}?")), str(points)
        reply = f"{name} has {answer} points."
    else:
        ask, answer = rng.choice((f"Which colour does {name} have?", f"What is the colour of {name}?")), colour
        reply = f"{name} has {answer}."
    return Task("tables", f"{table} {ask}", f"name | points | colour\n{table}\n{ask}", reply, answer)


def copy_edit(rng: random.Random) -> Task:
    words = [rng.choice(WORDS) for _ in range(rng.randint(4, 7))]
    place, new = rng.randrange(len(words)), rng.choice(WORDS)
    old = words[place]
    text = " ".join(words)
    answer = " ".join(new if word == old else word for word in words)
    question = say(
        rng,
        'Replace "{o}" with "{n}": {t}',
        "Change {o} to {n} in: {t}",
        "Write this again with {n} instead of {o}: {t}",
        o=old,
        n=new,
        t=text,
    )
    return Task("copy-edit", f"{old} {new} {text}", question, answer, answer)


def definitions(rng: random.Random) -> Task:
    word = rng.choice(WORDS)
    meaning = LEXICON[word]
    question = say(
        rng, "Which word means: {m}?", "What do we call {m}?", "Name it: {m}.", "What is the word for {m}?", m=meaning
    )
    return Task("definitions", f"word {word} {rng.randrange(8)}", question, f"{word}.", word)


_FUNCTIONS = (
    ("add_{n}", "adds {n} to x", "x + {n}", lambda x, n: x + n),
    ("times_{n}", "multiplies x by {n}", "x * {n}", lambda x, n: x * n),
    ("minus_{n}", "subtracts {n} from x", "x - {n}", lambda x, n: x - n),
    ("is_over_{n}", "says whether x is greater than {n}", "x > {n}", lambda x, n: x > n),
    ("divides_{n}", "says whether x is divisible by {n}", "x % {n} == 0", lambda x, n: x % n == 0),
    ("at_most_{n}", "returns the smaller of x and {n}", "min(x, {n})", min),
    ("square_plus_{n}", "returns the square of x plus {n}", "x * x + {n}", lambda x, n: x * x + n),
)


def functions(rng: random.Random) -> Task:
    name, what, body, function = rng.choice(_FUNCTIONS)
    number = rng.randint(2, 99)
    name, what, body = (part.format(n=number) for part in (name, what, body))
    question = say(
        rng,
        "Write a Python function {f} that {w}.",
        "Python: define {f}(x). It {w}.",
        "Code a function {f} which {w}.",
        f=name,
        w=what,
    )
    code = f"def {name}(x):\n    return {body}"
    checks = tuple(f"assert {name}({x}) == {function(x, number)!r}" for x in (0, number, number + 7))
    return Task("functions", f"{name}", question, code, code, checks)
