"""What is measured of a loaded pair beside its costs: accepted tokens, what budgets take of them, whole runs.

Every probe is an ordinary generation. Knows nothing of what steps cost, or of how a choice is made.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Sequence
from typing import Any

from moespec.advise.acceptance import Acceptance
from moespec.advise.choice import Choice
from moespec.advise.trees import LARGE, candidates_of
from moespec.bench.timed import Timed, paired_ratio
from moespec.config import BudgetConfig, GenerationConfig, TreeConfig
from moespec.control import Control
from moespec.engine import Engine
from moespec.profile import NUM_TOKENS, conversation
from moespec.trace import RunSummary, StepTrace

USUAL = TreeConfig(16, 8, 3, min_path_p=0)  # the tree that budgets are compared on
PLACES_APART = 8  # tokens between the trees that budgets are compared at
LEAST_TOKENS = 8  # of an answer whose speed counts
NUM_RESAMPLES = 2000


def measure_acceptance(engine: Engine, prompts: Sequence[list[int]]) -> Acceptance:
    """Large trees without a budget over the prompts; the interval of accepted tokens is from prompts resampled."""
    control = Control()
    control.update(budget=BudgetConfig(), tree=LARGE)
    by_prompt: list[list[StepTrace]] = []
    for prompt in prompts:
        by_prompt.append([step for _, step in conversation(engine, prompt, control)])
    engine.forget()
    steps = [step for found in by_prompt for step in found]
    means = [statistics.fmean(len(step.token_ids) - 1 for step in found) for found in by_prompt if found]
    rng = random.Random(0)
    resampled = sorted(statistics.fmean(rng.choices(means, k=len(means))) for _ in range(NUM_RESAMPLES))
    mean = statistics.fmean(means)
    low, high = (resampled[int(share * NUM_RESAMPLES)] / mean if mean else 1.0 for share in (0.025, 0.975))
    source = f"measured: {len(steps)} steps on {len(prompts)} prompts, {engine.info.drafter_name}"
    return Acceptance(source, candidates_of(steps), low, high)


def kept_by_budget(engine: Engine, prompts: Sequence[list[int]], budgets: Sequence[int]) -> dict[int | None, float]:
    """The share of accepted tokens that each budget leaves, over trees of 16 rows: 1 without one.

    All budgets verify the tree of the same places in the text that the model writes without one, whose keys and values
    no budget has touched: places are visited from the last to the first, and what lies behind one is not kept.
    """
    accepted: dict[int | None, int] = dict.fromkeys((None, *budgets), 0)
    for prompt in prompts:
        answer = _answer(engine, prompt, USUAL, BudgetConfig()).token_ids
        for place in range(len(answer) - 1, 0, -PLACES_APART):
            for budget in accepted:
                accepted[budget] += _num_accepted(engine, prompt + answer[:place], budget)
    engine.forget()
    return {budget: found / accepted[None] if accepted[None] else 1.0 for budget, found in accepted.items()}


def _num_accepted(engine: Engine, token_ids: list[int], budget: int | None) -> int:
    """Accepted draft tokens of the first tree behind these tokens and the next one."""
    generation = GenerationConfig(max_new_tokens=NUM_TOKENS, ignore_eos=True)
    steps = engine.generate(token_ids, generation, BudgetConfig(budget=budget), USUAL)
    return len(next(step for step in steps if step.kind != "prefill").token_ids) - 1


def confirm(engine: Engine, choices: dict[str, Choice], prompts: Sequence[list[int]]) -> dict[str, dict[str, Any]]:
    """What is recommended, run beside plain decoding on every prompt in turn: ratios of tokens/s, paired by prompt.

    Answers run to their end. A prompt that some setting answers with a few tokens counts for none; if all are, nothing
    is confirmed.
    """
    settings = {"plain": (TreeConfig(1), BudgetConfig())}
    settings |= {
        name: (TreeConfig.parse(choice.tree), BudgetConfig(budget=choice.budget)) for name, choice in choices.items()
    }
    for tree, budget in settings.values():
        _answer(engine, prompts[0], tree, budget)  # what is prepared once is in no figure
    names, by_prompt = [*settings], []
    for number, prompt in enumerate(prompts):
        start = number % len(names)
        answers = {name: _answer(engine, prompt, *settings[name]) for name in names[start:] + names[:start]}
        if min(len(answer.token_ids) for answer in answers.values()) > LEAST_TOKENS:
            by_prompt.append({name: _timed(answer) for name, answer in answers.items()})
    engine.forget()
    if not by_prompt:
        return {}
    timed = {name: [found[name] for found in by_prompt] for name in names}
    return {name: paired_ratio(timed[name], timed["plain"]) for name in choices}


def _timed(answer: RunSummary) -> Timed:
    return Timed(len(answer.token_ids) - 1, (answer.total_ms - answer.first_token_ms) / 1e3)


def _answer(engine: Engine, prompt: list[int], tree: TreeConfig, budget: BudgetConfig) -> RunSummary:
    engine.forget()
    *_, last = engine.generate(prompt, GenerationConfig(max_new_tokens=NUM_TOKENS), budget, tree)
    assert last.summary is not None
    return last.summary
