"""The number format to train in. Knows nothing of models."""

from __future__ import annotations

import torch


def autocast(device: str) -> torch.autocast:
    """bf16 where the device multiplies it by itself, else a context that does nothing.

    Measured on 2 cores without AVX-512, tokens/s of a full step of the embedded target: bf16 125, fp32 974; with it
    bf16 2,300, fp32 445.
    """
    fast = torch.cuda.is_bf16_supported() if device == "cuda" else torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.autocast(device, dtype=torch.bfloat16, enabled=fast)
