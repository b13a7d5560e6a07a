"""The advice on a model before it is loaded: what a step must read and yield, and the tree and budget to use, or none.

Owns the plain data it is given as and how it is put together. Everything here is modelled, and says so.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from moespec.advise.acceptance import MAX_DEPTH, SIZES, Acceptance, parse_rates, parse_tokens, recorded
from moespec.advise.choice import Choice
from moespec.advise.costs import FREE_DRAFTS, DraftShape, ModelledCosts
from moespec.advise.devices import Device, find_device
from moespec.advise.judgement import USUAL_ROWS, InEngine, judge, with_engine
from moespec.advise.targets import AdvisedTarget, describe_target
from moespec.advise.unions import Unions, read_record, sizes_of, unions_of
from moespec.config import EMBEDDED_TARGET
from moespec.cost import ModelShape, break_even_tokens, budget_ladder
from moespec.lean import MAX_HIDDEN_SIZE


@dataclass(frozen=True)
class SizeRow:
    """A tree of so many rows without a budget. experts: per layer, expected; experts_most: of independent rows.

    num_bytes, verify_ms (at the least) and break_even are the verify step's alone; break_even_most is that of
    `experts_most`; with_drafting the expected one with the drafting of such a tree; in_engine the same with this
    engine's overhead on a GPU, None elsewhere.
    """

    num_rows: int
    experts: float
    experts_most: float
    num_bytes: int
    verify_ms: float
    break_even: float
    break_even_most: float
    with_drafting: float
    in_engine: float | None


@dataclass(frozen=True)
class BudgetRow:
    """A verify step, alone, of a tree that would use more experts; of 16 rows, where arithmetic counts.

    in_engine: break-even with drafting and this engine's overhead on a GPU, None elsewhere.
    """

    budget: int
    num_bytes: int
    verify_ms: float
    break_even: float
    in_engine: float | None


@dataclass(frozen=True)
class Advice:
    """Plain data, JSON-safe. Times and speed-ups are modelled; the sources say where their inputs are from.

    headline to budgeted   `Judgement`'s, as if reading were all
    in_engine              None where the engine's kernels do not run, or the device is known by its bandwidth alone
    """

    headline: str
    verdict: str
    model: dict[str, Any]
    device: dict[str, Any]
    context: int
    unions_source: str
    acceptance_source: str | None
    least_budget: int
    plain_bytes: int
    plain_ms: float
    sizes: list[SizeRow]
    budgets: list[BudgetRow]
    lossless: Choice | None
    budgeted: Choice | None
    in_engine: InEngine | None
    notes: list[str]

    @property
    def plain_in_words(self) -> str:
        """What a step of plain decoding reads, and how long that takes."""
        engine = self.in_engine
        expected = "" if engine is None else f", in this engine {engine.plain_ms:.3g} ms"
        least = f"at least {self.plain_ms:.3g} ms{expected}, modelled."
        return f"Plain decoding reads {self.plain_bytes / 1e9:.3g} GB a token: {least}"

    @property
    def headlines(self) -> list[str]:
        """One, or where this engine's overhead is known two: for a server that only reads, and for this engine."""
        if self.in_engine is None:
            return [self.headline]
        return [f"Where reading is all: {self.headline}", f"In this engine: {self.in_engine.judgement.headline}"]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def advise(
    target: str | Path | AdvisedTarget = EMBEDDED_TARGET,
    device: str | Device = "auto",
    *,
    acceptance: str | None = None,
    accepted: str | None = None,
    drafter: str = "auto",
    dtype: str = "auto",
    revision: str | None = None,
    context: int = 0,
    least_budget: int | None = None,
) -> Advice:
    """Advice on a model that is not loaded: a hub id, a directory, a config file or a name of `PUBLISHED`.

    target        an `AdvisedTarget`, for a model that is known by its sizes alone, has its dtype and context counted in
    device        "auto", "cpu" or "cuda": this machine, measured now; a name of `DEVICE_NAMES`; or a `Device`
    acceptance, accepted   as `parse_rates` and `parse_tokens` read them; neither: what was recorded of the embedded
                  model and its head, and for any other pair no verdict
    drafter       "ngram" reads no weights; anything else is taken for a usual EAGLE-3 head
    dtype         of the weights; "auto" as the engine loads them
    revision      of a hub id: a branch, tag or commit
    context       positions whose keys and values a step reads
    least_budget  smaller budgets are not chosen; half of the experts unless given, as in the paper

    ValueError, in one sentence, for what cannot be advised on.
    """
    if acceptance is not None and accepted is not None:
        raise ValueError(f"acceptance={acceptance} and accepted={accepted} exclude each other: give one.")
    if drafter == "none":
        raise ValueError("drafter='none' drafts nothing to advise on: leave it out, or name the drafter.")
    typed = None if acceptance is None else parse_rates(acceptance)
    typed = typed if accepted is None else parse_tokens(accepted)
    found = device if isinstance(device, Device) else find_device(device)
    model = target
    if not isinstance(model, AdvisedTarget):
        model = describe_target(model, revision, dtype, found.kind == "cpu", context)
    unions = unions_of(model.shape)
    draft = FREE_DRAFTS if drafter == "ngram" else _usual_head(model, found)
    costs = ModelledCosts(model.shape, found, draft, model.kv_bytes, unions.expected)
    known = typed or _recorded(model.shape, drafter)
    least = checked_least_budget(least_budget, model.shape)
    ladder, loaded = budget_ladder(model.shape.top_k, model.shape.num_experts), with_engine(costs)
    judgement = judge(known, costs, unions, least)
    return Advice(
        headline=judgement.headline,
        verdict=judgement.verdict,
        model=asdict(model),
        device=asdict(found),
        context=context,
        unions_source=unions.source,
        acceptance_source=None if known is None else known.source,
        least_budget=least,
        plain_bytes=costs.num_bytes(1, None),
        plain_ms=costs.plain_ms,
        sizes=[_size_row(num_rows, costs, loaded, unions) for num_rows in SIZES],
        budgets=[_budget_row(budget, costs, loaded) for budget in ladder],
        lossless=judgement.lossless,
        budgeted=judgement.budgeted,
        in_engine=None if loaded is None else InEngine(loaded.plain_ms, judge(known, loaded, unions, least)),
        notes=_notes(model, found, costs),
    )


