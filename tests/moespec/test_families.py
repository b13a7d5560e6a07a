"""Every family under transformers' experts registry: it works, by three proofs, or is refused with a reason.

The proofs: greedy speculation writes what `generate` writes; a budget of all experts changes no bit; a budgeted plan is
what the family's own formula gives, row by row in fp64. The README's table is made of what was found here.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch

from moespec import BudgetConfig, DraftContext, DraftTree, Engine, GenerationConfig, Request, TreeContext
from moespec.budget import MoESpec
from moespec.routing import RouterOutput, router_scores
from moespec.tree import chain
from tests.conftest import conversation_of
from tests.drafters import PlantingDrafter
from tests.families import NUM_EXPERTS, WINDOW, family_names, tiny_family_model
from tests.readme import assert_block

NEW_TOKENS = 32
BUDGET = 5
AT_LEAST = {
    *("deepseek_v2", "deepseek_v3", "dots1", "ernie4_5_moe", "glm4_moe", "gpt_oss", "granitemoe", "hunyuan_v1_moe"),
    *("minimax_m2", "mixtral", "olmoe", "phimoe", "qwen2_moe", "qwen3_moe"),
}
REFUSED = {
    "layers of indexed_attention": "axk2 deepseek_v32 dots3_note_text glm_moe_dsa hy_v4 qwen4_exp_text",
    "layers of linear_attention": "bailing_hybrid jamba kimi_linear minimax qwen3_5_moe_text qwen3_next",
    "layers of compressed_sparse_attention, heavily_compressed_attention": "deepseek_v4",
    "layers of hybrid_sliding": "inkling2_text inkling_text",
    "layers of hybrid,": "zaya",
    "layers of conv": "lfm2_moe",
    "has no gate_up_proj": "nemotron_h",
}
REASONS = {name: reason for reason, names in REFUSED.items() for name in names.split()}
WORKING = tuple(name for name in family_names() if name not in REASONS)


@dataclass(frozen=True)
class Formula:
    """A router as its model's documentation has it. `num_best`: of a group's experts, those that rank the group."""

    score: Callable[[float], float] | None = None  # of a logit; None: softmax over all
    bias: str | None = None  # where the vector that choices alone look at lies, from the experts' parent
    on_logits: bool = False
    num_best: int = 0
    renormalises: bool = True
    scale: float = 1.0
    scales: str | None = None


def sigmoid(logit: float) -> float:
    return 1 / (1 + math.exp(-logit))


SOFTMAX, PLAIN = Formula(), Formula(renormalises=False)
DEEPSEEK = Formula(sigmoid, "gate.e_score_correction_bias", num_best=2)
FORMULAS: dict[str, Formula] = {
    "afmoe": Formula(sigmoid, "expert_bias"),
    "axk1": Formula(sigmoid, "gate.e_score_correction_bias", num_best=2, scale=2.5),
    "beam": DEEPSEEK,
    "deepseek_v2": Formula(num_best=1, renormalises=False),
    "deepseek_v3": Formula(sigmoid, "gate.e_score_correction_bias", num_best=2, scale=2.5),
    "dots1": Formula(sigmoid, "gate.e_score_correction_bias", num_best=2, renormalises=False),
    "ernie4_5_moe": Formula(None, "gate.moe_statics.e_score_correction_bias"),
    "exaone_moe": Formula(sigmoid, "gate.e_score_correction_bias", num_best=2, scale=2.5),
    "flex_olmo": PLAIN,
    "flint": Formula(sigmoid),
    "gemma4_text": Formula(scales="router.per_expert_scale"),
    "glm4_moe": DEEPSEEK,
    "glm4_moe_lite": Formula(sigmoid, "gate.e_score_correction_bias", num_best=2, scale=1.8),
    "hy_v3": Formula(sigmoid, "e_score_correction_bias", scale=2.826),
    "kolibri1": Formula(sigmoid, "gate.e_score_correction_bias", on_logits=True, renormalises=False),
    "laguna": Formula(sigmoid, "gate.e_score_correction_bias"),
    "mimo_v2_flash": DEEPSEEK,
    "minimax_m2": Formula(sigmoid, "e_score_correction_bias"),
    "minimax_m3_vl_text": Formula(sigmoid, "gate.e_score_correction_bias"),
    "olmoe": PLAIN,
    "qwen2_moe": PLAIN,
    "qwen3_moe": PLAIN,
    "solar_open": DEEPSEEK,
}


def prompt() -> torch.Tensor:
    return torch.randint(0, 97, (WINDOW + 3,), generator=torch.Generator().manual_seed(1))


@cache
def working(name: str) -> tuple[Engine, list[int]]:
    """An engine on a tiny model, and what transformers' own generate makes of the prompt on a model of its own."""
    model = tiny_family_model(name)
    output = model.generate(prompt()[None], do_sample=False, max_new_tokens=NEW_TOKENS)[0].tolist()
    return Engine.from_model(tiny_family_model(name), drafter=PlantingDrafter(output, 97)), output


