"""What a figure was measured on: the machine's card, its ceilings, and the clock that times contestants in rotation.

Owns how a short piece of work is timed: in CUDA graphs with events, on the CPU by the wall clock with torch's threads
as they are set. Knows nothing of engines, models or kernels: what is timed comes in as callables.
"""

from __future__ import annotations

import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from moespec.memory import free_bytes
from moespec.report import cpu_name

Call = Callable[[], object]

NUM_WARMUP_ROUNDS = 2  # not counted: first touches; on CUDA the queue fills, so that no replay waits for the host
CUDA_BUFFER_BYTES, CPU_BUFFER_BYTES = 4 << 30, 512 << 20  # far beyond the cache: an H200 has 60 MB
ROW_LENGTH = 4096  # of the buffer seen as a matrix
NUM_TINY_KERNELS = 1000


@dataclass(frozen=True)
class Timing:
    """Microseconds per call: median, 20th and 80th percentile over the rounds."""

    median_us: float
    p20_us: float
    p80_us: float

    @classmethod
    def of(cls, samples_us: Iterable[float]) -> Timing:
        ordered = sorted(samples_us)
        last = len(ordered) - 1
        return cls(statistics.median(ordered), ordered[round(0.2 * last)], ordered[round(0.8 * last)])


@dataclass(frozen=True)
class Ceilings:
    """What this machine's memory and launches allow; medians.

    read_bytes_per_s  a reduction that only reads, the fastest of several
    read_way          which one that was
    copy_bytes_per_s  from buffer to buffer; bytes read and bytes written both count
    buffer_bytes      of each buffer
    launch_gap_us     from the start of one tiny kernel in a CUDA graph to the next one's; None on the CPU
    """

    read_bytes_per_s: float
    read_way: str
    copy_bytes_per_s: float
    buffer_bytes: int
    launch_gap_us: float | None


@torch.inference_mode()
def time_in_rotation(
    contestants: Mapping[str, Sequence[Call]], device: torch.device, num_rounds: int = 20
) -> dict[str, Timing]:
    """Time each contestant's calls on `device`, all contestants in one run.

    A contestant is a list of calls that do the same work on different data, such as one layer after the other. A round
    makes every call of every contestant once, each contestant's list from its first to its last; the contestant that
    begins moves on from round to round, so that none has a favourite place. One sample is one list, divided by its
    length. So no call finds its own weights in the cache if a list's weights together are far larger than the cache:
    that, and lists of some 100 microseconds at least, is the caller's part.

    On CUDA a list is captured as one graph, after a warm-up on a side stream, and its replay timed with events: calls
    must not wait for the device. ValueError for a contestant without calls or fewer than one round.
    """
    if num_rounds < 1:
        raise ValueError(f"num_rounds={num_rounds} is not allowed: use 1 or more.")
    for name, calls in contestants.items():
        if not calls:
            raise ValueError(f"contestant {name!r} has no calls: give it one or more.")
    names = list(contestants)
    starts = range(NUM_WARMUP_ROUNDS + num_rounds)
    order = [names[(start + place) % len(names)] for start in starts for place in range(len(names))]
    lists_us = _replays_us(contestants, order, device) if device.type == "cuda" else _walls_us(contestants, order)
    samples_us: dict[str, list[float]] = {name: [] for name in names}
    for name, list_us in zip(order, lists_us, strict=True):
        samples_us[name].append(list_us / len(contestants[name]))
    return {name: Timing.of(samples[NUM_WARMUP_ROUNDS:]) for name, samples in samples_us.items()}


def _walls_us(contestants: Mapping[str, Sequence[Call]], order: Sequence[str]) -> list[float]:
    """How long each named list took, in this order."""
    walls_us = []
    for name in order:
        began = time.perf_counter()
        for call in contestants[name]:
            call()
        walls_us.append(1e6 * (time.perf_counter() - began))
    return walls_us


def _replays_us(contestants: Mapping[str, Sequence[Call]], order: Sequence[str], device: torch.device) -> list[float]:
    """How long each named list took, in this order. All replays are queued first: the host is never waited for."""
    with torch.cuda.device(device):
        graphs = {name: _captured(calls) for name, calls in contestants.items()}
        spans = []
        for name in order:
            began, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            began.record()
            graphs[name].replay()
            ended.record()
            spans.append((began, ended))
        torch.cuda.synchronize()
        return [1e3 * began.elapsed_time(ended) for began, ended in spans]


