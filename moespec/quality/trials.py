"""The trials of a quality run: every arm answers every question, every arm reads every text. Yields plain records.

Owns their order (arms rotated from item to item, so that times can be compared) and what a record says. Knows nothing
of what is made of the records.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from moespec.bench.agreement import divergence, root_logits
from moespec.bench.arms import Arm
from moespec.bench.governed import Governors
from moespec.config import GenerationConfig
from moespec.engine import Engine
from moespec.governors import Governor
from moespec.quality.items import Item
from moespec.quality.scorers import score

TEXTS = Path(__file__).resolve().parents[2] / "assets" / "bench" / "texts.jsonl"  # what training never saw


@dataclass(frozen=True)
class Setting:
    """How replies are sampled. Temperature 0 needs one seed, a higher one several."""

    temperature: float
    seed: int

    def generation(self, item: Item, max_new_tokens: int) -> GenerationConfig:
        """Questions of one length would share their noise under one seed: each has its own, the same for all arms."""
        digest = hashlib.sha256(f"{self.seed}:{item.name}".encode()).digest()
        return GenerationConfig(max_new_tokens, self.temperature, seed=int.from_bytes(digest[:7], "big"))


@dataclass(frozen=True)
class Text:
    """A held-out document as token ids; its first two tokens are given, all others are predicted."""

    name: str
    group: str
    token_ids: list[int]


def read_texts(path: Path, engine: Engine) -> list[Text]:
    """The held-out texts as token ids. ValueError names a bad line or an id that stands twice."""
    tokenizer, texts = engine.target.tokenizer, []
    if tokenizer.chat_template is None:
        raise ValueError(f"{engine.name} has no chat template: its chats cannot be read as texts.")
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                row = json.loads(line)
                is_chat = "text" not in row
                rendered = tokenizer.apply_chat_template(row["messages"], tokenize=False) if is_chat else row["text"]
                texts.append(Text(row["id"], row["group"], tokenizer(rendered, add_special_tokens=False)["input_ids"]))
            except (ValueError, KeyError, TypeError) as error:
                problem = f"{path}, line {number} is no text with an id, a group and messages or text."
                raise ValueError(problem) from error
    twice = [name for name, count in Counter(text.name for text in texts).items() if count > 1]
    if twice:
        raise ValueError(f"{path} has the id {twice[0]} more than once.")
    return texts


def check_lengths(engine: Engine, texts: Sequence[Text], depth: int) -> None:
    """ValueError names a text with no place for a tree of this depth, or with places beyond the context."""
    longest = engine.target.max_context - depth
    for text in texts:
        if not 3 <= len(text.token_ids) <= longest:
            raise ValueError(f"text {text.name} has {len(text.token_ids)} tokens: trees are drafted in 3 to {longest}.")


def answer_key(arm: Arm, setting: Setting, item: Item) -> tuple:
    """What makes an answer's record unique in a run."""
    return ("answer", arm.key, setting.temperature, setting.seed, item.name)


def text_key(arm: Arm, text: Text) -> tuple:
    return ("text", arm.key, text.name)


def record_key(record: dict) -> tuple:
    """The key of a record that was read back."""
    names = ("kind", "arm", "temperature", "seed", "item") if record["kind"] == "answer" else ("kind", "arm", "text")
    return tuple(record[name] for name in names)


def answers(
    engine: Engine,
    arms: Sequence[Arm],
    settings: Sequence[Setting],
    items: Sequence[Item],
    max_new_tokens: int,
    is_done: Callable[[tuple], bool],
) -> Iterator[dict]:
    """One record per arm, setting and item that is not done yet."""
    governors = Governors(engine)
    for number, item in enumerate(items):
        shift = number % len(arms)
        for setting in settings:
            for arm in (*arms[shift:], *arms[:shift]):
                if not is_done(answer_key(arm, setting, item)):
                    yield _answer(engine, arm, governors.of(arm), setting, item, max_new_tokens)


def _answer(
    engine: Engine, arm: Arm, governor: Governor | None, setting: Setting, item: Item, max_new_tokens: int
) -> dict:
    generation = setting.generation(item, max_new_tokens)
    assert arm.budget is not None
    engine.forget()
    steps = engine.generate(list(item.messages), generation, arm.budget, arm.tree, governor=governor)
    first = next(steps)  # the prompt's own forward is in no figure
    began = time.perf_counter()
    *_, last = first, *steps
    seconds = time.perf_counter() - began
    summary = last.summary
    assert summary is not None
    return {
        "kind": "answer",
        "arm": arm.key,
        "temperature": setting.temperature,
        "seed": setting.seed,
        "family": item.family,
        "item": item.name,
        "key": item.key,
        "scorer": item.scorer,
        "score": score(item, summary.text),
        "num_tokens": len(summary.token_ids),
        "num_steps": summary.num_steps,  # without the prompt's, which wrote the first token
        "ms": round(seconds * 1e3, 3),
        "experts_natural": summary.experts_natural,
        "experts_kept": summary.experts_kept,
        "experts_active": summary.experts_active,
        "mass_kept": summary.mass_kept,
        "finish_reason": summary.finish_reason,
        "reply": summary.text,
    }


def readings(
    engine: Engine, arms: Sequence[Arm], texts: Sequence[Text], is_done: Callable[[tuple], bool]
) -> Iterator[dict]:
    """One record per arm and text: nats, and agreement and divergence from the unbudgeted model, summed over tokens.

    The budget acts on the tree drafted at each position, as it does in verification; the row read is its root.
    A governor that chooses budgets has none for a single position: it reads nothing.
    """
    for text in texts:
        missing = [arm for arm in arms if not arm.has_floor and not is_done(text_key(arm, text))]
        sums = {arm.key: {"nats": 0.0, "kl": 0.0, "num_agreed": 0} for arm in missing}
        num_tokens = 0
        for position in root_logits(engine, missing, text.token_ids, first_root=1) if missing else ():
            num_tokens += 1
            for arm, logits_V in zip(missing, position.by_arm, strict=True):
                logp_V = logits_V.double().log_softmax(dim=-1)
                entry = sums[arm.key]
                entry["nats"] -= float(logp_V[text.token_ids[position.root + 1]])
                entry["kl"] += divergence(position.natural_V, logits_V)
                entry["num_agreed"] += int(logits_V.argmax() == position.natural_V.argmax())
        for arm in missing:
            yield {"kind": "text", "arm": arm.key, "group": text.group, "text": text.name, "num_tokens": num_tokens} | {
                name: round(value, 6) for name, value in sums[arm.key].items()
            }
