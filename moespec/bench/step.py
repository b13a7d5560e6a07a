"""`python -m moespec bench step`: whole verify steps against the least time that their bytes take.

Owns the arms, the order of runs and the record. Every arm runs the engine itself, kernels and graphs included, plain
decoding too; arms take turns, a few steps each. With random weights nothing is accepted, so that a step commits one
token: its time is that of any other. On CUDA the device's kernels are also summed by kind, in a run of their own.

    python -m moespec bench step --models embedded OLMoE-1B-7B Qwen3-30B-A3B --json > step.json
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from moespec.bench.layers import EMBEDDED
from moespec.bench.machine import Timing, machine_card
from moespec.bench.measure import read_prompts
from moespec.bench.routing_replay import RoutingReplay, record_logits, scale_logits
from moespec.bench.step_models import load_engine
from moespec.bench.step_profile import profile_steps
from moespec.config import EMBEDDED_TARGET, BudgetConfig, GenerationConfig, TreeConfig
from moespec.cost import ModelShape, break_even_tokens, floor_s, step_bytes
from moespec.engine import Engine
from moespec.shapes import shape_of
from moespec.trace import StepTrace

PLAIN = TreeConfig(1)
# As many rows in every step, and enough candidates for them.
TREES = (TreeConfig(8, 4, 3, 0), TreeConfig(16, 5, 4, 0), TreeConfig(32, 6, 6, 0), TreeConfig(64, 7, 8, 0))
BUDGETS = (8, 16, 24, 32, 48, 64)
NUM_RECORDED, NUM_WARM_UP_STEPS = 8, 3
OWN, RECORDED = "the model's own", "recorded from the embedded model and scaled"

Advance = Callable[[], None]


@dataclass
class StepArm:
    """A tree and a budget, and the steps that were timed."""

    tree: TreeConfig
    budget: int | None
    steps: list[StepTrace] = field(default_factory=list)

    @property
    def name(self) -> str:
        rows = self.tree.total_tokens
        return "plain" if rows == 1 else f"{rows} rows, {'no budget' if self.budget is None else f'B = {self.budget}'}"

    def run(self, engine: Engine, prompt: list[int], advance: Advance) -> Generator[StepTrace]:
        """Steps of a fresh conversation behind its first few, which hold the prompt and what lies in no cache yet."""
        engine.forget()
        generation, budget = GenerationConfig(max_new_tokens=512, ignore_eos=True), BudgetConfig(budget=self.budget)
        for number, step in enumerate(engine.generate(prompt, generation, budget, self.tree)):
            if number > NUM_WARM_UP_STEPS:
                yield step
            advance()


def bench_step(
    models: Sequence[str],
    dtype: str,
    num_rounds: int,
    num_steps: int,
    device: torch.device,
    seconds_limit: float | None = None,
) -> dict:
    """The record: a card, and per model its arms' times, floors and parts; none begins after the limit."""
    if num_rounds < 1 or num_steps < 1:
        raise ValueError(f"rounds={num_rounds}, steps={num_steps} is not allowed: use 1 or more of both.")
    if seconds_limit is not None and seconds_limit <= 0:
        raise ValueError(f"seconds-limit={seconds_limit} is not allowed: use more than 0.")
    card, began_s = machine_card(device), time.monotonic()
    found: list[dict[str, Any]] = []
    for name in models:
        if seconds_limit is not None and time.monotonic() - began_s > seconds_limit:
            found.append({"model": name, "not_run": "no time was left"})
            continue
        try:
            engine = load_engine(name, device, dtype)
        except ValueError as error:
            if len(models) == 1:
                raise
            found.append({"model": name, "not_run": str(error)})  # the others' figures are not lost
            continue
        # Routers of random weights send all rows to much the same experts.
        routing = OWN if name == EMBEDDED else RECORDED
        with _routed(engine, routing) as advance:
            print(f"{name}, routing {routing}", file=sys.stderr, flush=True)
            rows = _measure(engine, name, num_rounds, num_steps, card, advance)
            found.append({"model": name, "routing": routing, "engine": engine.card(), "arms": rows})
        engine.close()
        del engine
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()  # what is free is asked of the device
    return {"device": card, "rounds": num_rounds, "steps_per_round": num_steps, "models": found}


def _measure(
    engine: Engine, name: str, num_rounds: int, num_steps: int, card: dict[str, Any], advance: Advance
) -> list[dict[str, Any]]:
    prompt, all_arms = _prompt(engine, name), arms(engine)
    for number in range(num_rounds + 1):
        for arm in all_arms:
            with contextlib.closing(arm.run(engine, prompt, advance)) as stream:
                steps = list(itertools.islice(stream, num_steps))
            arm.steps += steps if number else []  # the first round captures, compiles and touches
    parts = {}
    if engine.target.device.type == "cuda":
        for arm in all_arms:
            with contextlib.closing(arm.run(engine, prompt, advance)) as stream:
                parts[arm.name] = profile_steps(stream, len(engine.target.layers))
    shape, read_bytes_per_s = shape_of(engine.target.model, name), card["ceilings"]["read_bytes_per_s"]
    plain_ms = statistics.median(map(_total_ms, all_arms[0].steps))
    return [arm_record(arm, shape, read_bytes_per_s, plain_ms) | {"parts": parts.get(arm.name)} for arm in all_arms]


