"""`python -m moespec quality`: arguments, the progress bar, the table. Knows no measure."""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

from moespec.bench.arms import OUR_SCORE, Arm, parse_arm
from moespec.bench.machine import checked_out_commit
from moespec.config import BudgetConfig, GenerationConfig
from moespec.drafters.eagle3 import Eagle3Drafter
from moespec.drafters.small_model import SmallModelDrafter
from moespec.engine import Engine
from moespec.integrity import tokenizer_sha256
from moespec.policies.profiles import profiles_folder
from moespec.quality.frontier import frontier_figure, plotly_script, write_page
from moespec.quality.items import Item, file_items, own_items
from moespec.quality.results import Results, weights_sha256
from moespec.quality.scorers import score
from moespec.quality.summary import recommended, summarise
from moespec.quality.table import table
from moespec.quality.trials import TEXTS, Setting, Text, answers, check_lengths, read_texts, readings

_T = TypeVar("_T", Item, Text)
BUDGETS = (8, 12, 16, 20, 24, 32, 40, 48)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--arms", metavar="LIST", help="names joined by spaces; default: every budget and policy")
    parser.add_argument("--per-family", type=int, default=100, metavar="N", help="own tasks of each family")
    parser.add_argument("--tasks-dir", type=Path, metavar="DIR", help="benchmark files instead of the own tasks")
    parser.add_argument(
        "--bad-lines", choices=("stop", "skip"), default="stop", help="at a bad line or too long a question"
    )
    parser.add_argument(
        "--limit", type=int, metavar="N", help="use the first N items of each family and texts of each group"
    )
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.0], metavar="T")
    parser.add_argument("--seeds", type=int, default=5, metavar="N", help="replies per question above temperature 0")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--texts", type=Path, default=TEXTS, help="held-out texts for perplexity and agreement")
    parser.add_argument("--no-texts", action="store_true", help="questions alone")
    parser.add_argument("--items-seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True, help="results, one JSON object per line")
    parser.add_argument("--resume", action="store_true", help="go on with the results in --out")
    parser.add_argument("--plot", type=Path, metavar="FILE.html", help="draw quality against tokens/s")
    parser.add_argument("--json", action="store_true", help="the summary as the last line, instead of a table")


def quality(engine: Engine, args: argparse.Namespace) -> int:
    """Measure what is missing in the results file, then say what all of it means."""
    if engine.drafter is None or engine.target.tokenizer is None:
        raise ValueError("quality needs a drafter and a tokenizer: the budget acts on drafted trees of real questions.")
    for name in ("per_family", "limit", "seeds", "max_new_tokens"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"{name.replace('_', '-')}={value} is not allowed: use 1 or more.")
    arms = quality_arms(args.arms, profiles_folder(args.target, args.profiles))
    for arm in arms:
        assert arm.budget is not None
        engine.check_budget(arm.budget)
    all_items = _items(args)
    items = _askable(engine, _limited(all_items, lambda item: item.family, args.limit), args.bad_lines)
    texts = [] if args.no_texts else _limited(read_texts(args.texts, engine), lambda text: text.group, args.limit)
    check_lengths(engine, texts, max(arm.tree.depth for arm in arms if arm.tree is not None))
    settings = [Setting(t, seed) for t in args.temperatures for seed in range(args.seeds if t > 0 else 1)]
    _try_out(settings, items, args)
    results = Results(args.out, _header(engine, args, all_items), args.resume)
    total = len(arms) * len(settings) * len(items) + sum(not arm.has_floor for arm in arms) * len(texts)
    trials = (answers(engine, arms, settings, items, args.max_new_tokens, results.is_done),
              readings(engine, arms, texts, results.is_done))  # fmt: skip
    with tqdm(total=total, initial=len(results.records), unit="trial", file=sys.stderr) as bar:
        for records in trials:
            for record in records:
                results.append(record)
                bar.update()
    entries = summarise(results.records)
    if args.plot is not None:
        write_page([frontier_figure(entries, t) for t in sorted({entry.temperature for entry in entries})], args.plot)
    best = recommended(entries)
    if args.json:
        print(
            json.dumps(
                {
                    "arms": [asdict(entry) | {"is_non_inferior": entry.is_non_inferior} for entry in entries],
                    "recommended": best and best.arm,
                }
            )
        )
    else:
        print(table(entries))
        print(f"\nThe fastest budget that passes: {best.arm if best else 'none'}.")
    return 0


def quality_arms(names: str | None, profiles: Path | None = None) -> list[Arm]:
    """Arms of names, or all; the unbudgeted one at each tree stands first, since the others are compared with it."""
    if names is None:
        kinds = ("substitution:{}", "truncation:{}", f"substitution:{{}}:{OUR_SCORE}")
        named = [parse_arm(f"moe-spec:{kind.format(budget)}") for kind in kinds for budget in BUDGETS]
    else:
        named = [parse_arm(name, profiles) for name in names.replace(";", " ").split()]
    if not named:
        raise ValueError('--arms names none: give some, as in "moe-spec:substitution:16 moe-spec:truncation:16".')
    for arm in named:
        if arm.name in ("transformers", "plain"):
            raise ValueError(f"arm {arm.name!r} drafts no tree for a budget to act on: use eagle3 and expert policies.")
    references = [Arm("eagle3", tree, BudgetConfig()) for tree in dict.fromkeys(arm.tree for arm in named)]
    return list({arm.key: arm for arm in (*references, *named)}.values())


def _items(args: argparse.Namespace) -> list[Item]:
    if args.tasks_dir is not None:
        return file_items(args.tasks_dir, args.bad_lines)
    return own_items(args.per_family, args.items_seed)


def _limited(all_of_them: list[_T], kind: Callable[[_T], str], limit: int | None) -> list[_T]:
    """The first `limit` of each kind."""
    counts: Counter[str] = Counter()
    kept = []
    for one in all_of_them:
        counts[kind(one)] += 1
        if limit is None or counts[kind(one)] <= limit:
            kept.append(one)
    return kept


def _askable(engine: Engine, items: list[Item], bad_lines: str) -> list[Item]:
    """The questions that fit the context. ValueError names one that does not, unless they are to be skipped."""
    fitting = []
    for item in items:
        try:
            engine.encode(list(item.messages))
        except ValueError as error:
            if bad_lines == "stop":
                raise ValueError(f"{item.name} cannot be asked: {error} --bad-lines skip leaves it out.") from error
            print(f"skipped: {item.name}: {error}", file=sys.stderr)
        else:
            fitting.append(item)
    return fitting


def _try_out(settings: list[Setting], items: list[Item], args: argparse.Namespace) -> None:
    """What would stop the run at its end, or after hours, stops it now. ValueError says what."""
    for setting in settings:
        GenerationConfig(args.max_new_tokens, setting.temperature)
    for item in {item.scorer: item for item in items}.values():
        score(item, "")
    if args.plot is not None:
        plotly_script()
        if not args.plot.absolute().parent.is_dir():
            raise ValueError(f"{args.plot} cannot be written: its folder does not exist.")


def _header(engine: Engine, args: argparse.Namespace, items: list[Item]) -> dict[str, Any]:
    drafter = engine.drafter
    drafts: Any = None  # the weights that do
    if isinstance(drafter, Eagle3Drafter):
        drafts = drafter.head
    elif isinstance(drafter, SmallModelDrafter):
        drafts = drafter.model
    return {
        "kind": "run",
        "commit": checked_out_commit(),
        "model": engine.name,
        "settings": {
            "model_sha256": weights_sha256(engine.target.model),
            "drafter_sha256": None if drafts is None else weights_sha256(drafts),
            "tokenizer_sha256": tokenizer_sha256(engine.target.tokenizer),
            "items_sha256": hashlib.sha256(repr(items).encode()).hexdigest(),
            "texts_sha256": None if args.no_texts else hashlib.sha256(args.texts.read_bytes()).hexdigest(),
            "max_new_tokens": args.max_new_tokens,
            "device": engine.card(),
            "tasks": "own" if args.tasks_dir is None else args.tasks_dir.name,
            "per_family": args.per_family,
            "items_seed": args.items_seed,
            "temperatures": args.temperatures,
            "seeds": args.seeds,
        },
    }
