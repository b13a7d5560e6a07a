"""Times a case's contestants side by side: by replays of a graph where that is possible, else by the clock on the wall.

Owns which contestant goes through how many layers, and by which clock. Knows nothing of what contestants do.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moespec.bench.layer_contestants import ROUTER, Contest
from moespec.bench.layers import calls_for_rotation
from moespec.bench.machine import Call, Timing, time_in_rotation

CUDA_ROUNDS, CPU_ROUNDS, PLAIN_ROUNDS = 20, 7, 5
# These copy, or wait for the host at every expert: four layers are enough, others have emptied the cache in between.
_SLOW, _SLOW_CALLS = ("batched_mm", "eager"), 4


@torch.inference_mode()
def relative_error(contest: Contest) -> float:
    """‖layer - golden‖ / ‖golden‖ on the first layer."""
    golden_TD: Tensor = contest.golden().double()
    output: Any = contest.calls["layer"][0]()
    return float((output.double() - golden_TD).norm() / golden_TD.norm())


@torch.inference_mode()
def time_contest(contest: Contest, active_bytes: float, device: torch.device) -> dict[str, tuple[Timing, str, int]]:
    """(timing, clock, number of calls) by contestant; clock: graph or plain."""
    least = calls_for_rotation(active_bytes, device)
    calls = {name: _enough(name, list(some), least, device) for name, some in contest.calls.items()}
    if device.type != "cuda":
        timings = time_in_rotation(calls, device, CPU_ROUNDS)
        return {name: (timing, "plain", len(calls[name])) for name, timing in timings.items()}
    waiting = {name for name, some in calls.items() if _waits_for_device(some[0])}
    replayed = time_in_rotation({name: calls[name] for name in calls if name not in waiting}, device, CUDA_ROUNDS)
    # On the wall clock a call has ended when the device has.
    walled = {name: [_synchronised(call) for call in calls[name]] for name in calls if name in waiting}
    plain = time_in_rotation(walled, torch.device("cpu"), PLAIN_ROUNDS)
    found = {name: (timing, "graph", len(calls[name])) for name, timing in replayed.items()}
    return found | {name: (timing, "plain", len(calls[name])) for name, timing in plain.items()}


def _enough(name: str, calls: list[Call], least: int, device: torch.device) -> list[Call]:
    """All layers on CUDA; on the CPU as many as it takes that none is found in the cache."""
    if name.removeprefix(ROUTER) in _SLOW:
        return calls[:_SLOW_CALLS]
    return calls if device.type == "cuda" else calls[:least]


def _waits_for_device(call: Call) -> bool:
    """Whether a call asks the device for something, which no graph can hold."""
    call()  # compiled and allocated before it is watched
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    except RuntimeError:
        return True
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return False


def _synchronised(call: Call) -> Call:
    def run() -> None:
        call()
        torch.cuda.synchronize()

    return run
