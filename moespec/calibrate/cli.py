"""`python -m moespec inspect similarity | sensitivity | acceptance`: arguments, the file, a table. Knows no measure."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from moespec.calibrate import acceptance, sensitivity, similarity
from moespec.calibrate.texts import PROMPTS, own_texts
from moespec.engine import Engine
from moespec.policies.profiles import MEASURES, Profile, write_profile
from moespec.quality.inspect_cli import table
from moespec.quality.specialisation import check_drafter
from moespec.quality.trials import read_texts

# By default, in minutes on two CPU cores with the embedded model. Time is linear in them, of CKA quadratic.
NUM_TOKENS = {"similarity": 4096, "sensitivity": 512, "acceptance": 4096}


def add_calibration(parser: argparse.ArgumentParser, kind: str, load: Callable[[argparse.Namespace], Engine]) -> None:
    """Arguments and handler of `inspect KIND`."""
    inspect = {"similarity": inspect_similarity, "sensitivity": inspect_sensitivity, "acceptance": inspect_acceptance}
    parser.set_defaults(handler=lambda args: inspect[kind](load(args), args))
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help=f"DIR/{kind}.safetensors")
    parser.add_argument("--texts", type=Path, metavar="FILE", help="read these; default: what the model writes")
    parser.add_argument("--tokens", type=int, default=NUM_TOKENS[kind], metavar="N", help="of text, at most")


def inspect_similarity(engine: Engine, args: argparse.Namespace) -> int:
    """Write the similarity of all experts, and print how alike they are."""
    texts, notes = _texts(engine, args)
    by_layer = []
    for moe, x_ND in zip(engine.target.moe_layers, similarity.expert_inputs(engine.target, texts), strict=True):
        by_layer.append(similarity.similarities(similarity.all_experts(engine.target, moe.experts), x_ND))
        _progress(f"similarity: layer {moe.layer}")
    tensors = {name: torch.stack([found[name] for found in by_layer]) for name in MEASURES}
    # Half precision: off by less than a sample of texts is.
    halves = {name: tensor.half() for name, tensor in tensors.items()}
    write_profile(args.out, Profile("similarity", engine.routed_model, halves), notes | {"measures": list(MEASURES)})
    off_diagonal_EE = ~torch.eye(engine.target.num_experts, dtype=torch.bool)
    rows = [
        [str(moe.layer)]
        + [f"{tensors[name][n][off_diagonal_EE].median():.3f}, {_nearest(tensors[name][n]):.3f}" for name in MEASURES]
        for n, moe in enumerate(engine.target.moe_layers)
    ]
    print("Two experts' similarity, and an expert's to its nearest: medians.\n")
    print(table(["layer", *MEASURES], rows))
    return 0


def inspect_sensitivity(engine: Engine, args: argparse.Namespace) -> int:
    """Write what a budget costs in each layer alone, and print it."""
    check_drafter(engine)
    texts, notes = _texts(engine, args)
    model = engine.routed_model
    budgets = sensitivity.budgets_to_try(model.top_k, model.num_experts)
    kl_LG = sensitivity.sensitivity(engine, [text for text in texts if len(text) > 2], budgets, _progress)
    tensors = {"budgets": torch.tensor(budgets).float(), "kl": kl_LG.float()}
    write_profile(args.out, Profile("sensitivity", model, tensors), notes | {"tree": sensitivity.TREE.numbers})
    rows = [[str(layer), *(f"{1e3 * kl:.2f}" for kl in kl_G)] for layer, kl_G in zip(model.layers, kl_LG, strict=True)]
    print("KL of the next token with one layer budgeted, in thousandths of a nat, by budget.\n")
    print(table(["layer", *map(str, budgets)], rows))
    return 0


def inspect_acceptance(engine: Engine, args: argparse.Namespace) -> int:
    """Write how often rows are committed, and print it."""
    check_drafter(engine)
    texts, notes = _texts(engine, args)
    drafted_NP, committed_NP = acceptance.committed_rows(engine, texts, _progress)
    rate_NP = acceptance.rates(drafted_NP, committed_NP)
    tensors = {"edges": torch.tensor(acceptance.EDGES), "rate": rate_NP.float()}
    notes |= {"drafter": engine.info.drafter_name, "tree": acceptance.TREE.numbers, "rows": int(drafted_NP.sum())}
    write_profile(args.out, Profile("acceptance", engine.routed_model, tensors), notes)
    columns = ["depth", *(f"to {edge:g}" for edge in (*acceptance.EDGES, 1))]
    rows = [
        [str(depth), *(f"{rate:.2f} of {n:.0f}" if n else "–" for rate, n in zip(rate_P, n_P, strict=True))]
        for depth, (rate_P, n_P) in enumerate(zip(rate_NP.tolist(), drafted_NP.tolist(), strict=True))
    ]
    print("Share of rows committed, by depth and by path probability.\n")
    print(table(columns, rows))
    return 0


def _texts(engine: Engine, args: argparse.Namespace) -> tuple[list[list[int]], dict[str, Any]]:
    """The texts to read, cut at the number of tokens, and what the file says of them."""
    if args.tokens < 1:
        raise ValueError(f"tokens={args.tokens} is not allowed: use 1 or more.")
    if args.texts is None:
        texts, source = own_texts(engine, args.tokens), f"written by the model, {len(PROMPTS)} prompts, temperature 1"
    else:
        texts, left = [], args.tokens
        for text in read_texts(args.texts, engine):
            texts.append(text.token_ids[:left])
            left -= len(texts[-1])
            if not left:
                break
        source = args.texts.name
    return texts, {"model_name": engine.name, "texts": source, "tokens": sum(map(len, texts))}


def _nearest(similarity_EE: torch.Tensor) -> torch.Tensor:
    return similarity_EE.clone().fill_diagonal_(0).amax(dim=1).median()


def _progress(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
