"""What the kernels may know: torch, Triton, themselves."""

from __future__ import annotations

import sys

from tests.test_imports import imports


def test_kernels_know_torch_and_triton():
    known = {"torch", "triton", "kernels", *sys.stdlib_module_names}
    assert [(path, name) for path, name in imports("kernels") if name.split(".")[0] not in known] == []
