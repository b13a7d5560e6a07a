"""CUDA graphs: a function of fixed shape captured once, then replayed with one launch.

Where there are none, or a capture fails, functions are called as they are, and the reason is kept. Knows nothing of
what they compute.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch

NUM_WARM_UPS = 2  # compile the kernels, let libraries make their workspaces: neither can be captured
_log = logging.getLogger(__name__)

Outputs = TypeVar("Outputs")


class Graphs:
    """Functions of fixed shape, each captured on its first call. On a CPU, or after a failure, called as they are."""

    def __init__(self, device: torch.device) -> None:
        self.reason: str | None = None if device.type == "cuda" else f"there are no graphs on {device.type}"
        # One for all: a library's workspace is made anew for each stream.
        self._side = torch.cuda.Stream(device) if self.reason is None else None

    def capture(self, function: Callable[[], Outputs]) -> Callable[[], Outputs]:
        """A function that does the same on the same buffers with one launch, and returns the same tensors each time.

        It must not ask the device for anything; a failed capture ends all later ones, for what it left is not known.
        Every graph has its own memory: in a shared pool one's outputs may lie where another computes.
        """
        if self.reason is not None or self._side is None:
            return function
        before = torch.cuda.current_stream()
        self._side.wait_stream(before)
        with torch.cuda.stream(self._side):
            for _ in range(NUM_WARM_UPS):
                function()
        before.wait_stream(self._side)
        graph = torch.cuda.CUDAGraph()
        try:
            # Of this thread's calls alone: another's, such as a page's, must not void it.
            with torch.cuda.graph(graph, stream=self._side, capture_error_mode="thread_local"):
                outputs = function()
        except RuntimeError as error:  # what torch raises for an operation that cannot be captured
            self.reason = f"a step could not be captured ({str(error).splitlines()[0]})"
            _log.warning("no CUDA graphs from now on: %s", self.reason, exc_info=error)
            torch.cuda.set_stream(before)
            torch.cuda.synchronize()
            return function

        def replay() -> Outputs:
            graph.replay()
            return outputs

        return replay


class Prepared(Generic[Outputs]):
    """Functions of several shapes, each made and captured when it is first wanted: `fill` of what is made takes what is
    given, and `run` computes on it and asks the device for nothing."""

    def __init__(self, graphs: Graphs) -> None:
        self._graphs = graphs
        self.by_shape: dict[Any, tuple[Any, Callable[[], Outputs]]] = {}

    def run(self, shape: Any, make: Callable[[], Any], given: tuple) -> Outputs:
        """The outputs for what the buffers are filled with; they last until the shape is run again."""
        if shape not in self.by_shape:
            made = make()
            made.fill(*given)  # a capture runs it, on something that makes sense
            self.by_shape[shape] = made, self._graphs.capture(made.run)
        filled, run = self.by_shape[shape]
        filled.fill(*given)
        return run()
