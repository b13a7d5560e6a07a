"""Checks weight files before they are loaded: each broken one gets a sentence that names it and the remedy.

Owns the reading of `manifest.json` (size and SHA-256 of every file). Knows nothing of what the files mean.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

LFS_HEADER = b"version https://git-lfs.github.com/spec/"
WEIGHT_SUFFIXES = (".safetensors", ".bin")


def verify_manifest(folder: Path) -> None:
    """ValueError for a missing, truncated or changed file, a Git-LFS pointer or an unreadable manifest.

    A folder without a manifest is only searched for pointers and empty weight files.
    """
    for path in sorted(folder.iterdir()):
        if path.suffix in WEIGHT_SUFFIXES:
            _refuse_pointer(path)
    manifest = folder / "manifest.json"
    if not manifest.is_file():
        return
    try:
        files = json.loads(manifest.read_text(encoding="utf-8"))["files"]
        expected = {name: (int(entry["size"]), str(entry["sha256"])) for name, entry in files.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{manifest} is not a readable manifest: {_restore(manifest)}.") from error
    for name, (size, digest) in expected.items():
        path = folder / name
        if not path.is_file():
            raise ValueError(f"{path} is missing: {_restore(path)}.")
        if path.stat().st_size != size:
            raise ValueError(f"{path} has {path.stat().st_size} bytes instead of {size}: {_restore(path)}.")
        if hashlib.sha256(path.read_bytes()).hexdigest() != digest:
            raise ValueError(f"{path} does not match its checksum, it is damaged: {_restore(path)}.")


def _refuse_pointer(path: Path) -> None:
    with path.open("rb") as file:
        beginning = file.read(len(LFS_HEADER))
    if beginning == LFS_HEADER:
        raise ValueError(f"{path} is a Git-LFS pointer, not the weights: run `git lfs pull` in its repository.")
    if not beginning:
        raise ValueError(f"{path} is empty: {_restore(path)}.")


def _restore(path: Path) -> str:
    return f"restore it with `git checkout -- {path}`, or download it again"


def tokenizer_sha256(tokenizer: Any) -> str:
    """A fingerprint of which token every id is."""
    vocabulary = json.dumps(sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256(vocabulary.encode()).hexdigest()
