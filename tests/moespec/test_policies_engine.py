"""Expert policies where they act: through the experts' backends, and through whole runs of the embedded pair."""

from __future__ import annotations

from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch

from moespec import EMBEDDED_TARGET, BudgetConfig, Engine, GenerationConfig, TreeConfig
from moespec.bench.agreement import agreement_by_position, replay
from moespec.bench.arms import Arm, parse_arms
from moespec.experts import CpuExperts, _ExpertWeights, can_compile, reference_experts
from moespec.kv_cache import TreeCache
from moespec.policies.method import natural_plan
from moespec.policies.oracle import Oracle
from moespec.policies.parsing import parse_policy
from moespec.policies.profiles import EMBEDDED_PROFILES
from moespec.routing import FAMILIES
from moespec.step_router import NaturalRouter
from moespec.trace import unpack_routing
from moespec.verifier import Draft
from tests.conftest import tiny_model
from tests.moespec.policies import EVERY_POLICY, WHERE, routed
from tests.moespec.runs import planted_engine
from tests.moespec.test_budget import NUM_EXPERTS, NUM_ROWS, random_scores
from tests.moespec.test_layers import brute_force

LARGE = TreeConfig(16, 5, 4, 0)
PROMPTS = ("Tell me a short story.", "What does river mean?")
# Policy -> experts per layer at most, on average over layers.
CAPS = {
    "sere:s=2": 64,
    "sere:s=1,rho=0.5": 64,
    "oea:k0=2": 64,
    "top-s:s=3": 64,
    "random:b=12": 12,
    "oracle": 64,
    "oracle:b=12": 12,
    "accept-moe-like": 64,
    "accept-moe-like:commitment=path": 64,
    "alloc-moe-like:b=12": 12,
    "moe-spec:b=12,score=natural,row-weight=path": 12,
}


def policy_experts():
    """Experts as many as the plans of the tests name."""
    model = tiny_model("qwen3_moe")
    config = model.config
    config.num_experts = config.num_local_experts = NUM_EXPERTS
    experts = type(model.model.layers[0].mlp.experts)(config)
    torch.manual_seed(0)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return experts.requires_grad_(False)


def grouped(experts, *plan):
    return _ExpertWeights(experts).run(experts, *plan)


@pytest.mark.parametrize("make", EVERY_POLICY.values(), ids=EVERY_POLICY)
@pytest.mark.parametrize(
    "backend", [reference_experts, CpuExperts(), grouped], ids=["reference", "compiled", "grouped"]
)
@torch.inference_mode()
def test_backends_run_a_plan_and_read_nothing_else(backend, make):
    """SERE's rows name experts twice; top-s drops; what no surviving slot names is not touched."""
    experts, scores = policy_experts(), random_scores(FAMILIES[0])
    assert can_compile(experts)
    plan = make().plan(scores, WHERE)
    x_TD = torch.randn(NUM_ROWS, 32, generator=torch.Generator().manual_seed(0))
    expected_TD = brute_force(experts, x_TD, plan.ids_TK, plan.weights_TK)
    used = {expert for row in routed(plan) for expert in row}
    unused = [expert for expert in range(NUM_EXPERTS) if expert not in used]
    assert unused
    experts.gate_up_proj[unused] = torch.nan
    experts.down_proj[unused] = torch.nan
    out_TD = backend(experts, x_TD, plan.ids_TK, plan.weights_TK)
    torch.testing.assert_close(out_TD.double(), expected_TD, atol=1e-4, rtol=1e-4)


@pytest.fixture(scope="module")
def engine():
    opened = Engine.from_pretrained(EMBEDDED_TARGET)
    yield opened
    opened.close()


@pytest.mark.parametrize("name", CAPS)
def test_every_name_runs_and_its_trace_tells_what_it_did(name, engine):
    budget = parse_policy(name, EMBEDDED_PROFILES)
    engine.check_budget(budget)
    texts = []
    for _ in range(2):
        engine.forget()
        *steps, last = engine.generate(PROMPTS[0], GenerationConfig(32, ignore_eos=True), budget, LARGE)
        texts.append(last.summary.token_ids)
        was_lossless = True
        for step in steps:
            if step.kind != "tree":
                continue
            assert sum(step.experts_active) <= CAPS[name] * len(step.layers)
            for layer in step.layers:
                ids, weights = unpack_routing(layer, len(step.tree.token_ids))
                pairs = [pair for row in zip(ids, weights, strict=True) for pair in zip(*row, strict=True)]
                # Weights below half precision are 0 in a trace.
                assert {expert for expert, weight in pairs if weight != 0} <= set(layer.active) <= set(layer.kept)
                was_lossless &= set(layer.natural) == set(layer.active)
        assert not last.summary.lossless and not was_lossless
    assert texts[0] == texts[1], "runs repeat"
    if not name.startswith("moe-spec"):
        assert steps[1].settings.policy == budget.policy_name == last.summary.settings["budget"]["policy"]


@pytest.mark.parametrize("name", ["sere:s=8", "sere:s=1,rho=1.01", "oea:k0=8", "top-s:s=8", "random:b=64",
                                  "alloc-moe-like:b=64", "none"])  # fmt: skip
def test_identities_write_the_lossless_text(name, engine):
    def text(budget: BudgetConfig):
        engine.forget()
        *_, last = engine.generate(PROMPTS[1], GenerationConfig(32, ignore_eos=True), budget, LARGE)
        return last.summary

    found = text(parse_policy(name, EMBEDDED_PROFILES))
    assert found.lossless
    assert found.token_ids == text(BudgetConfig()).token_ids


