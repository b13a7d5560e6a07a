"""Time between points of a step, also where a device works behind the host. Knows nothing of steps."""

from __future__ import annotations

import time
from typing import Any

import torch


class Clock:
    """Marks points; `ms` waits until the device has passed the later of two and tells the time between them."""

    def __init__(self, device: torch.device) -> None:
        self._is_cuda = device.type == "cuda"

    def mark(self) -> Any:
        """Now: on the host's clock, or in the device's stream, where work that was handed over is not done yet."""
        if not self._is_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def ms(self, earlier: Any, later: Any) -> float:
        if not self._is_cuda:
            return (later - earlier) * 1e3
        later.synchronize()
        return earlier.elapsed_time(later)
