"""Calibration files: what was measured once of a model's experts, layers or drafts, for the methods that need it.

Owns the format (safetensors with metadata), where files are looked for, and the refusal of those of another model. How
they are made: `moespec/calibrate/`. Letters as in `types.py`.

| kind          | tensors                                                                                        |
|---------------|------------------------------------------------------------------------------------------------|
| `similarity`  | each of MEASURES [L, E, E]: similarity of two experts' outputs, 1 on the diagonal               |
| `sensitivity` | `budgets` [G]; `kl` [L, G]: divergence of the logits, in nats, with that layer alone budgeted   |
| `acceptance`  | `edges` [P - 1] of path probability; `rate` [N, P]: share of rows committed, by depth and place  |
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from moespec.config import EMBEDDED_TARGET
from moespec.policies.method import RoutedModel

SCHEMA = 1
MEASURES = ("frobenius", "cosine", "cka")
EMBEDDED_PROFILES = EMBEDDED_TARGET.parent / "profiles"


@dataclass(frozen=True)
class Profile:
    """One file: float tensors, fp32 in memory, of one model."""

    kind: str
    model: RoutedModel
    tensors: dict[str, Tensor]

    def of_layer(self, name: str, layer: int) -> Tensor:
        """The entry of a decoder layer in a tensor over MoE layers."""
        return self.tensors[name][self.model.layers.index(layer)]

    def check(self, model: RoutedModel) -> None:
        """ValueError if this was measured on another model, as far as numbers of layers and experts tell."""
        if self.model != model:
            raise ValueError(
                f"the {self.kind} file is of a model with {_described(self.model)}, not {_described(model)}: "
                f"`python -m moespec inspect {self.kind}` makes one of this model."
            )


def profiles_folder(target: str | None, given: Path | None) -> Path | None:
    """Where a target's files are: the folder given, the embedded model's own, or `profiles` in the target's folder."""
    if given is not None:
        return given
    if target is None or Path(target).resolve() == EMBEDDED_TARGET:
        return EMBEDDED_PROFILES
    return Path(target) / "profiles" if Path(target).is_dir() else None


def has_profile(folder: Path | None, kind: str) -> bool:
    return folder is not None and _path(folder, kind).is_file()


def read_profile(folder: Path | None, kind: str, method: str) -> Profile:
    """The file of this kind. ValueError says what makes the one that `method` lacks, or why it cannot be read."""
    if folder is None or not has_profile(folder, kind):
        where = "no folder of calibration files is known" if folder is None else f"{_path(folder, kind)} does not exist"
        raise ValueError(
            f"{method} needs a {kind} file and {where}: `python -m moespec inspect {kind} --out "
            f"{_path(folder or Path('DIR'), kind)}` makes it, and --profiles names its folder."
        )
    path = _path(folder, kind)
    try:
        with safe_open(path, framework="pt") as file:
            notes = file.metadata() or {}
            tensors = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
        if (int(notes["schema"]), notes["kind"]) != (SCHEMA, kind):
            raise ValueError(f"it is {notes['kind']}, schema {notes['schema']}")
        layers, num_experts, top_k = (json.loads(notes[name]) for name in ("layers", "num_experts", "top_k"))
    except (SafetensorError, ValueError, KeyError) as error:
        raise ValueError(f"{path} is no {kind} file of schema {SCHEMA} ({error}).") from error
    return Profile(kind, RoutedModel(tuple(layers), num_experts, top_k), tensors)


def write_profile(path: Path, profile: Profile, notes: dict[str, Any]) -> None:
    """Write the file. `notes`, JSON-safe, say what it was measured on."""
    own = {"schema": SCHEMA, "kind": profile.kind, **vars(profile.model)}
    text = {name: value if isinstance(value, str) else json.dumps(value) for name, value in (notes | own).items()}
    save_file({name: tensor.contiguous() for name, tensor in profile.tensors.items()}, path, metadata=text)


def _path(folder: Path, kind: str) -> Path:
    return folder / f"{kind}.safetensors"


def _described(model: RoutedModel) -> str:
    return f"{len(model.layers)} MoE layers of {model.num_experts} experts, top-{model.top_k}"
