"""A small draft model: any causal transformers model, dense or MoE, that shares the target's tokenizer.

It drafts the same dynamic tree as a head does, on a KV cache of its own and with a tree mask. Owns that cache, what has
been read into it, and the check that the two models mean the same by a token. Knows nothing of the target beside that.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moespec.dense import additive_mask
from moespec.drafters.base import DraftContext
from moespec.kv_cache import TreeCache
from moespec.models import load_model
from moespec.target import Target
from moespec.tree import Best, Frontier, best_tokens, grow_tree, num_asked, root_only, seen_below
from moespec.types import DraftTree

PROBES = ("Hello, world!", "def f(x):\n    return x**2  # naïve", "3.14159 is 日本語 🙂", "  two  spaces\tand a tab\n")


class SmallModelDrafter:
    """Drafts with `model`; of its logits those of the first `vocab_size` ids are read, which are the target's."""

    tap_layers: tuple[int, ...] = ()

    def __init__(self, model: Any, vocab_size: int, name: str = "small model") -> None:
        config = model.config.get_text_config()
        self.name, self.model, self._vocab_size = name, model, vocab_size
        self._device = next(model.parameters()).device
        self._max_context: int = config.max_position_embeddings
        self._cache = TreeCache(config.num_hidden_layers)  # committed positions, between two proposals

    def observe(self, features_NF: Tensor | None) -> None:
        """Nothing to keep: what is committed comes with the context."""

    def fork(self) -> SmallModelDrafter:
        """Of the same model, with a cache of its own."""
        return SmallModelDrafter(self.model, self._vocab_size, self.name)

    def truncate(self, length: int) -> None:
        self._cache.truncate(min(length, self._cache.length))

    @torch.inference_mode()
    def propose(self, context: DraftContext) -> DraftTree:
        """Catch up with the committed tokens, then grow the tree; just the root where the model's context ends."""
        token_ids, config = context.token_ids, context.bounded_tree
        length = len(token_ids)
        if config.total_tokens == 1 or length + config.depth > self._max_context:
            return root_only(token_ids[-1], self._device)
        # Where nothing is new the root is read once more: it is its logits that the tree begins with.
        start = min(self._cache.length, length - 1)
        self._cache.truncate(start)
        tokens_N = torch.tensor(token_ids[start:], device=self._device)
        positions_N = torch.arange(start, length, device=self._device)
        num_best = num_asked(config)
        best = best_tokens(self.logits(tokens_N, positions_N, None, keep=1), num_best)
        drafted = grow_tree(best, _TreeScorer(self, length, num_best, self._device), token_ids[-1], config)
        self._cache.truncate(length)
        return drafted

    def logits(self, tokens_N: Tensor, positions_N: Tensor, seen_NM: Tensor | None, keep: int) -> Tensor:
        """[keep, V] of the last rows. Without `seen_NM` they are causal; with it they see, of the last M keys, what it
        says, and all before those."""
        mask = None
        if seen_NM is not None:
            num_free = self._cache.length + len(tokens_N) - seen_NM.shape[1]
            mask = additive_mask(num_free, seen_NM, self.model.dtype)[None, None]
        output = self.model(
            input_ids=tokens_N[None],
            position_ids=positions_N[None],
            attention_mask=mask,
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=keep,
        )
        return output.logits[0, :, : self._vocab_size]


class _TreeScorer:
    """Scores the frontier of a growing tree; its rows lie in the cache behind the committed ones."""

    def __init__(self, drafter: SmallModelDrafter, length: int, num_best: int, device: torch.device) -> None:
        self._drafter, self._length, self._num_best = drafter, length, num_best
        self._seen_NR = torch.zeros(1, 0, dtype=torch.bool, device=device)  # of the previous call's rows

    def __call__(self, frontier: Frontier) -> Best:
        self._seen_NR = seen_below(self._seen_NR, frontier)
        num_rows = len(frontier.tokens_N)
        # The root has position length - 1, so its children have position length, equal for siblings.
        positions_N = torch.full_like(frontier.tokens_N, self._length + frontier.level - 1)
        logits_NV = self._drafter.logits(frontier.tokens_N, positions_N, self._seen_NR, keep=num_rows)
        return best_tokens(logits_NV, self._num_best)


def load_small_model(path: str, target: Target) -> SmallModelDrafter:
    """The model of a directory or hub id, on the target's device and in its dtype.

    ValueError in one sentence where it cannot be loaded, does not share the target's tokenizer, or has layers that a
    draft tree cannot use.
    """
    if target.tokenizer is None:
        raise ValueError(f"{path} cannot draft: the target has no tokenizer to compare its own with.")
    model, tokenizer = load_model(path, device=str(target.device), dtype=target.dtype)
    config = model.config.get_text_config()
    other_layers = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
    if getattr(config, "sliding_window", None) or other_layers or not hasattr(config, "max_position_embeddings"):
        raise ValueError(f"{path} cannot draft: it has layers other than full attention, which a draft tree needs.")
    difference = _difference(target.tokenizer, tokenizer)
    if difference:
        raise ValueError(f"{path} cannot draft, it does not share the target's tokenizer: {difference}.")
    if config.vocab_size < target.vocab_size:
        raise ValueError(f"{path} cannot draft: it knows {config.vocab_size} of the target's {target.vocab_size} ids.")
    return SmallModelDrafter(model, target.vocab_size, f"small model {Path(path).name}")


def _difference(ours: Any, theirs: Any) -> str:
    """Where two tokenizers differ, in words; empty if they agree on every token and on a few texts."""
    our_ids, their_ids = ours.get_vocab(), theirs.get_vocab()
    tokens = [token for token in {**our_ids, **their_ids} if our_ids.get(token) != their_ids.get(token)]
    if tokens:
        return f"{len(tokens)} tokens have other ids, such as {tokens[0]!r}"
    for text in PROBES:
        encoded = [tokenizer.encode(text, add_special_tokens=False) for tokenizer in (ours, theirs)]
        if encoded[0] != encoded[1]:
            return f"it reads {text!r} as {encoded[1]}, not as {encoded[0]}"
    return ""
