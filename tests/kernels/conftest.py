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
    collect_ignore_glob = ["test_steps.py", "test_bench_contestants.py", "test_fused_attention.py"]  # models on the CPU


def pytest_sessionstart() -> None:
    """Called where this folder was asked for by name."""
    if not CAN_RUN:
        raise pytest.UsageError("tests/kernels needs TRITON_INTERPRET=1 in the environment, or a CUDA device.")
    if IS_INTERPRETED:
        _look_languages_through_once()


def _look_languages_through_once() -> None:
    """At each call of one function by another, Triton's interpreter looks all of the language through for what it is to
    replace: once for each function is enough. That was a quarter of a run."""
    from triton.runtime import interpreter

    replaced = set()

    def call(self: interpreter.InterpretedFunction, *args: object, **kwargs: object) -> object:
        if self.fn not in replaced:
            interpreter._patch_lang(self.fn)
            replaced.add(self.fn)
        return self.rewrite()(*args, **kwargs)

    interpreter.InterpretedFunction.__call__ = call


@pytest.fixture(autouse=True)
def uninitialised_memory_is_nan():
    """torch.empty is filled with NaN and the largest integers: what a kernel does not write, it must not read."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
