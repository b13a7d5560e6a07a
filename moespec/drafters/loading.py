"""Which drafter an engine gets: a head beside the target, a named one, or none. Owns matching head to target."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moespec.drafters.base import Drafter
from moespec.drafters.eagle3 import Eagle3Drafter, make_pass
from moespec.drafters.head import load_head
from moespec.drafters.ngram import NgramDrafter
from moespec.target import Target


def find_drafter(wanted: str | Path | Drafter | None, target: Target, folder: Path | None) -> Drafter | None:
    """`wanted`: None, a Drafter, "none", "ngram", "auto" (a head beside `folder`, else n-gram) or a head's folder.

    ValueError if a head is broken or does not fit the target.
    """
    if wanted is None or wanted == "none":
        return None
    if wanted == "ngram":
        return NgramDrafter(device=target.device)
    if wanted == "auto":
        beside = [] if folder is None else [folder / "drafter", folder.parent / "drafter"]
        found = next((path for path in beside if (path / "config.json").is_file()), None)
        return NgramDrafter(device=target.device) if found is None else load_eagle3(found, target)
    if isinstance(wanted, str | Path):
        if not Path(wanted).is_dir():
            raise ValueError(f"drafter {wanted} is neither a directory nor one of auto, ngram, none.")
        return load_eagle3(Path(wanted), target)
    return wanted


def load_eagle3(folder: Path, target: Target) -> Eagle3Drafter:
    """The head in `folder`, on the target's device and with the target's embeddings where it has none of its own."""
    head = load_head(folder, len(target.layers))
    config = head.config
    mismatches = [
        f"{what} {ours} for the target's {theirs}"
        for what, ours, theirs in (
            ("vocabulary", config.vocab_size, target.vocab_size),
            ("feature width", config.target_hidden_size, target.hidden_size),
        )
        if ours != theirs
    ]
    if max(config.tap_layers) >= len(target.layers):
        mismatches.append(f"tap layer {max(config.tap_layers)} for the target's {len(target.layers)} layers")
    embeddings: Any = target.model.get_input_embeddings().weight
    if head.embeddings is None and config.hidden_size != embeddings.shape[1]:
        mismatches.append(f"width {config.hidden_size} for the target's embeddings of {embeddings.shape[1]}")
    own_shape = (config.vocab_size, config.hidden_size)
    if head.embeddings is not None and tuple(head.embeddings.shape) != own_shape:
        mismatches.append(f"embeddings {tuple(head.embeddings.shape)} for its own {own_shape}")
    if config.num_attention_heads % config.num_key_value_heads:
        mismatches.append(f"{config.num_attention_heads} heads over {config.num_key_value_heads} key-value heads")
    ids_V = head.draft_ids()
    if ids_V is not None and not 0 <= int(ids_V.min()) <= int(ids_V.max()) < target.vocab_size:
        mismatches.append(f"draft tokens {int(ids_V.min())} to {int(ids_V.max())} for {target.vocab_size} words")
    if mismatches:
        raise ValueError(f"the draft head {folder} does not fit the target: it has {', '.join(mismatches)}.")
    head = head.to(target.device, target.dtype)
    own = embeddings.detach() if head.embeddings is None else head.embeddings
    head.embeddings = own.to(target.device, target.dtype)
    return Eagle3Drafter(head, target.max_context, make_pass(head, target.max_context, target.graphs))