def arms(engine: Engine) -> list[StepArm]:
    """Plain first; then every tree, without a budget and with all that are below the number of experts."""
    low, high = engine.info.top_k, engine.info.num_experts
    budgets = [None, *(budget for budget in BUDGETS if low <= budget < high)]
    return [StepArm(PLAIN, None), *(StepArm(tree, budget) for tree in TREES for budget in budgets)]


def arm_record(arm: StepArm, shape: ModelShape, read_bytes_per_s: float, plain_ms: float) -> dict[str, Any]:
    """Milliseconds as median, p20 and p80; experts a layer; the floor of the verify step, its bytes modelled.

    break_even_tokens: tokens a step must yield to be worth it against plain decoding, all of it measured.
    """
    steps = arm.steps
    read = statistics.fmean(statistics.fmean(step.experts_active) for step in steps)
    floor_ms = floor_s(step_bytes(shape, read), read_bytes_per_s) * 1e3
    verify = _spread([step.verify_ms for step in steps])
    total_ms = statistics.median(map(_total_ms, steps))
    return {
        "name": arm.name,
        "tree": arm.tree.numbers,
        "budget": arm.budget,
        "num_steps": len(steps),
        "draft_ms": _spread([step.draft_ms for step in steps]),
        "verify_ms": verify,
        "other_ms": _spread([step.other_ms for step in steps]),
        "step_ms": round(total_ms, 4),
        "experts_natural": round(statistics.fmean(statistics.fmean(step.experts_natural) for step in steps), 2),
        "experts_active": round(read, 2),
        "modelled_floor_ms": round(floor_ms, 4),
        "verify_over_floor": round(verify["median"] / floor_ms, 3),
        "break_even_tokens": round(break_even_tokens(total_ms, plain_ms), 3),
    }


def step_table(record: dict[str, Any]) -> str:
    """The arms as Markdown."""
    lines = []
    for model in record["models"]:
        if "not_run" in model:
            lines += ["", f"{model['model']} was not run: {model['not_run']}"]
            continue
        lines += ["", f"{model['model']}, {model['engine']['backend']}, routing {model['routing']}", ""]
        lines.append(
            "| step | draft ms | verify ms (p20–p80) | other ms | experts | floor ms, modelled | verify / floor "
            "| pays above |"
        )
        lines += ["|---|---|---|---|---|---|---|---|"]
        for row in model["arms"]:
            verify = row["verify_ms"]
            lines.append(
                f"| {row['name']} | {row['draft_ms']['median']:.2f} "
                f"| {verify['median']:.2f} ({verify['p20']:.2f}–{verify['p80']:.2f}) | {row['other_ms']['median']:.2f} "
                f"| {row['experts_active']:.1f} of {row['experts_natural']:.1f} | {row['modelled_floor_ms']:.2f} "
                f"| {row['verify_over_floor']:.2f} | {row['break_even_tokens']:.2f} tokens |"
            )
    return "\n".join(lines[1:])


@contextlib.contextmanager
def _routed(engine: Engine, routing: str) -> Iterator[Advance]:
    """Inside, trees of the bench's sizes are routed so; what is yielded moves on to the next recording."""
    if routing == OWN:
        yield lambda: None
        return
    embedded = Engine.from_pretrained(EMBEDDED_TARGET, device="cpu")
    prompts = Path(__file__).resolve().parents[2] / "assets" / "bench" / "prompts.jsonl"
    texts = [prompt.token_ids for prompt in read_prompts(prompts, embedded, NUM_RECORDED)]
    target = engine.target
    recorded = [record_logits(embedded, texts, tree) for tree in TREES]
    sizes = len(target.moe_layers), target.num_experts
    replays = [RoutingReplay(target, scale_logits(logits_NLTE, *sizes)) for logits_NLTE in recorded]
    embedded.close()
    with contextlib.ExitStack() as stack:
        for replay in replays:
            stack.enter_context(replay.active())
        engine.verifier.forget_captures()
        yield lambda: _advance(replays)
    engine.verifier.forget_captures()


def _advance(replays: Sequence[RoutingReplay]) -> None:
    for replay in replays:
        replay.advance()


def _prompt(engine: Engine, name: str) -> list[int]:
    if name == EMBEDDED:
        return engine.encode("Tell me a short story about a river and a stone.")
    generator = torch.Generator().manual_seed(0)
    return torch.randint(engine.target.vocab_size, (128,), generator=generator).tolist()


def _total_ms(step: StepTrace) -> float:
    return step.draft_ms + step.verify_ms + step.other_ms


def _spread(values_ms: Sequence[float]) -> dict[str, float]:
    timing = Timing.of(values_ms)
    return {"median": round(timing.median_us, 4), "p20": round(timing.p20_us, 4), "p80": round(timing.p80_us, 4)}
