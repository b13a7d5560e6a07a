"""The results file of a quality run: a header, then one record per line, appended as they come.

Owns resuming: what is done stays done, a line cut off by an interruption is dropped, and a file that another model,
tokenizer or setting wrote is refused. Knows nothing of what the records mean.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import torch
from torch import nn

from moespec.quality.trials import record_key

# A run whose settings differ in one of these measures something else, or measures it elsewhere.
DECIDING = (
    "model_sha256", "drafter_sha256", "tokenizer_sha256", "items_sha256", "texts_sha256", "max_new_tokens", "device",
)  # fmt: skip


class Results:
    """Use `is_done` to skip and `append` to add. `records` are all but the headers, one per start."""

    def __init__(self, path: Path, header: dict, resume: bool) -> None:
        self.path = path
        self.records: list[dict] = []
        if path.exists() and not resume:
            raise ValueError(f"{path} exists: give --resume to go on with it, or another --out.")
        if not path.absolute().parent.is_dir():
            raise ValueError(f"{path} cannot be written: its folder does not exist.")
        if path.exists():
            self._read(header)
        self._write(header)
        self._done = {record_key(record) for record in self.records}

    def is_done(self, key: tuple) -> bool:
        return key in self._done

    def append(self, record: dict) -> None:
        self._done.add(record_key(record))
        self.records.append(record)
        self._write(record)

    def _write(self, record: dict) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")

    def _read(self, header: dict) -> None:
        # As bytes: replies may hold what str.splitlines takes for line ends, and a cut may fall inside a character.
        whole, _, cut_off = self.path.read_bytes().rpartition(b"\n")
        try:
            first, *records = [json.loads(line) for line in whole.split(b"\n")]
            different = [name for name in DECIDING if first["settings"].get(name) != header["settings"][name]]
            self.records = [record for record in records if record["kind"] != "run"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{self.path} is no results file of a quality run ({error}).") from error
        if different:
            raise ValueError(f"{self.path} is of a run with another {different[0]}: give another --out.")
        if cut_off:  # the record under way when the run was interrupted: it is measured again
            os.truncate(self.path, len(whole) + 1)


def weights_sha256(module: nn.Module) -> str:
    """A fingerprint of the weights: their names, shapes, dtypes and bytes."""
    digest = hashlib.sha256()
    for name, parameter in module.named_parameters():
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        digest.update(parameter.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
