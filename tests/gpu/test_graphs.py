"""Whole steps on a GPU: graphs against the same operations one by one, and the invariants on the embedded model."""

from __future__ import annotations

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from moespec import EMBEDDED_TARGET, BudgetConfig, Control, Engine, GenerationConfig, StepTrace, TreeConfig
from moespec.budget import MoESpec
from moespec.drafters.base import DraftContext
from moespec.drafters.eagle3 import Eagle3Drafter
from moespec.drafters.torch_pass import TorchPass
from moespec.hf import AutoModelForCausalLM
from moespec.kv_cache import TreeCache
from moespec.recorder import policy_for
from moespec.static_step import BUCKETS, NUM_TREE_PARTS, StaticOutputs, StaticStep
from moespec.step_router import NaturalRouter
from moespec.tree import chain
from moespec.types import DraftTree

COUNTS = NUM_TREE_PARTS + 4  # among what a step says, behind the opinions
ACTIVE = COUNTS + 3  # experts that were read
PROMPTS = ("What does river mean?", "Tell me a short story.", "Write 17 in words.")
GREEDY = GenerationConfig(max_new_tokens=64, ignore_eos=True)
BUDGETS = [
    BudgetConfig(),
    BudgetConfig(budget=12),
    BudgetConfig(budget=16, policy="truncation", row_weight="path"),
    BudgetConfig(coverage=0.9, protect_root=True),
]


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine.from_pretrained(EMBEDDED_TARGET, device="cuda", dtype="bfloat16")


@pytest.fixture(scope="module")
def exact_engine() -> Engine:
    return Engine.from_pretrained(EMBEDDED_TARGET, device="cuda", dtype="float32")


def run(engine: Engine, prompt: str = PROMPTS[0], budget: BudgetConfig | None = None) -> list[StepTrace]:
    engine.forget()
    return list(engine.generate(prompt, GREEDY, budget))


def tree_of(num_rows: int, root: int) -> DraftTree:
    tokens = torch.randint(10, 4000, (num_rows - 1,), generator=torch.Generator().manual_seed(num_rows)).tolist()
    return chain(root, tokens, [-0.5] * (num_rows - 1), torch.device("cuda"))


@torch.inference_mode()
def step_of(engine: Engine, token_ids: list[int], num_rows: int) -> StaticStep:
    cache, target = TreeCache(len(engine.target.layers)), engine.target
    with target.stepping(NaturalRouter(len(token_ids) - 1)):
        ids_N = torch.tensor(token_ids[:-1], device="cuda")
        target.forward(ids_N, torch.arange(len(token_ids) - 1, device="cuda"), None, cache, keep=1)
    return StaticStep(target, num_rows, cache)


def tensors_of(outputs: StaticOutputs) -> list[torch.Tensor]:
    features = [] if outputs.features_TF is None else [outputs.features_TF]
    return [part.clone() for part in (outputs.logits_TV, *features, *outputs.said)]


def test_steps_run_on_triton_and_are_captured(engine):
    run(engine)
    assert (engine.info.backend, engine.info.graphs) == ("triton", "captured"), engine.info
    assert all("forward" in vars(layer.self_attn) for layer in engine.target.layers), "attention is fused"


@pytest.mark.parametrize("num_rows", BUCKETS)
@torch.inference_mode()
def test_a_replay_is_the_same_operations_bit_for_bit(engine, num_rows):
    """One capture for all budgets: what moves lies in buffers."""
    token_ids = engine.encode(PROMPTS[1])
    tree, prefix = tree_of(num_rows, token_ids[-1]), len(token_ids) - 1
    step = step_of(engine, token_ids, num_rows)
    step.fill(tree, prefix, None)
    replay = engine.target.graphs.capture(step.run)
    assert engine.target.graphs.reason is None
    for budget in BUDGETS:
        policy = policy_for(budget, engine.info.num_experts) if num_rows > 1 else None
        step.fill(tree, prefix, policy)
        one_by_one, replayed = tensors_of(step.run()), tensors_of(replay())
        for expected, actual in zip(one_by_one, replayed, strict=True):
            assert torch.equal(actual.nan_to_num(), expected.nan_to_num())


@pytest.mark.parametrize("prompt", PROMPTS)
def test_greedy_in_fp32_is_what_transformers_writes(exact_engine, prompt):
    """Invariant 2; with graphs, drafted trees and Triton kernels in between."""
    steps = run(exact_engine, prompt)
    model = AutoModelForCausalLM.from_pretrained(EMBEDDED_TARGET, dtype=torch.float32).to("cuda").eval()
    model.generation_config.eos_token_id = None
    ids = torch.tensor([exact_engine.encode(prompt)], device="cuda")
    expected = model.generate(ids, do_sample=False, max_new_tokens=64)[0, ids.shape[1] :].tolist()
    assert steps[-1].summary.token_ids == expected
    assert steps[-1].summary.lossless
    assert exact_engine.info.backend == "triton"


