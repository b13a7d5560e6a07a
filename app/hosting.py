"""Where the page runs, and which model may answer there: four kinds of host, a list of models, and what each needs.

Owns the list and the refusals. The kind of host is read from the environment alone: on ZeroGPU nothing may ask for a
GPU before `import spaces`. Knows nothing of how a model is loaded.
"""

from __future__ import annotations

import enum
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

VARIABLE = "MOESPEC_MODEL"
EMBEDDED = "embedded"
SPACE_DISK_BYTES = 50e9  # of a Space without a volume, whatever its hardware
ZERO_LARGE_BYTES, ZERO_XLARGE_BYTES = 48e9, 96e9  # GPU memory of ZeroGPU's two sizes
HALF, SINGLE = 2, 4  # bytes per weight
MARGIN = 1.05  # what a step needs beside the weights, as the engine counts it
HEAD_BYTES = 1.5e9  # allowed for a draft head and the keys and values of conversations


class Hosting(enum.Enum):
    """The kinds of host; the value is what the page says."""

    OWN = "your own machine"
    SPACE_CPU = "a Hugging Face Space, on its CPU"
    SPACE_GPU = "a Hugging Face Space, on its own GPU"
    ZERO_GPU = "a Hugging Face Space, on ZeroGPU: a GPU for each answer"

    @property
    def is_space(self) -> bool:
        return self is not Hosting.OWN

    @staticmethod
    def of(environment: Mapping[str, str]) -> Hosting:
        """By the variables that Spaces set."""
        if environment.get("SPACES_ZERO_GPU", "").lower() in ("1", "t", "true"):
            return Hosting.ZERO_GPU
        if "SPACE_ID" not in environment:
            return Hosting.OWN
        return Hosting.SPACE_CPU if environment.get("ACCELERATOR", "none") in ("", "none") else Hosting.SPACE_GPU


@dataclass(frozen=True)
class HostedModel:
    """A model of the list. None of them is gated: no token is needed.

    num_weights  of the target; it is run in bf16 on a GPU and in fp32 on a CPU
    disk_bytes   what is downloaded, the draft head included
    drafter      an EAGLE-3 head's hub id, or "ngram"
    tap_layers   the layers that the head reads, where its config does not name them
    """

    name: str
    hub_id: str
    num_weights: int
    disk_bytes: float
    drafter: str
    tap_layers: tuple[int, ...] | None = None
    revision: str | None = None  # a commit, once one has been tried; None is the newest
    note: str = ""

    @property
    def gpu_bytes(self) -> float:
        """The least GPU memory."""
        return HALF * self.num_weights * MARGIN + HEAD_BYTES

    def memory_bytes(self, on_gpu: bool) -> float:
        """The least main memory: weights pass through it on their way to a GPU."""
        return (HALF if on_gpu else SINGLE) * self.num_weights * MARGIN

    @property
    def zero_gpu_size(self) -> str:
        """ZeroGPU's name of the smallest size that holds it; "xlarge" costs visitors twice the quota."""
        return "large" if self.gpu_bytes <= ZERO_LARGE_BYTES else "xlarge"

    def disk_needed(self, hosting: Hosting) -> float:
        """ZeroGPU packs the weights into files of its own, beside those that were downloaded."""
        return self.disk_bytes + (HALF * self.num_weights if hosting is Hosting.ZERO_GPU else 0)


# Sizes of the weights: moespec/published.py. Of the heads, what they hold in bf16, rounded up.
MODELS = (
    HostedModel(
        name="OLMoE-1B-7B-0125-Instruct",
        hub_id="allenai/OLMoE-1B-7B-0125-Instruct",
        num_weights=6_919_161_856,
        disk_bytes=15e9,
        drafter="wantsleep/OLMoE_1B_7B_Eagle3",
        tap_layers=(2, 8, 15),
    ),
    HostedModel(
        name="gpt-oss-20b",
        hub_id="openai/gpt-oss-20b",
        num_weights=20_914_757_184,
        disk_bytes=16e9,
        drafter="RedHatAI/gpt-oss-20b-speculator.eagle3",
        note="downloaded in four bits, run in bf16",
    ),
    HostedModel(
        name="Qwen3-30B-A3B-Instruct-2507",
        hub_id="Qwen/Qwen3-30B-A3B-Instruct-2507",
        num_weights=30_532_122_624,
        disk_bytes=63e9,
        drafter="RedHatAI/Qwen3-30B-A3B-Instruct-2507-speculator.eagle3",
        note="more than a Space's own disk holds: attach a volume and point HF_HOME there",
    ),
)