def checked_least_budget(least: int | None, shape: ModelShape) -> int:
    """Half of the experts, and no less than the top-k, unless given. ValueError outside [k, E]."""
    if least is None:
        return max(shape.top_k, shape.num_experts // 2)
    if not shape.top_k <= least <= shape.num_experts:
        raise ValueError(f"least_budget={least} is outside {shape.top_k} to {shape.num_experts}, top-k and experts.")
    return least


def _usual_head(model: AdvisedTarget, device: Device) -> DraftShape:
    """Small heads run on a CPU in int8 (`drafters/compiled_pass.py`), all others as the target does."""
    is_small = device.kind == "cpu" and model.shape.hidden_size <= MAX_HIDDEN_SIZE
    return DraftShape.eagle3(model.shape.hidden_size, model.vocab_size, 1 if is_small else model.bytes_per_weight)


def _recorded(shape: ModelShape, drafter: str) -> Acceptance | None:
    """Of the embedded model and its own head; another drafter is another pair."""
    record = read_record()
    is_own = drafter == "auto" or Path(drafter).resolve() == EMBEDDED_TARGET.parent / "drafter"
    return recorded(record) if is_own and tuple(record["sizes"]) == sizes_of(shape) else None


def _with_drafting(costs: ModelledCosts, num_rows: int, budget: int | None) -> float:
    draft_ms = costs.draft_ms(min(MAX_DEPTH, num_rows - 1))
    return break_even_tokens(costs.verify_ms(num_rows, budget), costs.plain_ms, draft_ms)


def _size_row(num_rows: int, costs: ModelledCosts, loaded: ModelledCosts | None, unions: Unions) -> SizeRow:
    verify_ms, plain_ms = costs.verify_ms(num_rows, None), costs.plain_ms
    most_ms = replace(costs, union=unions.bound).verify_ms(num_rows, None)
    return SizeRow(
        num_rows=num_rows,
        experts=unions.expected(num_rows),
        experts_most=unions.bound(num_rows),
        num_bytes=costs.num_bytes(num_rows, None),
        verify_ms=verify_ms,
        break_even=break_even_tokens(verify_ms, plain_ms),
        break_even_most=break_even_tokens(most_ms, plain_ms),
        with_drafting=_with_drafting(costs, num_rows, None),
        in_engine=None if loaded is None else _with_drafting(loaded, num_rows, None),
    )


def _budget_row(budget: int, costs: ModelledCosts, loaded: ModelledCosts | None) -> BudgetRow:
    def full(some: ModelledCosts) -> ModelledCosts:
        return replace(some, union=lambda num_rows: float(costs.shape.num_experts))

    verify_ms = full(costs).verify_ms(USUAL_ROWS, budget)
    return BudgetRow(
        budget=budget,
        num_bytes=full(costs).num_bytes(USUAL_ROWS, budget),
        verify_ms=verify_ms,
        break_even=break_even_tokens(verify_ms, costs.plain_ms),
        in_engine=None if loaded is None else _with_drafting(full(loaded), USUAL_ROWS, budget),
    )


def _notes(model: AdvisedTarget, device: Device, costs: ModelledCosts) -> list[str]:
    notes = []
    needed = model.weights_bytes + model.kv_bytes
    if device.memory_bytes is not None:
        fit = "fit" if needed <= device.memory_bytes else "do not fit"
        notes.append(f"Weights and cache take {needed / 1e9:.1f} GB and {fit} into {device.memory_bytes / 1e9:.0f} GB.")
    if costs.draft != FREE_DRAFTS:
        notes.append("Drafting is that of a usual EAGLE-3 head: one layer of the target's width, 32,000 words at most.")
    if (loaded := with_engine(costs)) is not None:
        where = "" if device.name == "H200" else "; here it is assumed"
        notes.append(f"This engine takes {loaded.overhead.in_words}: measured on an H200{where}.")
    if device.flops_per_s is not None:
        notes.append("On a CPU arithmetic counts too: times are bytes over bandwidth plus products over their speed.")
    return notes