@torch.inference_mode()
def test_logits_in_bf16_are_the_models_within_rounding(engine):
    """Against the model in fp32, at most twice as far off as transformers' own bf16 is."""
    token_ids = engine.encode(PROMPTS[1])
    tree, prefix = tree_of(16, token_ids[-1]), len(token_ids) - 1
    step = step_of(engine, token_ids, 16)
    step.fill(tree, prefix, None)
    logits_TV = step.run().logits_TV.float()
    whole = torch.tensor([token_ids[:-1] + tree.tokens_T.tolist()], device="cuda")
    exact_TV, rounded_TV = (
        AutoModelForCausalLM.from_pretrained(EMBEDDED_TARGET, dtype=dtype).to("cuda").eval()(whole).logits[0, prefix:]
        for dtype in (torch.float32, torch.bfloat16)
    )
    assert (logits_TV - exact_TV).norm() <= 2 * (rounded_TV.float() - exact_TV).norm()


@torch.inference_mode()
def test_a_budget_of_all_experts_is_bit_identical_to_none(engine):
    """Invariant 1."""
    token_ids = engine.encode(PROMPTS[1])
    step = step_of(engine, token_ids, 16)
    logits = []
    for policy in (None, MoESpec(BudgetConfig(budget=engine.info.num_experts))):
        step.fill(tree_of(16, token_ids[-1]), len(token_ids) - 1, policy)
        logits.append(step.run().logits_TV.clone())
    assert torch.equal(*logits)


@pytest.mark.parametrize("budget", [8, 12, 16, 24])
def test_at_most_the_budgets_experts_are_read(engine, budget):
    """Invariant 5."""
    steps = [step for step in run(engine, budget=BudgetConfig(budget=budget)) if step.kind == "tree"]
    assert steps
    assert max(max(step.experts_active) for step in steps) <= budget
    assert max(max(step.experts_natural) for step in steps) > budget


@torch.inference_mode()
def test_nan_outside_the_plan_changes_nothing():
    engine = Engine.from_pretrained(EMBEDDED_TARGET, device="cuda", dtype="bfloat16")
    token_ids = engine.encode(PROMPTS[1])
    tree, prefix, policy = tree_of(16, token_ids[-1]), len(token_ids) - 1, policy_for(BudgetConfig(budget=8), 64)
    step = step_of(engine, token_ids, 16)
    step.fill(tree, prefix, policy)
    before = step.run()
    logits_TV, active_LE = before.logits_TV.clone(), before.said[ACTIVE].clone()
    for moe, active_E in zip(engine.target.moe_layers, active_LE, strict=True):
        moe.experts.gate_up_proj[~active_E], moe.experts.down_proj[~active_E] = torch.nan, torch.nan
    step.fill(tree, prefix, policy)
    assert torch.equal(step.run().logits_TV, logits_TV)
    assert logits_TV.isfinite().all()


def test_a_step_copies_to_the_host_once(engine):
    run(engine)  # captured by now
    engine.forget()
    steps = engine.generate(PROMPTS[1], GREEDY, BudgetConfig(budget=12))
    next(steps), next(steps)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        for _ in range(4):
            next(steps)
    steps.close()
    copies = sum(event.count for event in profiled.key_averages() if "DtoH" in event.key)
    assert copies == 4, [event.key for event in profiled.key_averages()]


def test_moving_the_budget_needs_no_new_capture(engine):
    run(engine, PROMPTS[1])
    captured = dict(engine.verifier._steps._steps.by_shape)
    for budget in BUDGETS:
        run(engine, PROMPTS[1], budget)
    assert {n: entry for n, entry in engine.verifier._steps._steps.by_shape.items() if n in captured} == captured


@torch.inference_mode()
def test_drafted_trees_are_those_of_the_head_run_eagerly(exact_engine):
    drafter, target, config = exact_engine.drafter, exact_engine.target, TreeConfig(16, 8, 3, 0)
    eager = Eagle3Drafter(drafter.head, target.max_context, TorchPass(drafter.head, target.max_context))
    torch.manual_seed(0)
    features_NF = torch.randn(20, 3 * target.hidden_size, device="cuda")
    token_ids = list(range(100, 121))
    trees = []
    for each in (drafter, eager):
        each.truncate(0)
        each.observe(features_NF[:17])
        each.propose(DraftContext(token_ids[:18], config))
        each.observe(features_NF[17:])
        tree = each.propose(DraftContext(token_ids, config))
        trees.append(tree if tree.num_valid is None else tree.first_rows(int(tree.num_valid)))
    assert trees[0].num_rows == 16
    for name in ("tokens_T", "parents_T", "depths_T", "mask_TT"):
        assert torch.equal(getattr(trees[0], name), getattr(trees[1], name)), name
    exact_engine.forget()


def test_a_long_text_under_moving_settings_is_the_same_with_and_without_graphs():
    """Across the first storage of 512 positions, with trees of two shapes: captures come and go in every order."""
    texts = []
    for graphs in ("captured", "asked to run without"):
        engine, control = Engine.from_pretrained(EMBEDDED_TARGET, device="cuda", dtype="float32"), Control()
        if graphs != "captured":
            engine.target.graphs.reason = graphs
        long, short = (GenerationConfig(max_new_tokens=number, ignore_eos=True) for number in (600, 24))
        for number, step in enumerate(engine.generate(PROMPTS[1], long, control=control)):
            control.update(tree=TreeConfig(16, 5, 4, 0) if number // 20 % 2 else TreeConfig())
            first = step.summary
        # A long prompt behind a short text moves the drafter's storage in a pass of its own.
        engine.forget()
        *_, second = engine.generate((engine.encode(PROMPTS[2]) * 90)[:900], short)
        texts.append([first.token_ids, second.summary.token_ids])
        assert engine.info.graphs == graphs
    assert texts[0] == texts[1]