@pytest.fixture(params=WORKING)
def case(request: pytest.FixtureRequest) -> tuple[str, Engine, list[int]]:
    return request.param, *working(request.param)


def write(engine: Engine, budget: BudgetConfig) -> tuple[Any, list[torch.Tensor]]:
    if isinstance(engine.drafter, PlantingDrafter):
        engine.drafter._rng.seed(0)
    engine.forget()
    steps = list(engine.generate(prompt(), GenerationConfig(max_new_tokens=NEW_TOKENS, ignore_eos=True), budget))
    kept_by = conversation_of(engine).cache
    kept = [part[:, :, : kept_by.length].clone() for layer in kept_by.layers for part in (layer.keys, layer.values)]
    return steps, kept


def test_greedy_trees_write_what_generate_writes(case):
    _, engine, output = case
    summary = write(engine, BudgetConfig())[0][-1].summary
    assert summary.token_ids == output[len(prompt()) :]
    assert summary.tokens_per_step >= 2
    assert summary.lossless


def test_requests_side_by_side_write_what_generate_writes(case):
    """Of other lengths, within a window and beyond it, each with its own tree."""
    name, shared, output = case
    engine, short = Engine.from_model(tiny_family_model(name), drafter=shared.drafter.fork()), prompt()[:3]
    expected = tiny_family_model(name).generate(short[None], do_sample=False, max_new_tokens=8)[0].tolist()
    asked = [Request(prompt(), GenerationConfig(NEW_TOKENS)), Request(short, GenerationConfig(8))]
    summaries = {number: step.summary for number, step in engine.generate_batch(asked)}
    assert [summaries[number].token_ids for number in (0, 1)] == [output[len(prompt()) :], expected[3:]]
    assert all(summary.lossless for summary in summaries.values()) and summaries[0].tokens_per_step >= 2


def test_a_budget_of_all_experts_changes_no_bit(case):
    _, engine, _ = case
    (plain_steps, plain), (steps, kept) = (write(engine, BudgetConfig(budget=b)) for b in (None, NUM_EXPERTS))
    assert steps[-1].summary.token_ids == plain_steps[-1].summary.token_ids
    assert all(torch.equal(one, other) for one, other in zip(kept, plain, strict=True))


def test_a_budget_bounds_what_is_read_and_is_called_lossy(case):
    _, engine, _ = case
    steps, _ = write(engine, BudgetConfig(budget=BUDGET))
    trees = [step for step in steps if step.kind == "tree"]
    assert trees and max(max(step.experts_active) for step in trees) <= BUDGET
    assert max(max(step.experts_natural) for step in trees) > BUDGET
    assert not steps[-1].summary.lossless


