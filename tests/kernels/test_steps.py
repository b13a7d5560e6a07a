"""Whole steps on the Triton backend, interpreted: against transformers' generate and against the CPU's engine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from moespec import BudgetConfig, DraftContext, DraftTree, Engine, GenerationConfig, TreeConfig
from moespec.budget import MoESpec
from moespec.drafters.eagle3 import Eagle3Drafter
from moespec.drafters.head import Eagle3Head
from moespec.drafters.passes import HeadPass
from moespec.drafters.static_pass import StaticPass
from moespec.drafters.torch_pass import TorchPass
from moespec.graph import Graphs
from moespec.kv_cache import TreeCache
from moespec.static_step import NUM_TREE_PARTS, StaticOutputs, StaticStep, unsupported_reason
from moespec.step_router import NaturalRouter
from tests.conftest import VOCAB, tiny_model
from tests.drafters import PlantingDrafter
from tests.moespec.test_eagle3 import tiny_head
from tests.questions import NoQuestions

COUNTS = NUM_TREE_PARTS + 4  # among what a step says, behind the opinions
ACTIVE = COUNTS + 3  # experts that were read
PROMPT = [3, 1, 4, 1, 5]
NUM_TOKENS = 9
BUDGETS = [
    BudgetConfig(budget=4),
    BudgetConfig(budget=4, policy="truncation", row_weight="path"),
    BudgetConfig(coverage=0.6, protect_root=True),
    BudgetConfig(budget=5, score="natural", row_weight="depth", protect_root=True),
]
GREEDY = GenerationConfig(max_new_tokens=NUM_TOKENS, ignore_eos=True)


def model_of(family: str) -> Any:
    """Of two layers: the interpreter takes seconds for each."""
    return tiny_model(family, num_layers=2)


def reference(family: str) -> list[int]:
    output = model_of(family).generate(torch.tensor([PROMPT]), do_sample=False, max_new_tokens=NUM_TOKENS)
    return output[0, len(PROMPT) :].tolist()


def planting_engine(family: str, backend: str, known: float = 1.0) -> Engine:
    drafter = PlantingDrafter(PROMPT + reference(family), VOCAB, known=known)
    return Engine.from_model(model_of(family), drafter=drafter, backend=backend)


def run(engine: Engine, generation: GenerationConfig = GREEDY, budget: BudgetConfig | None = None) -> list:
    return list(engine.generate(PROMPT, generation, budget))


def context() -> DraftContext:
    return DraftContext(PROMPT, TreeConfig())


@torch.inference_mode()
def prompt_cache(engine: Engine) -> TreeCache:
    """The keys and values of the prompt but its last token."""
    cache, num_rows = TreeCache(len(engine.target.layers)), len(PROMPT) - 1
    with engine.target.stepping(NaturalRouter(num_rows)):
        engine.target.forward(torch.tensor(PROMPT[:-1]), torch.arange(num_rows), None, cache, keep=1)
    return cache


@torch.inference_mode()
def step_outputs(
    engine: Engine,
    tree: DraftTree,
    policy: MoESpec | None,
    cache: TreeCache | None = None,
    num_rows: int = 16,
    stale: torch.Tensor | None = None,
) -> StaticOutputs:
    """One step of fixed shape behind the prompt; `stale`: tokens that its buffers held before."""
    cache = cache or prompt_cache(engine)
    step = StaticStep(engine.target, num_rows, cache)
    if stale is not None:
        step._tree.tokens_T.copy_(stale)
        step._tree.mask_TT.fill_(True)
    step.fill(tree, cache.length, policy)
    return step.run()


def test_greedy_is_what_transformers_writes(family):
    engine = planting_engine(family, "triton")
    model = engine.target.model
    fused = {module for module in model.modules() if "forward" in vars(module)}
    for layer, moe in zip(model.model.layers, engine.target.moe_layers, strict=True):
        assert fused >= {layer.self_attn, layer.input_layernorm, layer.post_attention_layernorm, moe.router}
    assert model.model.norm in fused
    steps = run(engine)
    assert engine.info.backend == "triton"
    assert steps[-1].summary.token_ids == reference(family)
    assert steps[-1].summary.lossless
    assert any(step.kind == "tree" and len(step.token_ids) > 2 for step in steps)
    engine.close()
    assert not any("forward" in vars(module) for module in model.modules())


# Each router family with a policy of its own: a run of the interpreter takes seconds.
@pytest.mark.parametrize(
    ("family", "budget"),
    [("olmoe", None), ("olmoe", BUDGETS[0]), ("qwen3_moe", BUDGETS[1]), ("mixtral", BUDGETS[2]), ("olmoe", BUDGETS[3])],
    ids=str,
)
def test_steps_are_those_of_the_cpu(family, budget):
    """Two implementations of everything from the router to the counts: the select kernel, and compiled loops."""
    on_triton, on_cpu = (run(planting_engine(family, backend), budget=budget) for backend in ("triton", "cpu"))
    assert len(on_triton) == len(on_cpu)
    for ours, theirs in zip(on_triton, on_cpu, strict=True):
        for name in ("token_ids", "kind", "origins", "experts_natural", "experts_kept", "experts_active", "lossless"):
            assert getattr(ours, name) == getattr(theirs, name), name
        assert ours.mass_kept == pytest.approx(theirs.mass_kept, abs=1e-5)
        for own, other in zip(ours.layers, theirs.layers, strict=True):
            assert (own.natural, own.kept, own.active, own.num_displaced) == (
                *(other.natural, other.kept, other.active, other.num_displaced),
            )
            assert own.score == pytest.approx(other.score, abs=1e-3)
        if ours.tree is not None:
            assert ours.tree.target_p[1:] == pytest.approx(theirs.tree.target_p[1:], abs=1e-5)
            assert ours.tree.missing == theirs.tree.missing


def test_a_seed_gives_the_text_that_it_gives_on_the_cpu():
    sampled = GenerationConfig(max_new_tokens=NUM_TOKENS, temperature=0.8, top_p=0.9, seed=7, ignore_eos=True)
    texts = [run(planting_engine("mixtral", backend), sampled)[-1].summary.token_ids for backend in ("triton", "cpu")]
    assert texts[0] == texts[1]


def test_a_budget_of_all_experts_is_bit_identical_to_none(family):
    engine = planting_engine(family, "triton")
    tree = engine.drafter.propose(context())
    # Handed over as a policy: as a budget the engine itself takes it for none.
    policies = None, MoESpec(BudgetConfig(budget=engine.info.num_experts))
    logits = [step_outputs(engine, tree, policy).logits_TV for policy in policies]
    assert torch.equal(*logits)


@torch.no_grad()
def test_nan_in_experts_outside_the_plan_changes_nothing(family):
    engine = planting_engine(family, "triton")
    tree = engine.drafter.propose(context())
    policy = MoESpec(BudgetConfig(budget=engine.info.top_k))
    before = step_outputs(engine, tree, policy)
    active_LE = before.said[ACTIVE]
    assert not active_LE.all()
    with_prompt = prompt_cache(engine)
    for moe, active_E in zip(engine.target.moe_layers, active_LE, strict=True):
        for expert in (~active_E).nonzero()[:, 0].tolist():
            moe.experts.gate_up_proj[expert], moe.experts.down_proj[expert] = torch.nan, torch.nan
    after = step_outputs(engine, tree, policy, with_prompt)
    assert torch.equal(before.logits_TV, after.logits_TV)
    assert after.logits_TV.isfinite().all()


def test_a_padded_step_is_the_step(family):
    """Rows that the tree does not have enter nothing, whatever their buffers held before."""
    engine = planting_engine(family, "triton")
    tree = engine.drafter.propose(context())
    num_rows = 16
    assert tree.num_rows < num_rows
    policy = MoESpec(BUDGETS[0])
    exact = step_outputs(engine, tree, policy, num_rows=tree.num_rows)
    padded = step_outputs(engine, tree, policy, num_rows=num_rows, stale=torch.randint(0, VOCAB, (num_rows,)))
    torch.testing.assert_close(padded.logits_TV[: tree.num_rows], exact.logits_TV, atol=1e-5, rtol=1e-5)
    for ours, theirs in zip(padded.said[COUNTS : ACTIVE + 1], exact.said[COUNTS : ACTIVE + 1], strict=True):
        torch.testing.assert_close(ours, theirs)


def eagle_engine(backend: str, kind: Callable[[Eagle3Head, int], HeadPass]) -> Engine:
    head = tiny_head(target_hidden_size=32, vocab_size=VOCAB, draft_vocab_size=VOCAB, tap_layers=(0, 1, 2))
    return Engine.from_model(tiny_model("olmoe"), drafter=Eagle3Drafter(head, 512, kind(head, 512)), backend=backend)


def fixed_shape(head: Eagle3Head, max_context: int) -> StaticPass:
    return StaticPass(head, max_context, Graphs(torch.device("cpu")))


def test_trees_that_come_with_padding_make_the_same_steps():
    """Drafted in a fixed shape, so that only the device knows how many rows count; sometimes it is the root alone."""
    tree = TreeConfig(total_tokens=6, depth=2, top_k=3, min_path_p=0.4)
    steps = [
        list(eagle_engine(backend, kind).generate(PROMPT, GREEDY, BUDGETS[0], tree))
        for backend, kind in (("triton", fixed_shape), ("cpu", TorchPass))
    ]
    for ours, theirs in zip(*steps, strict=True):
        for name in ("token_ids", "kind", "settings", "experts_kept", "experts_active", "lossless"):
            assert getattr(ours, name) == getattr(theirs, name), name
        if ours.tree is not None:
            assert ours.tree.token_ids == theirs.tree.token_ids
            # A fixed shape grows every level, so that it may know more of what the drafter would have tried.
            for seen, asked in zip(ours.tree.draft_top, theirs.tree.draft_top, strict=True):
                assert not asked or [token for token, *_ in seen] == [token for token, *_ in asked]
    assert {step.kind for step in steps[0]} == {"prefill", "plain", "tree"}


@pytest.mark.parametrize("kernel", ["kernels.experts.moe_experts", "kernels.select.select"])
def test_a_kernel_that_fails_is_replaced_once_and_the_run_goes_on(kernel, monkeypatch):
    calls = []

    def broken(*args: object) -> None:
        calls.append(args)
        raise RuntimeError("out of resource: shared memory\nand more")

    monkeypatch.setattr(kernel, broken)
    engine = planting_engine("olmoe", "triton")
    steps = run(engine)
    assert steps[-1].summary.token_ids == reference("olmoe")
    assert len(calls) == 1
    assert engine.info.backend == "grouped-loop"
    assert "RuntimeError: out of resource: shared memory)" in engine.info.backend_reason
    assert steps[-1].summary.device["backend"] == "grouped-loop"
    assert unsupported_reason(engine.target) == "its experts do not run on Triton kernels"


def test_a_step_asks_the_device_for_nothing(family):
    """What a CUDA graph holds may not. The kernels themselves are left out: their interpreter reads what it likes."""
    engine = planting_engine(family, "triton")
    tree = engine.drafter.propose(context())
    cache = prompt_cache(engine)
    step = StaticStep(engine.target, 16, cache)
    step.fill(tree, cache.length, MoESpec(BUDGETS[3]))
    with torch.inference_mode(), NoQuestions() as mode:
        step.run()
    assert mode.asked == ()
    with NoQuestions() as mode:
        torch.ones(1).item()
    assert mode.asked  # the mode can tell
