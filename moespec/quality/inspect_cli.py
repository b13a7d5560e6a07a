"""`python -m moespec inspect experts`: arguments, progress on stderr, the report or the JSON document on stdout.

Owns what the report shows of the figures, and the figures reported for the paper's own models. Knows no measure.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from moespec.bench.machine import checked_out_commit
from moespec.engine import Engine, EngineInfo
from moespec.quality.specialisation import DEFAULT_TREE, MASS_SHARE, DomainFigures, Specialisation, measure
from moespec.quality.trials import TEXTS, read_texts

NUM_DIGITS = 4  # of the JSON document's numbers
REPORTED_BY = "as notes on arXiv 2602.16052 report it, not measured here"


@dataclass(frozen=True)
class Reported:
    """What is said of one of the paper's models, beside which of our figures it stands."""

    beside: str
    model: str
    figure: str


REPORTED = (
    Reported(
        beside="experts for the mass",
        model="OLMoE-1B-7B (64 experts, top-8)",
        figure="for 90 % of the mass 8 on MBPP, about 12 on HumanEval, about 16 on MATH500, about 18 on GSM8K, "
        "24 on CNN/DailyMail",
    ),
    Reported("union", "OLMoE-1B-7B (64 experts, top-8)", "39 in a tree of 31"),
    Reported("union", "OLMoE-1B-7B (64 experts, top-8)", "54 in a tree of 127 (some notes say 63 or 255)"),
    Reported("union", "Qwen3-30B-A3B (128 experts, top-8)", "about 80 in a tree of 63"),
    Reported("union", "Mixtral-8x7B (8 experts, top-2)", "7 to 8 in a tree of 63"),
    Reported("top", "OLMoE-1B-7B (64 experts, top-8)", "the top 32 hold 93 % of the mass"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--texts", type=Path, default=TEXTS, help="texts to read; their groups are the domains")
    parser.add_argument("--positions", type=int, default=4, metavar="N", help="draft trees at N places of every text")
    parser.add_argument("--json", action="store_true", help="all figures as the last line, instead of a report")


def inspect_experts(engine: Engine, args: argparse.Namespace) -> int:
    """Measure and print."""
    if engine.target.tokenizer is None:
        raise ValueError("inspect experts reads texts: it needs a target with a tokenizer.")
    texts = read_texts(args.texts, engine)
    found = measure(engine, texts, args.positions, lambda line: print(line, file=sys.stderr, flush=True))
    if not args.json:
        print(report(found, engine.info, args.positions))
        return 0
    document = {
        "device": engine.card(),
        "commit": checked_out_commit(),
        "model": {"name": engine.name, "drafter": engine.info.drafter_name}
        | {"num_experts": engine.target.num_experts, "top_k": engine.target.top_k},
        "texts": {"file": args.texts.name, "sha256": hashlib.sha256(args.texts.read_bytes()).hexdigest()},
        "positions": args.positions,
        "tree": DEFAULT_TREE.numbers,
        "mass_share": MASS_SHARE,
        "measured": asdict(found),
        "reported": {"by": REPORTED_BY, "figures": [asdict(entry) for entry in REPORTED]},
    }
    print(json.dumps(json.loads(json.dumps(document), parse_float=lambda digits: round(float(digits), NUM_DIGITS))))
    return 0


def report(found: Specialisation, info: EngineInfo, num_positions: int) -> str:
    """The figures as Markdown."""
    sections = (_evenness(found), _experts_for_mass(found), _overlap(found), _unions(found), _tops(found))
    return "\n\n".join([_setting(found, info, num_positions), *sections])


def _setting(found: Specialisation, info: EngineInfo, num_positions: int) -> str:
    everything, tree = found.everything, ",".join(f"{part:g}" for part in DEFAULT_TREE.numbers)
    domains = ", ".join(f"{domain.num_texts} {domain.domain}" for domain in found.domains)
    return (
        f"# Experts: {info.model_name}\n\n"
        f"{len(found.layers)} MoE layers of {info.num_experts} experts, top-{info.top_k}. Measured on "
        f"{everything.num_texts} texts ({domains}), {everything.num_tokens} tokens, and on the trees that "
        f"{info.drafter_name} drafts at up to {num_positions} places of each text. Default trees are {tree}: "
        f"{everything.num_trees} have two rows or more; the other {found.num_root_only} are in no figure."
    )


def _evenness(found: Specialisation) -> str:
    entropies = [domain.entropy_L for domain in _columns(found)]
    dead = [domain.num_dead_L for domain in _columns(found)]
    return (
        "## How evenly experts are used\n\nEntropy of the natural top-k weight that a domain's tokens give to each "
        f"expert, as a share of its maximum: 1 if all are used alike.\n\n{_layer_table(found, entropies, '.3f')}\n\n"
        f"Dead experts, which no token of the domain chose:\n\n{_layer_table(found, dead, 'g')}"
    )


def _experts_for_mass(found: Specialisation) -> str:
    needed = [domain.experts_for_mass_L for domain in _columns(found)]
    return (
        f"## Experts for {MASS_SHARE:.0%} of a tree's router mass\n\nThe fewest that hold it in a default tree (full "
        f"softmax, summed over its rows): mean over trees.\n\n{_layer_table(found, needed, '.1f')}\n\n"
        f"{_reported('experts for the mass')}"
    )


def _overlap(found: Specialisation) -> str:
    names = [domain.domain for domain in found.domains]
    places = range(len(names))
    medians = [
        [statistics.median(layer[one][other] for layer in found.overlap_LDD) for other in places] for one in places
    ]
    rows = [[name, *(f"{value:.3f}" for value in row)] for name, row in zip(names, medians, strict=True)]
    return (
        "## Overlap between domains\n\nSum over experts of the smaller of the two domains' shares of natural top-k "
        f"weight: median over layers.\n\n{table(['', *names], rows)}"
    )


def _unions(found: Specialisation) -> str:
    rows = [
        [f"{u.rows_asked}", f"{u.rows_drafted:.1f}", f"{statistics.mean(u.union_L):.1f}", f"{u.independent:.1f}"]
        for u in found.unions
    ]
    columns = ["rows asked for", "rows drafted", "experts", "if independent"]
    return (
        "## Union of experts against tree size\n\nExperts that the rows of an unpruned tree use together: mean over "
        "trees and layers. If independent: E (1 - (1 - k/E)^T), were every one of T rows to choose evenly and "
        f"independently.\n\n{table(columns, rows)}\n\n{_reported('union')}"
    )


def _tops(found: Specialisation) -> str:
    rows = [
        [f"{top.num_experts}", *(f"{statistics.median(v):.3f}" for v in (top.natural_weight_L, top.router_mass_L))]
        for top in found.tops
    ]
    columns = ["strongest experts", "natural top-k weight", "router mass (full softmax)"]
    return (
        "## What the strongest experts hold\n\nShare of a default tree's weight, or mass, on the experts of a layer "
        f"that have most of it: mean over trees, median over layers.\n\n{table(columns, rows)}\n\n{_reported('top')}"
    )


def _columns(found: Specialisation) -> list[DomainFigures]:
    return [*found.domains, found.everything]


def _layer_table(found: Specialisation, figures: Sequence[Sequence[float] | None], form: str) -> str:
    """A row per layer and one for their median, a column per domain and one for all texts."""
    rows = [
        [f"{layer}", *("–" if figure_L is None else f"{figure_L[number]:{form}}" for figure_L in figures)]
        for number, layer in enumerate(found.layers)
    ]
    medians = ["–" if figure_L is None else f"{statistics.median(figure_L):{form}}" for figure_L in figures]
    return table(["layer", *(domain.domain for domain in _columns(found))], [*rows, ["median", *medians]])


def table(columns: list[str], rows: list[list[str]]) -> str:
    """A row of cells per line below a head."""
    lines = ["| " + " | ".join(row) + " |" for row in (columns, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(columns), *lines[1:]])


def _reported(beside: str) -> str:
    figures = [f"- {entry.model}: {entry.figure}" for entry in REPORTED if entry.beside == beside]
    return "\n".join([f"From the paper's models ({REPORTED_BY}):", "", *figures])
