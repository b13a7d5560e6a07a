"""Would it pay on a card that is not here? A model's sizes, a device and an acceptance, and what `advise` says.

Owns how what a visitor chose is read, and what is refused. Pure. How advice is shown: `advice.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moespec import EMBEDDED_TARGET
from moespec.cost import BF16_BYTES, MXFP4_BYTES, gated_shape

if TYPE_CHECKING:
    from moespec.advise import Acceptance, Advice, AdvisedTarget, Device

EMBEDDED, TYPED_MODEL = "the embedded model", "by its sizes, typed below"
HERE, TYPED_CARD = "this machine, measured", "by its GB/s, typed below"
RECORDED, TYPED_RATES, TYPED_TOKENS = "recorded, of the embedded model alone", "rates, typed", "tokens per step, typed"
MIXED = "assumed, mixed text: 0.7, 0.65, 0.6"
ASSUMED = {
    "assumed, easy text such as code: 0.85, 0.8, 0.75": "0.85,0.8,0.75",
    MIXED: "0.7,0.65,0.6",
    "assumed, hard text: 0.5, 0.4, 0.3": "0.5,0.4,0.3",
}
PROFILES = (*ASSUMED, RECORDED, TYPED_RATES, TYPED_TOKENS)
TYPED = (TYPED_MODEL, TYPED_CARD, TYPED_RATES, TYPED_TOKENS)
WEIGHTS = {"bf16": BF16_BYTES, "8 bits": 1.0, "4 bits (MXFP4)": MXFP4_BYTES}
# What a typed model's sizes may be: no model is larger, and a slip of the finger is told apart from one.
MOST = {
    "layers": 1_000,
    "experts": 4_096,
    "top-k": 4_096,
    "hidden size": 65_536,
    "expert size": 262_144,
    "words": 4_000_000,
}
MOST_CONTEXT = 10_000_000


@dataclass(frozen=True)
class Sizes:
    """A model as a visitor types it. weights: of the experts, a name of `WEIGHTS`."""

    layers: Any
    experts: Any
    top_k: Any
    hidden: Any
    expert_ffn: Any
    words: Any
    weights: str

    def target(self, context: int) -> AdvisedTarget:
        """Attention of 4 D^2 weights a layer, and keys and values of D each: no grouped heads, so at most that much.

        ValueError names a size that is none.
        """
        from moespec.advise import AdvisedTarget  # here, because torch takes seconds

        numbers = self.layers, self.experts, self.top_k, self.hidden, self.expert_ffn, self.words
        layers, experts, top_k, hidden, expert_ffn, words = (
            whole(value, name, 1, most) for value, (name, most) in zip(numbers, MOST.items(), strict=True)
        )
        if top_k > experts:
            raise ValueError(f"top-k={top_k} is not allowed: use 1 to {experts}, the number of experts.")
        shape = gated_shape(
            "your model", layers, experts, top_k, hidden, expert_ffn, 4 * hidden**2, words, WEIGHTS[self.weights]
        )
        embeddings = BF16_BYTES * words * hidden
        return AdvisedTarget(
            shape=shape,
            weights_bytes=shape.dense_bytes + embeddings + layers * experts * shape.expert_bytes,
            kv_bytes=2 * BF16_BYTES * layers * hidden * context,
            vocab_size=words,
            bytes_per_weight=BF16_BYTES,
        )


@dataclass(frozen=True)
class Question:
    """What a visitor chose. `here` is the machine that the page runs on, where it was asked for."""

    model: str
    sizes: Sizes
    card: str
    gb_per_s: Any
    profile: str
    typed: str
    context: Any

    def advice(self, here: Device | None) -> Advice:
        """ValueError, in one sentence, for what cannot be advised on."""
        from moespec.advise import advise

        context = whole(self.context, "context", 0, MOST_CONTEXT)
        device = here if self.card == HERE and here is not None else self._card()
        target: str | Path | AdvisedTarget = EMBEDDED_TARGET if self.model == EMBEDDED else self.model
        if self.model == TYPED_MODEL:
            target = self.sizes.target(context)
        rates, tokens = self._given()
        return advise(target, device, context=context, acceptance=rates, accepted=tokens)

    def acceptance(self, advice: Advice) -> Acceptance | None:
        """What the advice took for granted; None where nothing is known."""
        from moespec.advise import parse_rates, parse_tokens, read_record, recorded

        rates, tokens = self._given()
        if rates is not None:
            return parse_rates(rates)
        if tokens is not None:
            return parse_tokens(tokens)
        return None if advice.acceptance_source is None else recorded(read_record())

    def accepted_in_words(self, advice: Advice) -> str:
        """Where the acceptance is from."""
        return self.profile if self.profile in ASSUMED else advice.acceptance_source or "not known"

    def _card(self) -> str | Device:
        from moespec.advise import device_of_bandwidth

        if self.card != TYPED_CARD:
            return self.card
        if not isinstance(self.gb_per_s, int | float):
            raise ValueError("The field GB/s is empty: write what the card's memory reads, such as 3350.")
        return device_of_bandwidth(self.gb_per_s)

    def _given(self) -> tuple[str | None, str | None]:
        """(rates, tokens per step), of which one at most is given."""
        if self.profile == RECORDED:
            return None, None
        if self.profile in ASSUMED:
            return ASSUMED[self.profile], None
        if not self.typed.strip():
            raise ValueError(
                "The field Acceptance is empty: write rates such as 0.8,0.7,0.6, or tokens such as 3.1@32."
            )
        typed = self.typed.strip()
        return (typed, None) if self.profile == TYPED_RATES else (None, typed)


def whole(value: Any, name: str, least: int, most: int) -> int:
    """The number. ValueError where it is none, or outside."""
    if not isinstance(value, int | float) or not least <= value <= most or value != int(value):
        shown = "empty" if value is None else f"{value:g}" if isinstance(value, int | float) else repr(value)
        raise ValueError(f"{name} is {shown}: use a whole number, {least:,} to {most:,}.")
    return int(value)
