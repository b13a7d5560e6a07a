"""The engine against transformers' own generate, and the invariants of a run."""

from __future__ import annotations

import json

import pytest
import torch

from moespec import (
    EMBEDDED_TARGET,
    BudgetConfig,
    Control,
    Engine,
    ExpertPlan,
    GenerationConfig,
    RouterScores,
    TreeConfig,
    TreeContext,
    parse_policy,
)
from moespec.experts import PackedExperts
from moespec.trace import write_trace
from moespec.trace_reading import read_step, read_trace
from tests.conftest import VOCAB, conversation_of, tiny_model
from tests.drafters import PlantingDrafter
from tests.moespec.runs import NEW_TOKENS, planted_engine, prompt, reference_ids, run


def test_greedy_trees_write_what_generate_writes(family):
    engine, reference = planted_engine(family)
    summary = run(engine)[-1].summary
    assert summary.token_ids == reference[11:]
    assert summary.tokens_per_step >= 2.5  # the tree walk and the cache compaction were really exercised
    assert summary.lossless


def test_useless_drafts_change_nothing(family):
    engine, reference = planted_engine(family, known=0.3)
    assert run(engine)[-1].summary.token_ids == reference[11:]


def test_plain_decoding_writes_what_generate_writes(family):
    model = tiny_model(family)
    steps = run(Engine.from_model(tiny_model(family)))
    assert steps[-1].summary.token_ids == reference_ids(model, prompt())[11:]
    assert {step.kind for step in steps} == {"prefill", "plain"}


def test_budget_of_all_experts_is_bit_identical(family):
    texts = []
    for budget in (None, 64):
        engine, _ = planted_engine(family)
        steps = run(engine, budget=BudgetConfig(budget=budget))
        cache = conversation_of(engine).cache
        texts.append((steps[-1].summary.token_ids, cache.layers[-1].keys[:, :, : cache.length].clone()))
    assert texts[0][0] == texts[1][0]
    assert torch.equal(texts[0][1], texts[1][1])


@pytest.mark.parametrize("policy", ["substitution", "truncation"])
def test_budget_bounds_the_experts_touched(family, policy):
    engine, _ = planted_engine(family)
    top_k = engine.info.top_k
    steps = run(engine, budget=BudgetConfig(budget=top_k + 1, policy=policy))
    trees = [step for step in steps if step.kind == "tree"]
    assert trees
    assert all(max(step.experts_active) <= top_k + 1 for step in trees)
    assert max(max(step.experts_natural) for step in trees) > top_k + 1  # so that the bound bites
    assert not steps[-1].summary.lossless


class FirstExperts:
    """Sends every row to the first experts, whatever its router says."""

    def plan(self, scores: RouterScores, context: TreeContext) -> ExpertPlan:
        ids_TK = torch.arange(scores.top_k).expand_as(scores.natural_ids_TK).contiguous()
        return ExpertPlan(ids_TK, torch.full_like(scores.natural_weights_TK, 1 / scores.top_k))


def packed_experts(engine: Engine) -> list[PackedExperts]:
    """What a step really reads, layer by layer."""
    target = engine.target
    if target.is_compiled:
        return [layer.experts for layer in target._lean._layers]
    return [target.backend._run._weights[moe.experts][1] for moe in target.moe_layers]


@pytest.mark.parametrize("how", ["no plan names", "truncation drops"])
@torch.no_grad()
def test_nan_in_experts_that_do_not_run_changes_nothing(family, how):
    """They are never read: neither those outside every plan, nor those that a plan names with a weight of 0."""
    model = tiny_model(family)
    engine = Engine.from_model(model, drafter=PlantingDrafter(list(range(VOCAB)), VOCAB))
    used: list[set[int]] = [set() for _ in engine.target.moe_layers]
    for moe, ids in zip(engine.target.moe_layers, used, strict=True):  # the prompt is routed as it always is
        moe.router.register_forward_hook(lambda module, args, output, ids=ids: ids.update(output[2].flatten().tolist()))
    model(prompt()[None, :1])
    truncating = BudgetConfig(budget=engine.info.top_k, policy="truncation")
    request = {
        "prompt": prompt()[:1],
        "budget": truncating if how == "truncation drops" else BudgetConfig(policy=FirstExperts()),
        "generation": GenerationConfig(max_new_tokens=3),
    }
    before = run(engine, **request)
    assert any(step.kind == "tree" for step in before)
    for step in before[1:]:
        for layer, ids in zip(step.layers, used, strict=True):
            ids.update(layer.active)
    for packed, ids in zip(packed_experts(engine), used, strict=True):
        outside = [expert for expert in range(len(packed.down)) if expert not in ids]
        assert outside
        packed.gate_up[outside], packed.down[outside] = float("nan"), float("nan")
    engine.forget()
    engine.drafter._rng.seed(0)
    after = run(engine, **request)
    assert after[-1].summary.token_ids == before[-1].summary.token_ids
    assert any(sum(step.tree.missing) for step in after if step.kind == "tree")  # something was dropped


