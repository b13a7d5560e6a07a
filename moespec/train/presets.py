"""The embedded models' shapes and recipes. Owns the numbers and who fills them in; knows nothing of training.

64 experts with top-8 is OLMoE's ratio, so that budgets of 8, 12, 16, 24, 32 and 48 all mean something.
`norm_topk_prob` keeps the scale of a layer's output when experts are dropped.
"""

from __future__ import annotations

import argparse

TARGET_CONFIG: dict = {
    "vocab_size": 6144,
    "hidden_size": 256,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 64,
    "norm_topk_prob": True,
    "tie_word_embeddings": True,
    "max_position_embeddings": 4096,
    "router_aux_loss_coef": 0.001,
}

# `train target --preset cpu` takes about five hours of two cores; `gpu` six minutes of an H200 (0.71 M tokens/s).
TARGET_RECIPES: dict[str, dict] = {
    "cpu": {"tokens": 26_000_000, "batch_tokens": 4_096, "lr": 3e-3, "workers": 0},
    "gpu": {"tokens": 260_000_000, "batch_tokens": 65_536, "lr": 3e-3, "workers": 12},
}

DRAFTER_RECIPES: dict[str, dict] = {
    "cpu": {"tokens": 5_000_000, "batch_tokens": 2_048, "lr": 1e-3, "workers": 0},
    "gpu": {"tokens": 60_000_000, "batch_tokens": 16_384, "lr": 2e-3, "workers": 6},
}


def complete(args: argparse.Namespace, recipes: dict[str, dict]) -> None:
    """Fill in what was not asked for from the recipe of `args.preset`; its tokens not where minutes were given."""
    for name, value in recipes[args.preset].items():
        if getattr(args, name) is None and not (name == "tokens" and args.minutes is not None):
            setattr(args, name, value)
