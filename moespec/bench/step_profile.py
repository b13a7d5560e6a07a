"""Where a device's time goes in a step, by kind of kernel: the profiler's sums. CUDA only. Knows no arms."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

NUM_PROFILED = 4  # steps
# By what stands in a kernel's name, first match first; all else is "dense": projections, norms, output layer, drafting.
_KINDS = {
    "experts": ("gate_up", "down_kernel", "combine_kernel"),
    "routing": ("select_kernel", "group_kernel"),
    "attention": ("fmha", "flash", "attention", "sdpa", "cutlassF"),
    "copies": ("Memcpy", "Memset"),
}


def kind_of(kernel_name: str) -> str:
    """experts, routing, attention, copies or dense."""
    return next((kind for kind, parts in _KINDS.items() if any(part in kernel_name for part in parts)), "dense")


def profile_steps(steps: Iterator[object], num_layers: int) -> dict[str, Any]:
    """Milliseconds of device time a step by kind, and launches per layer, over the next few steps but the first."""
    next(steps)  # what comes before it is not to be seen
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        num_steps = len(list(itertools.islice(steps, NUM_PROFILED)))
        torch.cuda.synchronize()
    events = [event for event in profiled.key_averages() if event.device_type == DeviceType.CUDA]
    kernels = [(event.key, event.self_device_time_total, event.count) for event in events]
    return summed(kernels, num_steps, num_layers)


def summed(kernels: Iterable[tuple[str, float, int]], num_steps: int, num_layers: int) -> dict[str, Any]:
    """`profile_steps` of (name, microseconds of all launches, number of launches) of each kernel."""
    total_us: dict[str, float] = dict.fromkeys((*_KINDS, "dense"), 0.0)
    num_launches = 0
    for name, microseconds, count in kernels:
        kind = kind_of(name)
        total_us[kind] += microseconds
        num_launches += count if kind != "copies" else 0
    parts = {f"{kind}_ms": round(us / 1e3 / num_steps, 4) for kind, us in total_us.items()}
    return parts | {"launches_per_layer": round(num_launches / num_steps / num_layers, 2)}
