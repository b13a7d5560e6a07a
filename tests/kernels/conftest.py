"""The kernels' tests run interpreted on the CPU, at tiny shapes, or compiled on a GPU, at a model's shapes too.

TRITON_INTERPRET=1 must be set before Triton is imported, so they have a process of their own: `make test` sets it
there, `make test-gpu` does not.
"""

from __future__ import annotations

import pytest
import torch

from kernels.checks import IS_INTERPRETED

CAN_RUN = IS_INTERPRETED or torch.cuda.is_available()
# Left out where neither is possible, by a run that collects all of tests/.
collect_ignore_glob = [] if CAN_RUN else ["test_*.py"]
if CAN_RUN and not IS_INTERPRETED:
    collect_ignore_glob = ["test_steps.py", "test_bench_contestants.py"]  # models on the CPU


def pytest_sessionstart() -> None:
    """Called where this folder was asked for by name."""
    if not CAN_RUN:
        raise pytest.UsageError("tests/kernels needs TRITON_INTERPRET=1 in the environment, or a CUDA device.")


@pytest.fixture(autouse=True)
def uninitialised_memory_is_nan():
    """torch.empty is filled with NaN and the largest integers: what a kernel does not write, it must not read."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
