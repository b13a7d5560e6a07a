"""A draft head's weights: files and tensor names that people have, read into one head; and our own, written.

The layer's tensors are `midlayer.*` in the native layout (SafeAILab, SpecForge, SGLang) and `layers.0.*` in that of
speculators (vLLM); SGLang and vLLM read either name in either layout, and so do we. Files are `model.safetensors` or
`pytorch_model.bin`, whole or in parts with an index.

Owns names, shapes and what is refused of them; the config is `head_config.py`'s. Knows nothing of targets or of how a
head drafts. No code of a checkpoint is run: of a pickle tensors are read, and nothing else.
"""

from __future__ import annotations

import json
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from moespec.drafters.head import Eagle3Config, Eagle3Head
from moespec.drafters.head_config import config_of, read_values, to_json
from moespec.integrity import verify_manifest

WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")  # or an index of several, `NAME.index.json`
EMBEDDINGS, LM_HEAD = "embed_tokens.weight", "lm_head.weight"
NUMBERED = "layers.0."  # vLLM's name for `midlayer.`


def load_head(folder: Path, num_target_layers: int, tap_layers: tuple[int, ...] | None = None) -> Eagle3Head:
    """The head of a folder, in the dtype it is stored in. `tap_layers`: instead of those that its config names.

    Without embeddings or an output layer of its own it needs the target's: see `Eagle3Head`. ValueError in one sentence
    for what is no EAGLE-3 head: it lists what is missing, unknown or of another shape.
    """
    verify_manifest(folder)
    path = folder / "config.json"
    values = read_values(path)
    config = config_of(path, values, num_target_layers, tap_layers)
    with torch.device("meta"):  # the weights come from the file: none are made up first
        head = Eagle3Head(config)
    tensors = _read_tensors(folder)
    is_numbered = any(name.startswith(NUMBERED) for name in tensors)
    if is_numbered:
        tensors = {_native_name(name): tensor for name, tensor in tensors.items()}
    _complete_vocabulary(tensors, config)
    expected = {name: tuple(tensor.shape) for name, tensor in head.state_dict().items()}
    if EMBEDDINGS in tensors:
        expected[EMBEDDINGS] = (config.vocab_size, config.hidden_size)
    if LM_HEAD not in tensors and values.get("draft_vocab_size") is None and not values.get("tie_word_embeddings"):
        del expected[LM_HEAD]  # as SGLang reads it, it borrows the target's
    if "t2d" not in tensors:
        expected.pop("t2d", None)  # it is made of `d2t`, if that is there
    problems = _problems(tensors, expected)
    if problems:
        spelled = problems.replace("midlayer.", NUMBERED) if is_numbered else problems
        raise ValueError(f"{folder} is no EAGLE-3 head that fits its config.json: {spelled}.")
    endless = [name for name, tensor in tensors.items() if not torch.isfinite(tensor.float()).all()]
    if endless:
        raise ValueError(f"{folder} has values that are not finite in {', '.join(endless)}: fetch it again.")
    head.embeddings = tensors.pop(EMBEDDINGS, None)
    head.load_state_dict(tensors, strict=False, assign=True)
    return head.requires_grad_(False).eval()


def save_head(head: Eagle3Head, folder: Path, dtype: torch.dtype = torch.bfloat16) -> None:
    """Write config.json and model.safetensors in the native layout."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(to_json(head.config), indent=1) + "\n", encoding="utf-8")
    tensors = {
        name: tensor.detach().to(dtype).contiguous() if tensor.is_floating_point() else tensor
        for name, tensor in head.state_dict().items()
    }
    save_file(tensors, folder / "model.safetensors")


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for file in _weight_files(folder):
        try:
            part = load_file(file) if file.suffix == ".safetensors" else _unpickled(file)
        except (SafetensorError, UnpicklingError, EOFError, RuntimeError, TypeError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ValueError(f"{file} is damaged, cut short or no plain weights ({reason}): fetch it again.") from error
        tensors |= part
    return tensors


def _unpickled(file: Path) -> dict[str, Tensor]:
    """Tensors alone: a pickle that would call anything else is not read on."""
    found = torch.load(file, map_location="cpu", weights_only=True)
    if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
        raise TypeError("it holds no table of tensors")
    return found


def _weight_files(folder: Path) -> list[Path]:
    for name in WEIGHT_FILES:
        index = folder / f"{name}.index.json"
        if (folder / name).is_file():
            return [folder / name]
        if index.is_file():
            try:
                listed = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
                parts = sorted({folder / part for part in listed})
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ValueError(f"{index} is no readable index ({error}): fetch it again.") from error
            missing = [part.name for part in parts if not part.is_file()]
            if missing:
                raise ValueError(f"{folder} lacks {', '.join(missing)} of its index: fetch it again.")
            return parts
    raise ValueError(f"{folder} has neither {' nor '.join(WEIGHT_FILES)}, nor an index of either.")


def _native_name(name: str) -> str:
    return f"midlayer.{name.removeprefix(NUMBERED)}" if name.startswith(NUMBERED) else name


def _complete_vocabulary(tensors: dict[str, Tensor], config: Eagle3Config) -> None:
    """Make `d2t` and `t2d` what the config says: some heads have them although they draft all words, or `d2t` alone."""
    d2t = tensors.get("d2t")
    if d2t is None or d2t.shape != (config.draft_vocab_size,):
        return
    if config.draft_vocab_size == config.vocab_size and not d2t.any():
        del tensors["d2t"]
        tensors.pop("t2d", None)
    elif "t2d" not in tensors:
        tensors["t2d"] = torch.isin(torch.arange(config.vocab_size), d2t + torch.arange(len(d2t)))


def _problems(tensors: dict[str, Tensor], expected: dict[str, tuple[int, ...]]) -> str:
    """What is wrong with the tensors, in words; empty if nothing is."""
    missing, unknown = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
    others = [
        f"{name} {[*tensors[name].shape]} instead of {[*shape]}"
        for name, shape in sorted(expected.items())
        if name in tensors and tuple(tensors[name].shape) != shape
    ]
    parts = {"missing": missing, "unknown": unknown, "of another shape": others}
    return "; ".join(f"{what} {', '.join(names)}" for what, names in parts.items() if names)
