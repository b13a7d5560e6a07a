"""CUDA graphs: a function of fixed shape captured once, then replayed with one launch.

Where there are none, or a capture fails, functions are called as they are, and the reason is kept. Knows nothing of
what they compute.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

NUM_WARM_UPS = 2  # compile the kernels, let libraries make their workspaces: neither can be captured

Outputs = TypeVar("Outputs")


class Graphs:
    """Functions of fixed shape, each captured on its first call. On a CPU, or after a failure, called as they are."""

    def __init__(self, device: torch.device) -> None:
        self.reason: str | None = None if device.type == "cuda" else f"there are no graphs on {device.type}"
        self._device = device
        self._pool = torch.cuda.graph_pool_handle() if self.reason is None else None

    def capture(self, function: Callable[[], Outputs]) -> Callable[[], Outputs]:
        """A function that does the same on the same buffers with one launch, and returns the same tensors each time.

        It must not ask the device for anything; a failed capture ends all later ones, for what it left is not known.
        """
        if self.reason is not None:
            return function
        graph = torch.cuda.CUDAGraph()
        try:
            side = torch.cuda.Stream(self._device)
            side.wait_stream(torch.cuda.current_stream(self._device))
            with torch.cuda.stream(side):
                for _ in range(NUM_WARM_UPS):
                    function()
            torch.cuda.current_stream(self._device).wait_stream(side)
            with torch.cuda.graph(graph, pool=self._pool):
                outputs = function()
        except RuntimeError as error:  # what torch raises for an operation that cannot be captured
            self.reason = f"a step could not be captured ({str(error).splitlines()[0]})"
            torch.cuda.synchronize(self._device)
            return function

        def replay() -> Outputs:
            graph.replay()
            return outputs

        return replay