@pytest.mark.parametrize("policy", ["substitution", "truncation"])
def test_a_budgeted_plan_is_the_familys_own_formula(case, policy):
    name, engine, _ = case
    for moe, output in zip(engine.target.moe_layers, router_outputs(engine), strict=True):
        scores = router_scores(moe.family, RouterOutput(*output[:3]))
        num_rows = len(scores.logits_TE)
        context = TreeContext(torch.arange(num_rows), torch.zeros(num_rows), moe.layer)
        plan = MoESpec(BudgetConfig(budget=BUDGET, policy=policy)).plan(scores, context)
        parent = next(m for m in engine.target.layers[moe.layer].modules() if moe.experts in m.children())
        by_hand = Router(name, parent, scores.logits_TE.double().tolist())
        shortlist = by_hand.shortlist()
        assert set(plan.kept_E.nonzero()[:, 0].tolist()) == shortlist
        for row in range(num_rows):
            natural = by_hand.choice(row, set(range(NUM_EXPERTS)))
            assert by_hand.weights(row, natural, natural) == pytest.approx(as_dict(output, row), abs=2e-5)
            chosen = by_hand.choice(row, shortlist) if policy == "substitution" else natural
            expected = by_hand.weights(row, chosen, [expert for expert in chosen if expert in shortlist])
            found = as_dict((None, plan.weights_TK, plan.ids_TK), row)
            assert {expert: weight for expert, weight in found.items() if weight} == pytest.approx(expected, abs=2e-5)


@torch.inference_mode()
def router_outputs(engine: Engine) -> list[tuple]:
    """What every router says of a text, asked of the bare modules."""
    outputs: list[tuple] = []
    handles = [
        moe.router.register_forward_hook(lambda module, args, output: outputs.append(output))
        for moe in engine.target.moe_layers
    ]
    engine.target.model(prompt()[None])
    for handle in handles:
        handle.remove()
    return outputs


def as_dict(output: tuple, row: int) -> dict[int, float]:
    return dict(zip(output[2][row].tolist(), output[1][row].tolist(), strict=True))


class Router:
    """A family's routing by hand: one row and one expert at a time."""

    def __init__(self, name: str, parent: Any, logits: list[list[float]]) -> None:
        self.formula = FORMULAS.get(name, SOFTMAX)
        self.is_mixer, self.top_k = name == "phimoe", 2 if name == "phimoe" else 3
        gives_probabilities = name == "gemma4_text"
        self.logits = [[math.log(value) for value in row] for row in logits] if gives_probabilities else logits
        self.bias, self.scales = (self._vector(parent, path) for path in (self.formula.bias, self.formula.scales))
        self.scores = [self._scores(row) for row in self.logits]

    @staticmethod
    def _vector(parent: Any, path: str | None) -> list[float] | None:
        for part in (path or "").split(".") if path else ():
            parent = getattr(parent, part)
        return parent.detach().double().flatten().tolist() if path else None

    def _scores(self, row: list[float]) -> list[float]:
        if self.formula.score is not None:
            return [self.formula.score(logit) for logit in row]
        total = sum(math.exp(logit) for logit in row)
        return [math.exp(logit) / total for logit in row]

    def shortlist(self) -> set[int]:
        mass = [sum(row[e] / sum(row) for row in self.scores) for e in range(NUM_EXPERTS)]
        return set(sorted(range(NUM_EXPERTS), key=lambda e: -mass[e])[:BUDGET])

    def choice(self, row: int, allowed: set[int]) -> list[int]:
        base = self.logits[row] if self.formula.on_logits else self.scores[row]
        rank = [value + (self.bias[e] if self.bias else 0) for e, value in enumerate(base)]
        if self.formula.num_best:
            groups = [range(start, start + 3) for start in range(0, NUM_EXPERTS, 3)]  # four, of which two are used
            best = {n: sorted((rank[e] for e in group if e in allowed), reverse=True) for n, group in enumerate(groups)}
            value = {n: sum(ranks[: self.formula.num_best]) for n, ranks in best.items() if ranks}
            used = sorted(value, key=lambda n: -value[n])[:2]
            allowed = {e for n in used for e in groups[n] if e in allowed}
        return sorted(allowed, key=lambda e: -rank[e])[: self.top_k]

    def weights(self, row: int, chosen: list[int], survivors: list[int]) -> dict[int, float]:
        if self.is_mixer:
            return {e: self._mixer_weight(row, chosen[:slot], e) for slot, e in enumerate(chosen) if e in survivors}
        scores, formula = self.scores[row], self.formula
        total = sum(scores[e] for e in survivors) if formula.renormalises else 1.0
        return {e: scores[e] / total * formula.scale * (self.scales[e] if self.scales else 1) for e in survivors}

    def _mixer_weight(self, row: int, earlier: list[int], expert: int) -> float:
        """Sparse mixer, jitter 0.01: of experts no better than this one and not yet taken, those within 2 %."""
        logits, own = self.logits[row], self.logits[row][expert]
        near = [
            e
            for e in range(NUM_EXPERTS)
            if e not in earlier and logits[e] <= own and (own - logits[e]) / max(abs(logits[e]), own) <= 0.02
        ]
        return math.exp(own) / sum(math.exp(logits[e]) for e in near)


