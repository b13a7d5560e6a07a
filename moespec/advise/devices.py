"""What a device's memory gives: known ones by their datasheets, this one measured, any by its bandwidth.

Owns the table of names. Knows nothing of models.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moespec.bench.machine import measure_ceilings, time_in_rotation
from moespec.memory import free_bytes
from moespec.report import cpu_name

MEASURED, DATASHEET, TYPED = "measured", "datasheet", "typed in"
HERE = ("auto", "cpu", "cuda")
_ROWS, _WIDTH = 32, 1024  # of the product that arithmetic is timed with: its factor of 4 MB stays in a cache


@dataclass(frozen=True)
class Device:
    """bytes_per_s of reading; memory_bytes that weights may take, where known. `source` says where they come from.

    flops_per_s: of products with few rows, where arithmetic counts beside reading: on CPUs. A GPU that reads one weight
    for 64 rows has arithmetic to spare. runs_kernels: whether the engine's Triton kernels and CUDA graphs run on it.
    """

    name: str
    source: str
    bytes_per_s: float
    memory_bytes: int | None = None
    flops_per_s: float | None = None
    kind: str = "cuda"
    runs_kernels: bool = False


# GB/s and GB, from the makers' datasheets.
_DATASHEETS: dict[str, tuple[float, float]] = {
    "A10": (600, 24),
    "A100-40GB": (1555, 40),
    "A100-80GB": (2039, 80),
    "B200": (8000, 180),
    "GH200": (4900, 144),
    "H100-PCIE": (2000, 80),
    "H100": (3350, 80),
    "H200": (4800, 141),
    "L4": (300, 24),
    "L40S": (864, 48),
    "MI300X": (5300, 192),
    "RTX-3090": (936, 24),
    "RTX-4090": (1008, 24),
    "RTX-5090": (1792, 32),
    "T4": (320, 16),
}
DEVICE_NAMES = tuple(_DATASHEETS)
_WITHOUT_KERNELS = ("MI300X", "T4")  # not CUDA; compute capability below that of the kernels


def find_device(name: str) -> Device:
    """One of `HERE`, this machine, measured now; or of `DEVICE_NAMES`, in any case. ValueError for no known name."""
    if name in HERE:
        return this_device(name)
    known = {known.lower(): known for known in _DATASHEETS}
    if name.lower() not in known:
        raise ValueError(f"device={name!r} is not known: use {', '.join((*HERE, *_DATASHEETS))}, or give a bandwidth.")
    name = known[name.lower()]
    gb_per_s, gb = _DATASHEETS[name]
    runs_kernels = name not in _WITHOUT_KERNELS
    return Device(name, DATASHEET, gb_per_s * 1e9, int(gb * 1e9), runs_kernels=runs_kernels)


def device_of_bandwidth(gb_per_s: float) -> Device:
    """Any device whose memory gives so many GB/s. ValueError unless above 0."""
    if not gb_per_s > 0:
        raise ValueError(f"bandwidth={gb_per_s} is not allowed: give GB/s above 0.")
    return Device(f"a device of {gb_per_s:g} GB/s", TYPED, gb_per_s * 1e9)


def this_device(kind: str = "auto") -> Device:
    """This machine, its GPU where torch finds one, measured now, which takes seconds. ValueError for no such device."""
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError("device='cuda' cannot be used here: torch finds none.")
    device = torch.device("cuda" if torch.cuda.is_available() and kind != "cpu" else "cpu")
    is_cuda = device.type == "cuda"
    memory = free_bytes(device)  # before the buffers of the measurement
    return Device(
        name=torch.cuda.get_device_name(device) if is_cuda else f"{cpu_name()}, {torch.get_num_threads()} threads",
        source=MEASURED,
        bytes_per_s=measure_ceilings(device).read_bytes_per_s,
        memory_bytes=memory,
        flops_per_s=None if is_cuda else _flops_per_s(device),
        kind=device.type,
        runs_kernels=is_cuda and torch.cuda.get_device_capability(device) >= (8, 0),
    )


def _flops_per_s(device: torch.device) -> float:
    x_TD, weight_FD = torch.ones(_ROWS, _WIDTH, device=device), torch.ones(_WIDTH, _WIDTH, device=device)
    timing = time_in_rotation({"product": [lambda: x_TD @ weight_FD.T]}, device, num_rounds=100)["product"]
    return 2 * _ROWS * _WIDTH**2 / (timing.p20_us * 1e-6)