def test_cache_after_compaction_equals_a_fresh_prefill(family):
    engine, _ = planted_engine(family)
    run(engine)
    conversation = conversation_of(engine)
    fresh = Engine.from_model(tiny_model(family))
    run(fresh, prompt=conversation.token_ids, generation=GenerationConfig(max_new_tokens=1))
    length = conversation.cache.length
    assert length == len(conversation.token_ids) - 1
    for ours, theirs in zip(conversation.cache.layers, conversation_of(fresh).cache.layers, strict=True):
        torch.testing.assert_close(ours.keys[:, :, :length], theirs.keys[:, :, :length], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(ours.values[:, :, :length], theirs.values[:, :, :length], atol=1e-4, rtol=1e-4)


def test_budget_moves_while_running_and_lossless_follows():
    engine, _ = planted_engine("qwen3_moe")
    control = Control()
    seen = []
    for step in engine.generate(prompt(), GenerationConfig(max_new_tokens=NEW_TOKENS), control=control):
        seen.append(step)
        if len(seen) == 4:
            control.update(budget=BudgetConfig(budget=3))
        if len(seen) == 7:
            control.update(budget=BudgetConfig())
    assert [step.settings.budget for step in seen[:8]] == [None] * 4 + [3] * 3 + [None]
    assert all(step.lossless for step in seen[:4])
    assert not any(step.lossless for step in seen[4:])  # the cache stays lossy when the budget is switched off
    again = run(engine)  # a new turn cuts the cache back to the prompt: its lossy part is gone
    assert again[-1].summary.lossless


def test_stop_ends_within_one_step_and_the_engine_stays_usable():
    engine, reference = planted_engine("olmoe")
    control = Control()
    steps = engine.generate(prompt(), GenerationConfig(max_new_tokens=NEW_TOKENS), control=control)
    next(steps), next(steps)
    control.stop()
    last = next(steps)
    assert last.summary is not None
    assert last.summary.finish_reason == "stopped"
    assert run(engine)[-1].summary.token_ids == reference[11:]


def test_closing_and_failing_runs_leave_the_engine_usable(monkeypatch):
    engine, reference = planted_engine("mixtral")
    steps = engine.generate(prompt(), GenerationConfig(max_new_tokens=NEW_TOKENS))
    next(steps), next(steps)
    steps.close()
    assert run(engine)[-1].summary.token_ids == reference[11:]
    steps = engine.generate(prompt(), GenerationConfig(max_new_tokens=NEW_TOKENS))
    next(steps)
    with monkeypatch.context() as patch:
        patch.setattr(engine.target, "forward", lambda *args, **kwargs: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            next(steps)
    assert run(engine)[-1].summary.token_ids == reference[11:]


def test_close_gives_the_model_back():
    model = tiny_model("olmoe")
    reference = reference_ids(model, prompt())
    engine = Engine.from_model(model, drafter="ngram")
    run(engine, budget=BudgetConfig(budget=3))
    assert reference_ids(model, prompt()) == reference  # inert outside a step, too
    engine.close()
    assert reference_ids(model, prompt()) == reference
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_trace_of_token_ids_in_a_tensor_can_be_written(tmp_path):
    engine, _ = planted_engine("olmoe")
    header = engine.header(prompt(), GenerationConfig(), BudgetConfig(), TreeConfig())
    write_trace(tmp_path / "trace.jsonl", header, run(engine))
    assert read_trace(tmp_path / "trace.jsonl")[0].prompt == prompt().tolist()


def test_trace_survives_json():
    engine, _ = planted_engine("olmoe")
    for step in run(engine, budget=BudgetConfig(budget=4)):
        assert read_step(json.loads(json.dumps(step.to_json()))) == step


@pytest.mark.parametrize("drafter", ["auto", "ngram"])
@pytest.mark.parametrize("policy", ["none", "moe-spec:b=12", "oea:k0=2", "oracle:b=10"])
def test_a_model_that_is_built_meanwhile_changes_nothing(drafter, policy):
    """transformers sets the process's default dtype while it builds one, in whatever thread."""
    engine = Engine.from_pretrained(EMBEDDED_TARGET, drafter)
    budget = BudgetConfig() if policy == "none" else parse_policy(policy)
    asked = GenerationConfig(max_new_tokens=24, temperature=0.7), budget, TreeConfig()
    expected = [step.token_ids for step in engine.generate("Tell me a story.", *asked)]
    engine.forget()
    torch.set_default_dtype(torch.bfloat16)
    try:
        found = [step.token_ids for step in engine.generate("Tell me a story.", *asked)]
    finally:
        torch.set_default_dtype(torch.float32)
    assert found == expected


def test_a_seed_gives_the_same_text_whatever_the_tree():
    generation = GenerationConfig(max_new_tokens=30, temperature=0.9, seed=5)
    engine, _ = planted_engine("qwen3_moe", known=0.5)
    plain = Engine.from_model(tiny_model("qwen3_moe"))
    assert (
        run(engine, generation=generation)[-1].summary.token_ids
        == run(plain, generation=generation)[-1].summary.token_ids
    )
