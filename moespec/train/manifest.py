"""Writes the manifest that guards exported weights: size and SHA-256 of every file. Checking is `moespec.integrity`."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

UNGUARDED = ("README.md", "manifest.json")


def write_manifest(folder: Path) -> None:
    """`manifest.json` over every file of the folder except the card and itself."""
    files = {
        path.name: {"size": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        for path in sorted(folder.iterdir())
        if path.is_file() and path.name not in UNGUARDED
    }
    (folder / "manifest.json").write_text(json.dumps({"files": files}, indent=1) + "\n", encoding="utf-8")
