"""Where a run ends, and what is refused before it begins."""

from __future__ import annotations

import pytest
import torch

from moespec import (
    BudgetConfig,
    Engine,
    ExpertPlan,
    GenerationConfig,
    RouterScores,
    TreeConfig,
    TreeContext,
)
from tests.conftest import VOCAB, tiny_model
from tests.moespec.runs import planted_engine, reference_ids, run


def test_a_limit_inside_an_accepted_path_cuts_there(family):
    engine, reference = planted_engine(family)
    for limit in range(1, 12):
        last = run(engine, generation=GenerationConfig(max_new_tokens=limit))[-1]
        assert last.summary.token_ids == reference[11 : 11 + limit]
        assert last.summary.finish_reason == "length"


def test_an_end_of_sequence_inside_an_accepted_path_ends_there(family):
    engine, reference = planted_engine(family)
    for position in range(11, 31):
        end = reference[position]
        engine.target.model.generation_config.eos_token_id = end
        last = run(engine)[-1]
        assert last.summary.token_ids == reference[11 : reference.index(end, 11) + 1]
        assert last.summary.finish_reason == "eos"


def test_the_context_is_filled_to_its_last_position():
    model = tiny_model("olmoe")
    engine = Engine.from_model(tiny_model("olmoe"), drafter="ngram")
    long = torch.randint(0, VOCAB, (500,), generator=torch.Generator().manual_seed(2))
    last = run(engine, prompt=long)[-1]
    assert last.summary.finish_reason == "context"
    assert last.summary.token_ids == reference_ids(model, long, 12)[500:]


def test_a_policy_that_chooses_no_expert_of_the_model_is_refused():
    class Beyond:
        def plan(self, scores: RouterScores, context: TreeContext) -> ExpertPlan:
            return ExpertPlan(scores.natural_ids_TK + scores.num_experts, torch.zeros_like(scores.natural_weights_TK))

    engine, _ = planted_engine("qwen3_moe")
    with pytest.raises(ValueError, match="are outside 0 to 11"):
        run(engine, budget=BudgetConfig(policy=Beyond()))


@pytest.mark.parametrize(
    ("bad", "sentence"),
    [
        ([], "the prompt is empty"),
        ([VOCAB], "outside the vocabulary"),
        ("text", "no tokenizer"),
        (list(range(90)) * 6, "context is 512"),
        (torch.zeros(2, 2, dtype=torch.long), "one-dimensional"),
        (3.5, "a prompt is"),
    ],
)
def test_bad_prompts_are_refused_in_a_sentence(bad, sentence):
    engine = Engine.from_model(tiny_model("olmoe"))
    with pytest.raises(ValueError, match=sentence):
        engine.generate(bad)


@pytest.mark.parametrize("budget", [2, 13])
def test_budget_outside_the_model_is_refused_with_the_range(budget):
    engine = Engine.from_model(tiny_model("olmoe"))
    with pytest.raises(ValueError, match="3 to 12"):
        engine.check_budget(BudgetConfig(budget=budget))


@pytest.mark.parametrize("values", [{"total_tokens": 0}, {"total_tokens": 65}, {"depth": 0}, {"top_k": "3"}])
def test_bad_trees_are_refused(values):
    with pytest.raises(ValueError, match="is not allowed"):
        TreeConfig(**values)


@pytest.mark.parametrize(
    "values", [{"budget": 0}, {"budget": "8"}, {"policy": "drop"}, {"coverage": 1.5}, {"budget": 8, "coverage": 0.5}]
)
def test_bad_budgets_are_refused(values):
    with pytest.raises(ValueError, match=r"is not allowed|neither|exclude"):
        BudgetConfig(**values)
