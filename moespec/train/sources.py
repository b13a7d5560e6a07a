"""Converters: one public source's rows to documents of the training form. Knows nothing of splits or tokens.

A document is `{"source", "group", "messages": [{"role", "content"}, ...]}` or, for running prose, `{..., "text"}`.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator

Document = dict
Converter = Callable[[dict, random.Random], Iterator[Document]]

PASSAGE_CHARS = 900  # about one training sequence


def chat(*turns: str) -> Document:
    """Alternating user and assistant turns, the user first."""
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": turn.strip()} for i, turn in enumerate(turns)]}


def as_typed(rng: random.Random, question: str) -> str:
    """As people type: some without a capital, some without a mark."""
    if rng.random() < 0.3:
        question = question[0].lower() + question[1:]
    return question.rstrip(".?!") if rng.random() < 0.2 else question


def _messages(row: dict, rng: random.Random) -> Iterator[Document]:
    messages = [message for message in row["messages"] if message["content"].strip()]
    for start in range(0, len(messages), 12):  # long dialogues in parts that fit a sequence
        part = messages[start : start + 12]
        if part and part[0]["role"] == "assistant":
            part = part[1:]
        if len(part) >= 2:
            yield {"messages": part}


def _chatterbot(row: dict, rng: random.Random) -> Iterator[Document]:
    if len(row["turns"]) >= 2:
        yield chat(*row["turns"])


def _wordnet(row: dict, rng: random.Random) -> Iterator[Document]:
    word, meaning = row["words"][0].replace("_", " "), row["definition"]
    ask = rng.choice(
        ("What does {} mean?", "Define {}.", "What is the meaning of {}?", "define {}", 'What does "{}" mean?')
    )
    names = {"n": "noun", "v": "verb", "a": "adjective", "s": "adjective", "r": "adverb"}
    answer = f"{word} ({names.get(row['pos'], 'word')}): {meaning}."
    if row.get("examples") and rng.random() < 0.5:
        answer += f' For example: "{row["examples"][0]}"'
    if rng.random() < 0.75:
        yield chat(ask.format(word), answer)
    else:
        yield chat(rng.choice(("Which word means: {}?", "What is the word for: {}?")).format(meaning), f"{word}.")
    if len(row["words"]) > 1 and rng.random() < 0.3:
        others = ", ".join(other.replace("_", " ") for other in row["words"][1:4])
        yield chat(rng.choice(("Give me a synonym of {}.", "What is another word for {}?")).format(word), f"{others}.")


def _trivia(row: dict, rng: random.Random) -> Iterator[Document]:
    question, answer = row["question"].strip(), str(row["answer"]).strip()
    options = [str(option) for option in row.get("options") or []]
    if len(options) > 1 and rng.random() < 0.6:
        question += "\n" + "\n".join(f"- {option}" for option in options)
    yield chat(question, f"{answer}.")


_FACTS = {
    "Government - Capital": ("What is the capital of {}?", "The capital of {} is {}."),
    "Geography - Location": ("Where is {}?", "{} is here: {}."),
    "Geography - Climate": ("What is the climate of {} like?", "The climate of {}: {}."),
    "People and Society - Languages": ("Which languages are spoken in {}?", "Languages of {}: {}."),
    "People and Society - Religions": ("Which religions are there in {}?", "Religions of {}: {}."),
    "People and Society - Population": ("How many people live in {}?", "Population of {}: {}."),
    "Geography - Natural resources": ("Which natural resources does {} have?", "Natural resources of {}: {}."),
    "Introduction - Background": ("Tell me about the history of {}.", "{}: {}"),
    "Economy - Exports - commodities": ("What does {} export?", "{} exports {}."),
}


def _factbook(row: dict, rng: random.Random) -> Iterator[Document]:
    for field, value in row["facts"].items():
        known = next((forms for key, forms in _FACTS.items() if field.startswith(key)), None)
        if known and isinstance(value, str) and value.strip():
            yield chat(known[0].format(row["name"]), known[1].format(row["name"], value.strip()[:700].rstrip(".")))


def _tldr(row: dict, rng: random.Random) -> Iterator[Document]:
    name = row["page"].split("/")[-1]
    about = " ".join(line[2:] for line in row["text"].splitlines() if line.startswith("> ") and "http" not in line)
    yield chat(f"What does the command {name} do?", about.replace("`", ""))
    for what, command in re.findall(r"^- (.+?):?\n\n`(.+?)`$", row["text"], re.MULTILINE):
        what = what[0].lower() + what[1:]
        yield chat(rng.choice((f"How do I {what}?", f"{name}: {what}?")), command.replace("{{", "<").replace("}}", ">"))


def passages(text: str) -> Iterator[str]:
    """Whole paragraphs joined up to about a sequence's length."""
    part = ""
    for paragraph in text.splitlines():
        if part and len(part) + len(paragraph) > PASSAGE_CHARS:
            yield part.strip()
            part = ""
        part += paragraph + "\n"
    if len(part) > 80:
        yield part.strip()