def named_model(environment: Mapping[str, str]) -> HostedModel | None:
    """The model of `MOESPEC_MODEL`, a name or a hub id of the list; None for the embedded one, which is the default.

    ValueError for what is not on the list.
    """
    wanted = environment.get(VARIABLE, "").strip()
    if wanted.lower() in ("", EMBEDDED):
        return None
    found = next((model for model in MODELS if wanted.lower() in (model.name.lower(), model.hub_id.lower())), None)
    if found is None:
        names = ", ".join((EMBEDDED, *(model.name for model in MODELS)))
        raise ValueError(f"{VARIABLE}={wanted} is not on the list of this page: use {names}.")
    return found


@dataclass(frozen=True)
class Room:
    """What a host has, in bytes: GPU memory (0 without a GPU), main memory, disk for one model's files."""

    gpu_bytes: float
    memory_bytes: float
    disk_bytes: float

    @staticmethod
    def of(hosting: Hosting, model: HostedModel, environment: Mapping[str, str]) -> Room:
        """Of this machine. On ZeroGPU the GPU is what Spaces document, since none can be seen between answers."""
        return Room(_gpu_bytes(hosting), _memory_bytes(environment), _disk_bytes(hosting, model))


def check_room(hosting: Hosting, model: HostedModel, room: Room) -> None:
    """ValueError, in one sentence, where the model cannot fit."""
    on_gpu, disk_needed = room.gpu_bytes > 0, model.disk_needed(hosting)
    fits = (
        (not on_gpu or room.gpu_bytes >= model.gpu_bytes)
        and room.memory_bytes >= model.memory_bytes(on_gpu)
        and room.disk_bytes >= disk_needed
    )
    if not fits:
        gpu = f"a GPU with {_gigabytes(room.gpu_bytes)}" if on_gpu else "no GPU"
        with_gpu, without = (_gigabytes(model.memory_bytes(there)) for there in (True, False))
        raise ValueError(
            f"{model.name} cannot run here: it needs a GPU with {_gigabytes(model.gpu_bytes)} and {with_gpu} of "
            f"memory, or {without} without a GPU, and {_gigabytes(disk_needed)} of disk; here are {gpu}, "
            f"{_gigabytes(room.memory_bytes)} of memory and {_gigabytes(room.disk_bytes)} of disk for it."
        )


def _gpu_bytes(hosting: Hosting) -> float:
    if hosting is Hosting.ZERO_GPU:
        return ZERO_XLARGE_BYTES
    import torch  # here, because it takes seconds

    return torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else 0


def _memory_bytes(environment: Mapping[str, str]) -> float:
    """A Space says how much it was assigned ("16Gi"): the kernel would tell of the whole machine."""
    assigned = environment.get("MEMORY", "")
    if assigned.endswith("Gi") and assigned[:-2].isdecimal():
        return int(assigned[:-2]) * 2**30
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _disk_bytes(hosting: Hosting, model: HostedModel) -> float:
    """What is free where the hub's files go, and what is there of this model already."""
    from huggingface_hub.constants import HF_HUB_CACHE

    cache = Path(HF_HUB_CACHE)
    there = next(folder for folder in (cache, *cache.absolute().parents) if folder.exists())
    if hosting.is_space and there.stat().st_dev == Path("/").stat().st_dev:
        return SPACE_DISK_BYTES
    blobs = cache / f"models--{model.hub_id.replace('/', '--')}" / "blobs"
    downloaded = sum(file.stat().st_size for file in blobs.glob("*")) if blobs.is_dir() else 0
    return shutil.disk_usage(there).free + downloaded


def _gigabytes(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:.1f}".removesuffix(".0") + " GB"
