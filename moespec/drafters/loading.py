"""Which drafter an engine gets, and why: a head beside the target, a named one, a small model, look-up or none.

Owns the choice and the matching of a head to its target. Knows nothing of how any of them drafts.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from moespec.drafters.base import Drafter
from moespec.drafters.checkpoint import load_head
from moespec.drafters.eagle3 import Eagle3Drafter, make_pass
from moespec.drafters.head import Eagle3Head
from moespec.drafters.hub import fetch_head, is_hub_id
from moespec.drafters.ngram import NgramDrafter
from moespec.drafters.small_model import load_small_model
from moespec.target import Target

SMALL_MODEL = "model:"  # what the name of a small draft model begins with


@dataclass(frozen=True)
class DrafterChoice:
    """A drafter, or none, and why it is this one, in words."""

    drafter: Drafter | None
    reason: str


def find_drafter(
    wanted: str | Path | Drafter | None,
    target: Target,
    folder: Path | None,
    tap_layers: tuple[int, ...] | None = None,
) -> DrafterChoice:
    """`wanted`: None or "none"; "ngram"; "auto" (a head beside `folder`, else n-gram); a head's folder or hub id;
    "model:PATH", a small model's folder or hub id; a Drafter.

    `tap_layers`: the decoder layers whose entering residual a head reads, instead of those that its config names.
    ValueError if what is wanted is not there, is broken or does not fit the target.
    """
    if wanted == "auto":
        head, reason = _head_beside(folder), "a head was found beside the target"
        if head is None:
            wanted, reason = "ngram", "no head beside the target: prompt look-up"
    else:
        head, reason = _named_head(wanted), "asked for"
    if head is not None:
        return DrafterChoice(load_eagle3(head, target, tap_layers), reason)
    if tap_layers is not None:
        raise ValueError(f"tap_layers={[*tap_layers]} is for a draft head: drafter {wanted!r} reads no taps.")
    if wanted is None or wanted == "none":
        return DrafterChoice(None, reason)
    if wanted == "ngram":
        return DrafterChoice(NgramDrafter(device=target.device), reason)
    if isinstance(wanted, str | Path):
        return DrafterChoice(load_small_model(str(wanted).removeprefix(SMALL_MODEL), target), reason)
    return DrafterChoice(wanted, reason)


def _head_beside(folder: Path | None) -> Path | None:
    places = [] if folder is None else [folder / "drafter", folder.parent / "drafter"]
    return next((place for place in places if (place / "config.json").is_file()), None)


def _named_head(wanted: str | Path | Drafter | None) -> Path | None:
    """The folder of a head that is named by its own or by its hub id; None for what names no head.

    ValueError for a name that means nothing, and for a head that cannot be fetched.
    """
    if not isinstance(wanted, str | Path) or wanted in ("none", "ngram") or str(wanted).startswith(SMALL_MODEL):
        return None
    if Path(wanted).is_dir():
        return Path(wanted)
    if is_hub_id(str(wanted)):
        return fetch_head(str(wanted))
    raise ValueError(
        f"drafter {wanted} is neither a directory, a hub id (owner/name), nor one of auto, ngram, none, model:PATH."
    )


def load_eagle3(folder: Path, target: Target, tap_layers: tuple[int, ...] | None = None) -> Eagle3Drafter:
    """The head in `folder`, on the target's device, with the target's embeddings and output layer where it has none."""
    head = load_head(folder, len(target.layers), tap_layers)
    embeddings: Any = target.model.get_input_embeddings().weight
    lm_head: Any = target.model.get_output_embeddings().weight
    mismatches = _mismatches(head, target, embeddings.shape[1], lm_head.shape[1])
    if mismatches:
        raise ValueError(f"the draft head {folder} does not fit the target: it has {', '.join(mismatches)}.")
    if head.lacks_lm_head:
        head.lm_head.weight = nn.Parameter(lm_head.detach(), requires_grad=False)
    head = head.to(target.device, target.dtype)
    own = embeddings.detach() if head.embeddings is None else head.embeddings
    head.embeddings = own.to(target.device, target.dtype)
    return Eagle3Drafter(head, target.max_context, make_pass(head, target.max_context, target.graphs))


def _mismatches(head: Eagle3Head, target: Target, embedding_width: int, output_width: int) -> list[str]:
    """What a head has that is not the target's, in words."""
    config, num_layers = head.config, len(target.layers)
    numbers = [
        ("vocabulary", config.vocab_size, target.vocab_size),
        ("feature width", config.target_hidden_size, target.hidden_size),
    ]
    if head.embeddings is None:
        numbers.append(("width, to go with the target's embeddings,", config.hidden_size, embedding_width))
    if head.lacks_lm_head:
        numbers.append(("width, to go with the target's output layer,", config.hidden_size, output_width))
    found = [f"{what} {ours} for the target's {theirs}" for what, ours, theirs in numbers if ours != theirs]
    outside = [number for number in config.tap_layers if not 0 <= number < num_layers]
    if outside:
        found.append(f"tap layers {', '.join(map(str, outside))} for the target's 0 to {num_layers - 1}")
    ids_V = head.draft_ids()
    if ids_V is not None and not 0 <= int(ids_V.min()) <= int(ids_V.max()) < target.vocab_size:
        found.append(f"draft tokens {int(ids_V.min())} to {int(ids_V.max())} for {target.vocab_size} words")
    return found