class Witness(Oracle):
    """An oracle that keeps what it was told."""

    told: ClassVar[list[list[int]]] = []

    def informed(self, accepted_rows):
        self.told.append(list(accepted_rows))
        return super().informed(accepted_rows)


class Foretold:
    """What an informed oracle plans, by one who is told nothing: steps run once."""

    def __init__(self, path: list[int]) -> None:
        self.plan = Oracle().informed(path).plan


def drafts_of(engine: Engine, reference: list[int]) -> list[Draft]:
    """Two requests at different places of the text, each behind its own prefix."""
    drafts = []
    for length in (11, 17):
        cache = TreeCache(len(engine.target.layers))
        with engine.target.stepping(NaturalRouter(length)):
            engine.target.forward(torch.tensor(reference[:length]), torch.arange(length), None, cache, keep=1)
        tree = engine.drafter.propose(SimpleNamespace(token_ids=reference[: length + 1]))
        drafts.append(Draft(tree, cache, GenerationConfig()))
    return drafts


@torch.inference_mode()
def test_the_oracle_is_told_the_unbudgeted_path_and_its_rows_are_written_again(family):
    def verified(policy):
        engine, reference = planted_engine(family)
        draft = drafts_of(engine, reference)[0]
        found = engine.verifier.verify(draft, policy)
        draft.cache.keep_path(11, path)
        return found, [layer.keys[:, :, : draft.cache.length].clone() for layer in draft.cache.layers]

    engine, reference = planted_engine(family)
    path = engine.verifier.verify(drafts_of(engine, reference)[0], None).verdict.path
    _, natural_keys = verified(None)
    Witness.told.clear()
    found, keys = verified(Witness())
    assert Witness.told == [path] and len(path) > 1
    expected, expected_keys = verified(Foretold(path))
    assert torch.equal(found.opinions.top_logp_TA, expected.opinions.top_logp_TA)
    assert torch.equal(found.counts.active_LE, expected.counts.active_LE) and found.counts.changed
    assert all(torch.equal(*pair) for pair in zip(keys, expected_keys, strict=True))
    torch.testing.assert_close(keys, natural_keys)  # of the path's own rows no expert was taken


class Onlooker:
    """Is told the path, and changes nothing: what it costs is what was left of the first run."""

    def plan(self, scores, context):
        return natural_plan(scores)

    def informed(self, accepted_rows):
        return self


def test_agreement_is_measured_behind_the_rows_written_again(engine):
    prompt_ids = engine.encode(PROMPTS[1])
    arm = Arm("onlooker", LARGE, BudgetConfig(policy=Onlooker()))
    (found,) = agreement_by_position(engine, [arm], prompt_ids[:4], prompt_ids[4:])
    assert max(found.kl) < 1e-6


def test_a_random_set_is_drawn_anew_at_every_step(engine):
    budget = parse_policy("random:b=12")
    steps = engine.generate(PROMPTS[0], GenerationConfig(24, ignore_eos=True), budget, LARGE)
    drawn = [tuple(step.layers[0].kept) for step in steps if step.kind == "tree"]
    assert len(drawn) > 3 and len(set(drawn)) == len(drawn)


def test_quality_and_benchmarks_take_any_policy(engine):
    names = "sere:s=1 oracle random:b=8 top-s:s=8"
    arms = [arm for arm in parse_arms(names, EMBEDDED_PROFILES) if arm.is_lossy]
    prompt_ids = engine.encode(PROMPTS[0])
    *_, last = engine.generate(prompt_ids, GenerationConfig(24, ignore_eos=True))
    text = last.summary.token_ids
    found = dict(zip(names.split(), agreement_by_position(engine, arms, prompt_ids, text), strict=True))
    assert all(found["top-s:s=8"].top1) and max(found["top-s:s=8"].kl) < 1e-6, "nothing was changed"
    assert sum(found["random:b=8"].top1) < sum(found["oracle"].top1), "the oracle knows what it is about"
    root_agrees, summary = replay(engine, arms[1], prompt_ids, text)
    assert summary.token_ids == text and any(root_agrees)


@pytest.mark.parametrize("is_shared", [False, True])
@torch.inference_mode()
def test_the_oracle_knows_every_path_of_a_batch(family, is_shared):
    """Of each request its own, or, under one set for all, all paths by their rows among all rows."""

    def verified(policy):
        engine, reference = planted_engine(family)
        drafts = drafts_of(engine, reference)
        found = engine.verifier.verify_together(drafts, policy, is_shared)
        assert [draft.cache.length for draft in drafts] == [11 + drafts[0].tree.num_rows, 17 + drafts[1].tree.num_rows]
        return found, drafts[0].tree.num_rows

    natural, num_rows = verified(None)
    paths = [one.verdict.path for one in natural]
    assert all(len(path) > 1 for path in paths)
    Witness.told.clear()
    found, _ = verified(Witness())
    together = [*paths[0], *(num_rows + row for row in paths[1])]
    assert Witness.told == ([together] if is_shared else paths)
    if is_shared:
        expected, _ = verified(Foretold(together))
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one.opinions.top_logp_TA, other.opinions.top_logp_TA)
            assert torch.equal(one.counts.active_LE, other.counts.active_LE)
