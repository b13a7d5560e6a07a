"""`python -m moespec bench methods`: every method on the same prompts; a table, or the record as the last line.

Owns the order of things and the tables. How arms are measured is `measure.py`'s, which there are `methods.py`'s, what
governors are held against `rivals.py`'s.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moespec.bench.arms import LARGE, Arm
from moespec.bench.cli import add_prompt_arguments, chosen_prompts, record_head
from moespec.bench.contestants import Contestants
from moespec.bench.measure import ArmMeasurements, measure
from moespec.bench.methods import FLOORED, LOSSLESS, MATCHED, groups, matched_arms
from moespec.bench.report import arm_record
from moespec.bench.rivals import governor_ratios
from moespec.engine import Engine
from moespec.policies.profiles import profiles_folder
from moespec.quality.items import own_items
from moespec.quality.trials import Setting, answers

MAX_ANSWER_TOKENS = 160
ONLY = {"lossless": LOSSLESS, "floors": FLOORED, "matched": MATCHED}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--experts", type=float, default=12.0, metavar="N", help="experts per layer to match")
    parser.add_argument("--floors", type=float, nargs="+", default=[0.7, 0.85], metavar="P", help="utility's floors")
    parser.add_argument("--questions", type=int, default=10, metavar="N", help="of each family, for exact match")
    add_prompt_arguments(parser)
    parser.add_argument("--only", choices=ONLY, help="one group of arms; default: all")


def bench_methods(engine: Engine, target: str | Path, args: argparse.Namespace) -> int:
    """Measure and print."""
    if args.questions < 0:
        raise ValueError(f"questions={args.questions} is not allowed: use 0 or more.")
    wrong = [floor for floor in args.floors if not 0 < floor <= 1]
    if wrong:
        raise ValueError(f"floors={wrong[0]:g} is not allowed: use above 0 and at most 1.")
    low, high = engine.target.top_k, engine.target.num_experts
    if not low <= args.experts <= high:
        raise ValueError(f"experts={args.experts:g} is outside {low} to {high}, this model's top-k and experts.")
    prompts = chosen_prompts(engine, args)
    wanted = [ONLY[args.only]] if args.only else [*ONLY.values()]
    matched: list[Arm] = []
    if MATCHED in wanted:
        some = [prompt.token_ids for prompt in prompts[:: max(1, len(prompts) // 6)]]
        matched += matched_arms(engine, args.experts, some, profiles_folder(args.target, args.profiles), _progress)
    contestants = Contestants(engine, target, args.max_new_tokens, args.revision)
    measured = {}
    for name, arms in groups(matched, args.floors).items():
        if name in wanted:
            _progress(f"{name}: {len(arms)} arms, {args.rounds} rounds")
            measured[name] = measure(contestants, arms, prompts, args.rounds, args.follow, _progress)
    each = {entry.arm.key: entry.arm for entries in measured.values() for entry in entries}
    scores = _exact_match(engine, list(each.values()), args.questions)
    document = record_head(engine, args, prompts) | {
        "num_questions": len(own_items(args.questions, seed=0)) if args.questions else 0,
        "matched": {"experts_per_layer": args.experts, "tree": LARGE.numbers} if matched else None,
        "groups": [
            {"name": name, "arms": [_record(entry, scores) for entry in entries]} for name, entries in measured.items()
        ],
        "governors": [row for entries in measured.values() for row in governor_ratios(entries, prompts)],
    }
    print(json.dumps(document) if args.json else _tables(document))
    return 0


def _progress(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _exact_match(engine: Engine, arms: Sequence[Arm], per_family: int) -> dict[str, list[float]]:
    """Scores by arm: of plain decoding, which stands for all lossless arms, and of the lossy ones."""
    asked = [arm for arm in arms if arm.is_lossy or arm.name == "plain"]
    items = own_items(per_family, seed=0) if per_family else []
    scores: dict[str, list[float]] = {}
    for record in answers(engine, asked, [Setting(0.0, 0)], items, MAX_ANSWER_TOKENS, lambda key: False):
        if record["score"] is not None:
            scores.setdefault(record["arm"], []).append(record["score"])
    return scores


def _record(measured: ArmMeasurements, scores: dict[str, list[float]]) -> dict[str, Any]:
    found = scores.get(measured.arm.key if measured.arm.is_lossy else "plain")
    return arm_record(measured) | {
        "key": measured.arm.key,
        "lossless": not measured.arm.is_lossy,
        "exact_match": round(statistics.fmean(found), 4) if found else None,
    }


def _tables(document: dict[str, Any]) -> str:
    """One table per group, and the governors', as Markdown."""
    parts = [f"{group['name']}\n\n{_arm_table(group['arms'])}" for group in document["groups"]]
    if document["governors"]:
        parts.append(_governor_table(document["governors"]))
    return "\n\n".join(parts)


def _arm_table(rows: Sequence[dict[str, Any]]) -> str:
    columns = "| arm | tokens/s | accepted | experts | mass | KL | same next token | exact match |"
    lines = [columns, "|---|---|---|---|---|---|---|---|"]
    for row in rows:
        agreement = row["agreement_top1"] if row["agreement_top1"] is not None else row["agreement_top1_own_kv"]
        cells = (row["experts_active"], row["mass_kept"], row["kl"], agreement, row["exact_match"])
        shown = " | ".join("–" if cell is None else f"{cell:.4g}" for cell in cells)
        lines.append(
            f"| {row['key']} | {row['tokens_per_s']['all']:.0f} | {(row['tokens_per_step'] or 1) - 1:.2f} | {shown} |"
        )
    return "\n".join(lines)


def _governor_table(rows: Sequence[dict[str, Any]]) -> str:
    columns = "| governor | prompts | against the best fixed setting | best afterwards | against it | against plain |"
    lines = [columns, "|---|---|---|---|---|---|"]
    for row in rows:
        swept, afterwards, plain = (
            "–" if row[name] is None else "{:.2f} ({:.2f}–{:.2f})".format(row[name]["ratio"], *row[name]["interval_95"])
            for name in ("to_best_fixed", "to_best_afterwards", "to_plain")
        )
        cells = (row["governor"], row["class"], swept, row["best_afterwards"], afterwards, plain)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