@pytest.mark.parametrize("name", REASONS)
def test_the_others_are_refused_with_a_reason(name):
    with pytest.raises(ValueError, match=f"is not supported: .*{REASONS[name]}") as refusal:
        Engine.from_model(tiny_family_model(name))
    assert "\n" not in str(refusal.value)


class KnowsAll:
    """A drafter of long chains that are right: deeper than the tiny models' windows."""

    name, tap_layers = "knows all", ()

    def __init__(self, output: list[int]) -> None:
        self._output = output

    def observe(self, features_NF: torch.Tensor | None) -> None: ...

    def truncate(self, length: int) -> None: ...

    def propose(self, context: DraftContext) -> DraftTree:
        length = len(context.token_ids)
        tokens = self._output[length : length + 2 * WINDOW]
        return chain(context.token_ids[-1], tokens, [-0.1] * len(tokens), torch.device("cpu"))


@pytest.mark.parametrize("name", ["gpt_oss", "mixtral"])
def test_windows_slide_through_prefix_and_tree(name):
    """Seen through by a chain longer than the window; one that saw everything would write another text."""
    model = tiny_family_model(name)
    output = model.generate(prompt()[None], do_sample=False, max_new_tokens=NEW_TOKENS)[0].tolist()
    engine = Engine.from_model(tiny_family_model(name), drafter=KnowsAll(output))
    steps, _ = write(engine, BudgetConfig())
    assert steps[-1].summary.token_ids == output[len(prompt()) :]
    assert steps[-1].summary.tokens_per_step > WINDOW
    model.config.sliding_window = 512
    for layer in model.model.layers:
        layer.self_attn.sliding_window = 512
    assert output != model.generate(prompt()[None], do_sample=False, max_new_tokens=NEW_TOKENS)[0].tolist()


def test_the_readme_names_them_all():
    assert set(WORKING) >= AT_LEAST
    by_router: dict[str, list[str]] = defaultdict(list)
    for name in WORKING:
        engine, _ = working(name)
        # Without the tiny model's numbers.
        router = re.sub(r", times .*|\d+ of \d+ ", "", engine.target.moe_layers[0].family.name)
        marks = "°" if any(engine.target.windows.values()) else ""
        by_router[router].append(name + marks)
    most_first = sorted(by_router.items(), key=lambda item: -len(item[1]))
    lines = ["| router | families |", "|---|---|"]
    lines += [f"| {router} | {', '.join(names)} |" for router, names in most_first]
    lines += [f"| refused: {reason.rstrip(',')} | {', '.join(names.split())} |" for reason, names in REFUSED.items()]
    assert_block("families", "\n".join(lines))
