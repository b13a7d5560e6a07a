"""Is a reply right? One function per kind of answer, each 0 to 1. Knows nothing of models or of files."""

from __future__ import annotations

import re
from collections.abc import Callable

from moespec.quality.items import Item
from moespec.quality.sandbox import passes

_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
_FENCED = re.compile(r"```(?:\w+)?\n(.*?)(?:```|$)", re.DOTALL)
_BOXED = re.compile(r"\\(?:boxed|fbox)\s*\{")


def score(item: Item, reply: str) -> float | None:
    """How right the reply is; None for an item that is load and has no right answer."""
    return SCORERS[item.scorer](item, reply)


def exact(item: Item, reply: str) -> float:
    """The reply is the reference, spaces around it aside."""
    return float(reply.strip() == item.reference.strip())


def number(item: Item, reply: str) -> float:
    """The last number of the reply is the reference's value."""
    found = _NUMBER.findall(reply)
    return float(bool(found) and float(found[-1].replace(",", "")) == float(item.reference.replace(",", "")))


def math(item: Item, reply: str) -> float:
    """The last boxed expression (or, without one, the last number) is the reference, written in the same way."""
    boxed = _last_boxed(reply)
    numbers = _NUMBER.findall(reply)
    answer = boxed if boxed is not None else numbers[-1] if numbers else ""
    return float(_plain_math(answer) == _plain_math(item.reference))


def code(item: Item, reply: str) -> float:
    """The program of prelude, reply and checks runs to its end."""
    fenced = _FENCED.findall(reply)
    program = fenced[0] if fenced else reply
    # A reply may continue the prompt's function, or write it anew: then the prompt's own unfinished one is in its way.
    is_whole = bool(item.reference) and re.search(rf"^def {re.escape(item.reference)}\b", program, re.MULTILINE)
    prelude = item.prelude.split(f"def {item.reference}")[0] if is_whole else item.prelude
    joint = "" if item.reference and not is_whole else "\n"
    return float(passes(f"{prelude}{joint}{program}\n" + "\n".join(item.checks)))


def rouge(item: Item, reply: str) -> float:
    """ROUGE-L F1 against the reference summary. ValueError without the package rouge-score."""
    try:
        from rouge_score.rouge_scorer import RougeScorer  # type: ignore[import-untyped]
    except ImportError as error:
        raise ValueError("scoring summaries needs the package rouge-score: pip install rouge-score.") from error
    return RougeScorer(["rougeL"], use_stemmer=True).score(item.reference, reply)["rougeL"].fmeasure


def _last_boxed(text: str) -> str | None:
    """What stands between the braces of the last \\boxed{...}, inner braces included."""
    openings = list(_BOXED.finditer(text))
    if not openings:
        return None
    depth, start = 1, openings[-1].end()
    for place in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if depth == 0:
            return text[start:place]
    return None


def _plain_math(text: str) -> str:
    """One spelling of the same LaTeX: no spaces, no sizes, no units in text, one kind of fraction."""
    text = re.sub(r"\\(?:left|right|!|,|;|:| )|\\text\{\s*[a-z ]*\}|\\mbox\{[^}]*\}|\^\{?\\circ\}?|[$%]|\\%", "", text)
    text = text.replace("dfrac", "frac").replace("tfrac", "frac").replace(" ", "").rstrip(".")
    return re.sub(r"\\frac(\d)(\d)", r"\\frac{\1}{\2}", text)


SCORERS: dict[str, Callable[[Item, str], float | None]] = {
    "exact": exact,
    "number": number,
    "math": math,
    "code": code,
    "rouge": rouge,
    "none": lambda item, reply: None,
}