def _captured(calls: Sequence[Call]) -> torch.cuda.CUDAGraph:
    """All calls as one graph. Compilation and first allocations may not happen under capture: they happen before."""
    main, side = torch.cuda.current_stream(), torch.cuda.Stream()
    side.wait_stream(main)
    with torch.cuda.stream(side):
        for call in calls:
            call()
    main.wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph


def measure_ceilings(device: torch.device, buffer_bytes: int | None = None) -> Ceilings:
    """Read and copy bandwidth and the launch gap, measured now. ValueError for a buffer of less than a row.

    `buffer_bytes` is by default 4 GiB on CUDA, or a quarter of the free memory if that is less, and 512 MiB on the CPU.
    Reads: on a two-core EPYC all sums and maxima, in fp32, fp64 or int64, whole, by rows or in chunks, came out equal
    within their spread, bound by memory; the product, slower there, stands for what experts do on a GPU.
    """
    if buffer_bytes is None:
        buffer_bytes = _default_buffer_bytes(device)
    num_rows = buffer_bytes // (4 * ROW_LENGTH)
    if num_rows < 1:
        raise ValueError(f"buffer_bytes={buffer_bytes} is not allowed: use {4 * ROW_LENGTH} or more.")
    # Ones, not zeros: untouched pages of zeros share one physical page, which stays in the cache.
    source_RC = torch.ones(num_rows, ROW_LENGTH, device=device)
    copied_RC, factor_C = torch.empty_like(source_RC), torch.ones(ROW_LENGTH, device=device)
    reads: dict[str, Call] = {
        "sum": lambda: source_RC.sum(),
        "sums of rows": lambda: source_RC.sum(dim=1),
        "matrix-vector product": lambda: torch.mv(source_RC, factor_C),
    }
    copy = {"copy": [lambda: copied_RC.copy_(source_RC)]}
    timings = time_in_rotation({**{way: [read] for way, read in reads.items()}, **copy}, device)
    read_way = min(reads, key=lambda way: timings[way].median_us)
    return Ceilings(
        read_bytes_per_s=1e6 * source_RC.nbytes / timings[read_way].median_us,
        read_way=read_way,
        copy_bytes_per_s=1e6 * 2 * source_RC.nbytes / timings["copy"].median_us,
        buffer_bytes=source_RC.nbytes,
        launch_gap_us=_launch_gap_us(device) if device.type == "cuda" else None,
    )


def _default_buffer_bytes(device: torch.device) -> int:
    if device.type != "cuda":
        return CPU_BUFFER_BYTES
    return min(CUDA_BUFFER_BYTES, free_bytes(device) // 4)  # there are two, and others need memory too


def _launch_gap_us(device: torch.device) -> float:
    value = torch.zeros(1, device=device)
    return time_in_rotation({"tiny": [lambda: value.add_(1)] * NUM_TINY_KERNELS}, device)["tiny"].median_us


def machine_card(device: torch.device, buffer_bytes: int | None = None) -> dict[str, Any]:
    """What figures of this process stand on, JSON-safe, its ceilings measured now (`measure_ceilings`)."""
    is_cuda = device.type == "cuda"
    return {
        "device": device.type,
        "name": torch.cuda.get_device_name(device) if is_cuda else cpu_name(),
        "driver": _driver_version() if is_cuda else None,
        "torch": torch.__version__,
        "triton": _triton_version(),
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "commit": checked_out_commit(),
        "ceilings": asdict(measure_ceilings(device, buffer_bytes)),
    }


def _driver_version() -> str | None:
    """NVIDIA's driver; None where nvidia-smi does not say."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return None


def _triton_version() -> str | None:
    try:
        import triton
    except ImportError:
        return None
    return triton.__version__


def checked_out_commit() -> str | None:
    """The checked-out commit, "+" behind it where files differ from it; None outside a git checkout."""
    folder = Path(__file__).resolve().parents[2]
    try:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=folder, capture_output=True, text=True, check=True)
        changes = subprocess.run(
            ["git", "status", "--porcelain"], cwd=folder, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit.stdout.strip() + ("+" if changes.stdout.strip() else "")
