"""A draft head's files from the model hub, in the local cache. Owns which files are fetched: no code is among them."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import snapshot_download

# In order of preference: a repository that has the first is not asked for the second, which would be the same again.
WEIGHT_PATTERNS = (
    ("model*.safetensors", "model.safetensors.index.json"),
    ("pytorch_model*.bin", "pytorch_model.bin.index.json"),
)


def is_hub_id(name: str) -> bool:
    """Whether it could be one: `owner/name`."""
    owner, slash, rest = name.partition("/")
    return bool(slash and owner and rest) and "/" not in rest and not owner.startswith((".", "~"))


def fetch_head(hub_id: str) -> Path:
    """The local folder with the config and the weights of `owner/name`; what is cached is not fetched again.

    ValueError in one sentence where there is no such repository, or no way to it.
    """
    try:
        for patterns in WEIGHT_PATTERNS:
            folder = Path(snapshot_download(hub_id, allow_patterns=["config.json", *patterns]))
            if any(True for pattern in patterns for _ in folder.glob(pattern)):
                break
    except (OSError, ValueError) as error:  # what the hub's client raises offline, or for a name that is none
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ValueError(
            f"the draft head {hub_id} is no directory here and could not be fetched from the hub: {reason}"
        ) from error
    return folder