def _story(row: dict, rng: random.Random) -> Iterator[Document]:
    asks = ("Tell me a short story.", "Tell me a story called {}.", "tell me a story", "Write a short story: {}.")
    parts = list(passages(row["text"]))
    if parts:
        turns = [rng.choice(asks).format(row["title"]), parts[0]]
        for part in parts[1:3]:
            turns += [rng.choice(("What happened next?", "Go on.", "And then?")), part]
        yield chat(*turns)


def _prose(row: dict, rng: random.Random) -> Iterator[Document]:
    for part in passages(row["text"]):
        yield {"text": part}


def _joke(row: dict, rng: random.Random) -> Iterator[Document]:
    yield chat(
        rng.choice(("Tell me a joke.", "tell me a joke", "Do you know a joke?")), f"{row['setup']} {row['punchline']}"
    )


def _recipe(row: dict, rng: random.Random) -> Iterator[Document]:
    title = re.search(r'^title:\s*"?(.*?)"?$', row["text"], re.MULTILINE)
    body = re.sub(r"!\[.*?\]\(.*?\)", "", row["text"].split("---", 2)[-1]).strip()
    if title:
        yield chat(f"How do I make {title[1]}?", body[:1500])


def _oasst(row: dict, rng: random.Random) -> Iterator[Document]:
    turns, node = [], row
    while node:
        turns.append(node["text"])
        node = (node.get("replies") or [None])[0]
    if len(turns) >= 2:
        yield chat(*turns[:6])


def _self_instruct(row: dict, rng: random.Random) -> Iterator[Document]:
    for instance in row["instances"]:
        yield chat(f"{row['instruction']}\n{instance['input']}", instance["output"])


def _gsm8k(row: dict, rng: random.Random) -> Iterator[Document]:
    answer = re.sub(r"<<.*?>>", "", row["answer"]).replace("#### ", "The answer is ")
    yield chat(row["question"], answer + ".")


def _mawps(row: dict, rng: random.Random) -> Iterator[Document]:
    question, answer = row["Question"], float(row["Answer"])
    for index, number in enumerate(row["Numbers"].split()):
        value = float(number)
        question = question.replace(f"number{index}", f"{value:g}")
    yield chat(re.sub(r"\s+([.,?])", r"\1", question), f"The answer is {answer:g}.")


def _mbpp(row: dict, rng: random.Random) -> Iterator[Document]:
    yield chat(row["text"], row["code"].replace("\r\n", "\n").replace("\t", "    "))


def _snippet(row: dict, rng: random.Random) -> Iterator[Document]:
    title = re.search(r"^title:\s*(.*)$", row["text"], re.MULTILINE)
    body = row["text"].split("---", 2)[-1].strip()
    if title:
        yield chat(f"Write the JavaScript function {title[1]}.", body[:1200])


def _python(row: dict, rng: random.Random) -> Iterator[Document]:
    if len(row["text"]) > 200:
        for part in passages(row["text"]):
            yield {"text": part}


# File stem -> (group, weight in the group's mix, converter).
SOURCES: dict[str, tuple[str, float, Converter]] = {
    "sgd_dialogues": ("dialogue", 1, _messages),
    "self_dialogue": ("dialogue", 1, _messages),
    "topical_chat_validtest": ("dialogue", 1, _messages),
    "synthetic_persona_chat_validtest": ("dialogue", 3, _messages),
    "taskmaster4": ("dialogue", 2, _messages),
    "oasst_en_100_trees": ("dialogue", 5, _oasst),
    "self_instruct_seed_tasks": ("dialogue", 5, _self_instruct),
    "chatterbot_english": ("dialogue", 5, _chatterbot),
    "jokes": ("dialogue", 3, _joke),
    "open_english_wordnet": ("facts", 1, _wordnet),
    "open_trivia_qa": ("facts", 1, _trivia),
    "factbook": ("facts", 1, _factbook),
    "tldr_pages": ("facts", 0.7, _tldr),
    "storybooks_asp": ("prose", 5, _story),
    "storybooks_pb": ("prose", 5, _story),
    "gutenberg_children": ("prose", 0.6, _prose),
    "onestop_english": ("prose", 1.5, _prose),
    "openstax_college_success": ("prose", 1, _prose),
    "openstax_introduction_anthropology": ("prose", 1, _prose),
    "recipes_based_cooking": ("prose", 2, _recipe),
    "thealgorithms_python": ("code", 1, _python),
    "mbpp_train_val_prompt": ("code", 3, _mbpp),
    "gsm8k_train": ("code", 1, _gsm8k),
    "mawps": ("code", 2, _mawps),
    "snippets_30s_js": ("code", 1, _snippet),
}
