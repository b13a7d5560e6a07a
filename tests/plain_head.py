"""An EAGLE-3 head written out from its formulas in fp64 numpy, and the dynamic tree: what drafting is compared with.

Shares no code with the package. Every path is run from its beginning, one row at a time, without a cache.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

Path = tuple[int, ...]


@dataclass(frozen=True)
class PlainHead:
    """`weights`: by native name; `layer`: the config's numbers; flags: what the checkpoint's own runtime reads."""

    weights: dict[str, np.ndarray]
    layer: dict[str, Any]
    embeddings: np.ndarray
    norm_before_residual: bool = False
    norm_output: bool = False
    norm_before_fc: bool = False
    fc_norm: bool = False
    rope: dict[str, Any] = field(default_factory=dict)

    def logp(self, tokens: list[int], features: np.ndarray, path: Path) -> np.ndarray:
        """log q [draft words] of the token after `path`. `features` [n, F]; `tokens` [n]: row t's is token t + 1."""
        state = self.state(tokens, features, path)
        logits = self.weights["lm_head.weight"] @ self._norm(state, "norm.weight")
        return logits - logits.max() - math.log(np.exp(logits - logits.max()).sum())

    def state(self, tokens: list[int], features: np.ndarray, path: Path) -> np.ndarray:
        """h_out [D] of the last row."""
        keys: list[np.ndarray] = []
        values: list[np.ndarray] = []
        state = np.zeros(0)
        for position, token in enumerate([*tokens, *path]):
            if position < len(tokens):
                g = self._fuse(features[position])
            else:
                g = self._norm(state, "norm.weight") if self.norm_output else state
            state = self._row(g, self.embeddings[token], position, keys, values)
        return state

    def _fuse(self, features: np.ndarray) -> np.ndarray:
        if self.norm_before_fc:
            features = self._norm(features, "input_norm.weight")
        if self.fc_norm:
            taps = np.split(features, sum(name.startswith("fc_norm.") for name in self.weights))
            features = np.concatenate([self._norm(tap, f"fc_norm.{n}.weight") for n, tap in enumerate(taps)])
        return self.weights["fc.weight"] @ features

    def _row(
        self, g: np.ndarray, e: np.ndarray, position: int, keys: list[np.ndarray], values: list[np.ndarray]
    ) -> np.ndarray:
        weights, layer = self.weights, self.layer
        num_heads, num_kv, size = layer["num_attention_heads"], layer["num_key_value_heads"], layer["head_dim"]
        normed = self._norm(g, "midlayer.hidden_norm.weight")
        u = np.concatenate([self._norm(e, "midlayer.input_layernorm.weight"), normed])
        q, k, v = (
            (weights[f"midlayer.self_attn.{name}_proj.weight"] @ u).reshape(heads, size)
            for name, heads in (("q", num_heads), ("k", num_kv), ("v", num_kv))
        )
        keys.append(np.stack([turned(head, position, layer, self.rope) for head in k]))
        values.append(v)
        mixed = []
        for head in range(num_heads):
            of = head * num_kv // num_heads
            query = turned(q[head], position, layer, self.rope)
            scores = np.array([query @ key[of] for key in keys]) / math.sqrt(size)
            shares = np.exp(scores - scores.max())
            mixed.append(sum(s * value[of] for s, value in zip(shares / shares.sum(), values, strict=True)))
        r = (normed if self.norm_before_residual else g) + weights["midlayer.self_attn.o_proj.weight"] @ np.concatenate(
            mixed
        )
        x = self._norm(r, "midlayer.post_attention_layernorm.weight")
        gate, up = (weights[f"midlayer.mlp.{name}_proj.weight"] @ x for name in ("gate", "up"))
        return r + weights["midlayer.mlp.down_proj.weight"] @ (gate / (1 + np.exp(-gate)) * up)

    def _norm(self, x: np.ndarray, name: str) -> np.ndarray:
        return x / np.sqrt((x * x).mean() + self.layer["rms_norm_eps"]) * self.weights[name]


def turned(x: np.ndarray, position: int, layer: dict[str, Any], rope: dict[str, Any]) -> np.ndarray:
    """Rotary position: pairs (i, i + d/2) turned by position * frequency_i."""
    half = len(x) // 2
    out = np.empty_like(x)
    for i in range(half):
        frequency, stretch = frequency_of(i, len(x), layer["rope_theta"], rope)
        c, s = stretch * math.cos(position * frequency), stretch * math.sin(position * frequency)
        out[i], out[i + half] = x[i] * c - x[i + half] * s, x[i + half] * c + x[i] * s
    return out


def frequency_of(i: int, size: int, theta: float, rope: dict[str, Any]) -> tuple[float, float]:
    """The i-th frequency and the factor of cos and sin: plain, linear, of Llama 3.1, or YaRN (arXiv 2309.00071)."""
    frequency = theta ** (-2 * i / size)
    kind = rope.get("kind", "plain")
    if kind == "plain":
        return frequency, 1.0
    factor = rope["factor"]
    if kind == "linear":
        return frequency / factor, 1.0
    turns = rope["original"] * frequency / (2 * math.pi)  # full turns within the length it was trained on
    if kind == "llama3":
        low, high = rope["low"], rope["high"]
        share = min(max((turns - low) / (high - low), 0.0), 1.0)
        return frequency * (share + (1 - share) / factor), 1.0
    # YaRN: dimensions that turn more than 32 times stay, those below one turn are stretched, a ramp between.
    bounds = [size * math.log(rope["original"] / (n * 2 * math.pi)) / (2 * math.log(theta)) for n in (32, 1)]
    first, last = max(math.floor(bounds[0]), 0), min(math.ceil(bounds[1]), size - 1)
    stretched = min(max((i - first) / max(last - first, 1e-3), 0.0), 1.0)
    return frequency * (1 - stretched + stretched / factor), 0.1 * math.log(factor) + 1


def plain_tree(
    logp_below: Callable[[Path], np.ndarray], total_tokens: int, depth: int, top_k: int
) -> dict[Path, float]:
    """Section 2.4's tree, as paths of draft ids to their log-probability: per level the `top_k` best nodes are expanded
    into `top_k` children each; of all of them the best `total_tokens` - 1 are kept."""
    pool: dict[Path, float] = {}
    frontier: list[tuple[float, Path]] = [(0.0, ())]
    for _ in range(depth):
        children = []
        for score, path in frontier:
            below = logp_below(path)
            children += [(score + float(below[token]), (*path, int(token))) for token in np.argsort(-below)[:top_k]]
        pool |= {path: score for score, path in children}
        frontier = sorted(children, reverse=True)[:top_k]
    best = sorted(pool, key=lambda path: -pool[path])[: total_tokens - 1]
    return {path: pool[path] for path in best}
