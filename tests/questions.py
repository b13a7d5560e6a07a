"""What must not happen where a CUDA graph is captured, noticed on a CPU."""

from __future__ import annotations

from torch.utils._python_dispatch import TorchDispatchMode

# An answer from the device; or a value made on the host, which would be copied to it (`lift_fresh`).
_FORBIDDEN = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "lift_fresh")


class NoQuestions(TorchDispatchMode):
    """Takes note of operations that would make the host wait for a device, or the device read what the host made."""

    asked: tuple[str, ...] = ()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function)
        if any(part in name for part in _FORBIDDEN):
            self.asked = (*self.asked, name)
        return function(*args, **(kwargs or {}))
