"""Is a reply right? One function per kind of answer, each 0 to 1. Knows nothing of models or of files."""

from __future__ import annotations

import re
from collections.abc import Callable
from decimal import Decimal

from moespec.quality.items import Item
from moespec.quality.sandbox import passes

# A minus is a sign only where no number, word or bracket ends before it (1-18 is a range); commas part thousands alone.
_NUMBER = re.compile(r"(?:(?<![\w)%])-)?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|(?<![\w.])\.\d+)")
_FENCED = re.compile(r"```\w*[^\S\n]*\n(.*?)(?:```|$)", re.DOTALL)
_BOXED = re.compile(r"\\(?:boxed|fbox)\s*\{")
# What says nothing of a value: sizes, thin spaces (but no half of a line break), commas in braces, degrees, money.
_FILLING = re.compile(
    r"(?<!\\)\\(?:(?:left|right)(?![a-zA-Z])|[!,;:\s]\s*)|\{,\}|\^(?:\\circ|\{\\circ\})(?![a-z])|\\?[$%]"
)
_WORDS = re.compile(r"\\(?:text(?:bf)?|mbox|mathrm)\s*\{([^{}]*)\}")
_UNIT = re.compile(rf"([\d}}]|\\pi)\s*{_WORDS.pattern}(?:\^\{{?\d\}}?)?[\s.]*$")


def score(item: Item, reply: str) -> float | None:
    """How right the reply is; None for an item that is load and has no right answer."""
    return SCORERS[item.scorer](item, reply)


def exact(item: Item, reply: str) -> float:
    """The reply is the reference, spaces around it aside."""
    return float(reply.strip() == item.reference.strip())


def number(item: Item, reply: str) -> float:
    """The last number of the reply is the reference's value."""
    numbers = _numbers(reply)
    return float(bool(numbers) and _value(numbers[-1]) == _value(item.reference))


def math(item: Item, reply: str) -> float:
    """The last boxed expression (or, without one, the last number) is the reference, written in the same way."""
    boxed = _last_boxed(reply)
    answer = boxed if boxed is not None else "".join(_numbers(reply)[-1:])
    plain = _plain_math(answer)
    return float(plain != "" and plain == _plain_math(item.reference))


def code(item: Item, reply: str) -> float:
    """The program of prelude, reply and checks runs to its end."""
    fenced = _FENCED.findall(reply)
    program = fenced[0] if fenced else reply
    # A reply may continue the prompt's function, or write it anew: then the prompt's own unfinished one is in its way.
    name = item.entry_point
    is_whole = bool(name) and re.search(rf"^def {re.escape(name)}\b", program, re.MULTILINE)
    prelude = item.prelude.split(f"def {name}(")[0] if is_whole else item.prelude
    joint = "" if name and not is_whole else "\n"
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


def _numbers(text: str) -> list[str]:
    return _NUMBER.findall(text.replace("\N{MINUS SIGN}", "-"))


def _value(number: str) -> Decimal:
    return Decimal(number.replace(",", ""))


def _plain_math(text: str) -> str | Decimal:
    """One spelling of the same LaTeX: no spaces, sizes or unit, one kind of fraction; of a number alone, its value."""
    text = _FILLING.sub("", text.replace("\N{MINUS SIGN}", "-"))
    text = _WORDS.sub(r"\1", _UNIT.sub(r"\1", text))
    text = re.sub(r"(?<!,)\s+", "", text).rstrip(".")
    if _NUMBER.fullmatch(text):  # before the spaces behind commas go: 100, 200 is a list and 100,200 a number
        return _value(text)
    text = re.sub(r"\s", "", text).replace("dfrac", "frac").replace("tfrac", "frac")
    return re.sub(r"(\\frac\{[^{}]*\})(\d)", r"\1{\2}", re.sub(r"\\frac(\d)", r"\\frac{\1}", text))


SCORERS: dict[str, Callable[[Item, str], float | None]] = {
    "exact": exact,
    "number": number,
    "math": math,
    "code": code,
    "rouge": rouge,
    "none": lambda item, reply: None,
}
