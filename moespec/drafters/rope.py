"""Rotary positions of a draft head: Llama's convention, with scaled frequencies where its config asks for them.

Owns what is read of a config's rope settings, and the refusal of kinds whose frequencies follow a text's length. The
scaled frequencies are transformers' own. Knows nothing of heads beside their shape.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moespec.hf import ROPE_INIT_FUNCTIONS, AutoConfig

# The kinds that are read, and what each cannot do without.
SCALINGS = {
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings"),
}


@dataclass(frozen=True)
class Rope:
    """`scaling`: transformers' parameters of a scaled kind, `rope_type` among them; None for plain frequencies."""

    theta: float = 10000.0
    scaling: dict[str, Any] | None = None

    @staticmethod
    def of(values: dict[str, Any]) -> Rope:
        """A config's rope, in the spelling of transformers 4 (`rope_theta`, `rope_scaling`) or 5 (`rope_parameters`).

        ValueError for a kind that is not supported or lacks a number.
        """
        given = dict(values.get("rope_parameters") or values.get("rope_scaling") or {})
        theta = given.pop("rope_theta", None) or values.get("rope_theta") or 10000.0
        old_name = given.pop("type", None)
        kind = given.setdefault("rope_type", old_name or "default")
        if kind == "default":
            return Rope(theta)
        if kind not in SCALINGS:
            raise ValueError(f"rope scaling {kind!r} is not one of {', '.join(SCALINGS)}")
        if values.get("max_position_embeddings"):
            given.setdefault("original_max_position_embeddings", values["max_position_embeddings"])
        missing = [name for name in SCALINGS[kind] if given.get(name) is None]
        if missing:
            raise ValueError(f"rope scaling {kind!r} lacks {', '.join(missing)}")
        return Rope(theta, given)

    def table(self, positions_N: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
        """cos and sin, fp32 [N, head_dim], halves repeated (the Llama convention)."""
        frequencies, factor = self._frequencies(head_dim, positions_N.device)
        angles = positions_N.float()[:, None] * frequencies
        angles = torch.cat([angles, angles], dim=-1)
        return angles.cos() * factor, angles.sin() * factor

    def _frequencies(self, head_dim: int, device: torch.device) -> tuple[Tensor, float]:
        """fp32 [head_dim / 2], and what cos and sin are multiplied by."""
        if self.scaling is None:
            return self.theta ** -(torch.arange(0, head_dim, 2, device=device).float() / head_dim), 1.0
        parameters = {**self.scaling, "rope_theta": self.theta}
        # transformers compares the lengths and warns of a head that gives the shorter one alone.
        stretched = round(self.scaling["factor"] * self.scaling.get("original_max_position_embeddings", 1))
        config = AutoConfig.for_model(
            "llama", head_dim=head_dim, max_position_embeddings=stretched, rope_parameters=parameters
        )
        return ROPE_INIT_FUNCTIONS[self.scaling["rope_type"]](config, device)


def apply_rotary(x: Tensor, cos_Nd: Tensor, sin_Nd: Tensor) -> Tensor:
    """Rotate [..., N, head_dim] by its rows' positions."""
    first, second = x.chunk(2, dim=-1)
    return x * cos_Nd.to(x.dtype) + torch.cat([-second, first], dim=-1) * sin_Nd.to(x.dtype)
