"""What only a CUDA device can show. `make test-gpu` runs this folder, `make test` does not collect it."""

from __future__ import annotations

import pytest
import torch

collect_ignore_glob = [] if torch.cuda.is_available() else ["test_*.py"]


def pytest_sessionstart() -> None:
    """Called where this folder was asked for by name."""
    if not torch.cuda.is_available():
        raise pytest.UsageError("tests/gpu needs a CUDA device, and torch finds none.")
