"""Which host a page is on, and which models it takes there."""

from __future__ import annotations

from dataclasses import replace

import pytest

from app.hosting import MODELS, Hosting, Room, check_room, named_model
from moespec.advise.targets import describe_target
from moespec.memory import num_parameters
from moespec.published import published_config

OLMOE, GPT_OSS, QWEN = MODELS
BASIC = {"SPACE_ID": "someone/studio", "ACCELERATOR": "none", "MEMORY": "16Gi", "CPU_CORES": "2"}
GB = 1e9


@pytest.mark.parametrize(
    ("environment", "hosting"),
    [
        ({}, Hosting.OWN),
        ({"ACCELERATOR": "a100-large"}, Hosting.OWN),
        (BASIC, Hosting.SPACE_CPU),
        ({"SPACE_ID": "someone/studio"}, Hosting.SPACE_CPU),
        (BASIC | {"ACCELERATOR": "l4x1"}, Hosting.SPACE_GPU),
        (BASIC | {"SPACES_ZERO_GPU": "true"}, Hosting.ZERO_GPU),
        (BASIC | {"SPACES_ZERO_GPU": "false"}, Hosting.SPACE_CPU),
    ],
)
def test_the_environment_tells_the_host(environment, hosting):
    assert Hosting.of(environment) is hosting


def test_a_model_is_named_by_its_name_or_its_hub_id():
    assert named_model({}) is named_model({"MOESPEC_MODEL": " Embedded "}) is None
    for model in MODELS:
        assert (
            named_model({"MOESPEC_MODEL": model.name.lower()}) is model is named_model({"MOESPEC_MODEL": model.hub_id})
        )
    with pytest.raises(ValueError, match=r"MOESPEC_MODEL=a/b is not on the list of this page: use embedded, OLMoE-1B"):
        named_model({"MOESPEC_MODEL": "a/b"})


@pytest.mark.parametrize(
    ("model", "published"), zip(MODELS, ("OLMoE-1B-7B", "gpt-oss-20b", "Qwen3-30B-A3B"), strict=True)
)
def test_the_list_says_how_large_the_published_models_are(model, published):
    assert model.num_weights == num_parameters(published_config(published))
    as_published = describe_target(published, None, "auto", on_cpu=False, context=0).weights_bytes
    assert as_published < model.disk_bytes < as_published + 3 * GB, "with a draft head"
    assert model.gpu_bytes > 2 * model.num_weights


AMPLE = Room(80 * GB, 142 * GB, 50 * GB)


@pytest.mark.parametrize(
    ("model", "hosting", "room", "fits"),
    [
        (OLMOE, Hosting.SPACE_GPU, Room(23.8 * GB, 30 * GB, 50 * GB), True),  # l4x1
        (OLMOE, Hosting.SPACE_GPU, Room(15.8 * GB, 30 * GB, 50 * GB), False),  # t4-medium
        (OLMOE, Hosting.SPACE_CPU, Room(0, 16 * 2**30, 50 * GB), False),  # cpu-basic
        (OLMOE, Hosting.SPACE_CPU, Room(0, 32 * 2**30, 50 * GB), True),  # cpu-upgrade, in fp32
        (OLMOE, Hosting.ZERO_GPU, Room(96 * GB, 64 * GB, 50 * GB), True),
        (GPT_OSS, Hosting.SPACE_GPU, Room(47.7 * GB, 62 * GB, 50 * GB), True),  # l40sx1
        (GPT_OSS, Hosting.SPACE_GPU, Room(23.8 * GB, 46 * GB, 50 * GB), False),
        (GPT_OSS, Hosting.ZERO_GPU, Room(96 * GB, 64 * GB, 50 * GB), False),  # packed in bf16 beside the download
        (QWEN, Hosting.SPACE_GPU, AMPLE, False),  # the disk
        (QWEN, Hosting.SPACE_GPU, replace(AMPLE, disk_bytes=100 * GB), True),  # a volume
        (QWEN, Hosting.OWN, Room(80 * GB, 60 * GB, 500 * GB), False),  # main memory
    ],
)
def test_what_cannot_fit_is_refused_with_what_it_needs(model, hosting, room, fits):
    if fits:
        check_room(hosting, model, room)
        return
    with pytest.raises(ValueError, match=f"{model.name} cannot run here: it needs a GPU with .* GB of disk; here are"):
        check_room(hosting, model, room)


def test_a_refusal_names_hardware_and_disk():
    with pytest.raises(ValueError) as refused:
        check_room(Hosting.SPACE_GPU, QWEN, AMPLE)
    assert str(refused.value) == (
        "Qwen3-30B-A3B-Instruct-2507 cannot run here: it needs a GPU with 65.6 GB and 64.1 GB of memory, or 128.2 GB "
        "without a GPU, and 63 GB of disk; here are a GPU with 80 GB, 142 GB of memory and 50 GB of disk for it."
    )


def test_a_space_has_the_memory_it_was_assigned_and_fifty_gigabytes(monkeypatch, tmp_path):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", "/no-such-folder/hub")  # beside the system
    room = Room.of(Hosting.SPACE_CPU, OLMOE, BASIC)
    assert room == Room(0, 16 * 2**30, 50 * GB)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    own = Room.of(Hosting.OWN, OLMOE, {})
    assert own.memory_bytes > 1 * GB and own.disk_bytes > 0
    blobs = tmp_path / "hub" / "models--allenai--OLMoE-1B-7B-0125-Instruct" / "blobs"
    blobs.mkdir(parents=True)
    with (blobs / "weights").open("wb") as file:
        file.truncate(10**12)  # sparse: it takes no room
    assert Room.of(Hosting.OWN, OLMOE, {}).disk_bytes > own.disk_bytes + 9e11, "what is downloaded needs no more room"


def test_zero_gpu_lends_the_smallest_size_that_holds_the_model():
    assert [model.zero_gpu_size for model in MODELS] == ["large", "large", "xlarge"]
