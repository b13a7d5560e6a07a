"""The decode benchmark: its measures against fresh computations without its short cuts, its statistics, its record."""

from __future__ import annotations

import json

import pytest
import torch

from moespec import EMBEDDED_TARGET, BudgetConfig, Engine, GenerationConfig, TreeConfig
from moespec.bench.agreement import agreement_by_position, replay
from moespec.bench.arms import default_arms, parse_arms
from moespec.bench.contestants import Contestants
from moespec.bench.timed import Timed, overall, paired_ratio, speeds
from moespec.cli import main
from moespec.drafters.base import DraftContext
from moespec.kv_cache import TreeCache
from moespec.recorder import StepRecorder, policy_for
from moespec.step_router import NaturalRouter

NUM_TOKENS = 16


@pytest.fixture(scope="module")
def engine():
    loaded = Engine.from_pretrained(EMBEDDED_TARGET)
    yield loaded
    loaded.close()


@pytest.fixture(scope="module")
def texts(engine):
    """(prompt, its lossless continuation) as ids."""
    prompt = engine.encode([{"role": "user", "content": "Tell me a short story about a dog."}])
    *_, last = engine.generate(prompt, GenerationConfig(max_new_tokens=NUM_TOKENS, ignore_eos=True))
    return prompt, last.summary.token_ids


@torch.inference_mode()
def _agrees_from_scratch(engine, arm, token_ids, root):
    """Read everything before the root anew, draft, verify under the budget: does the root's argmax follow the text?"""
    target, drafter = engine.target, engine.drafter
    cache = TreeCache(len(target.layers))
    with target.stepping(NaturalRouter(root)):
        target.forward(torch.tensor(token_ids[:root]), torch.arange(root), None, cache, keep=1)
    drafter.truncate(0)
    drafter.observe(target.features())
    tree = drafter.propose(DraftContext(token_ids[: root + 1], arm.tree))
    recorder = StepRecorder(target.moe_layers, [tree], policy_for(arm.budget, target.num_experts))
    with target.stepping(recorder):
        logits = target.forward(tree.tokens_T, tree.depths_T + root, tree.mask_TT, cache, keep=tree.num_rows)
    return int(logits[0].argmax()) == token_ids[root + 1]


def test_agreement_is_what_a_fresh_read_at_every_position_finds(engine, texts):
    prompt, text = texts
    names = "moe-spec:truncation:8@32,6,6,0 moe-spec:substitution:8@8,4,3,0 moe-spec:truncation:12:natural+depth+root"
    arms = [arm for arm in parse_arms(names) if arm.is_lossy]
    found = [entry.top1 for entry in agreement_by_position(engine, arms, prompt, text)]
    token_ids = prompt + text
    roots = range(len(token_ids) - 2, len(prompt) - 1, -1)
    assert found == [[_agrees_from_scratch(engine, arm, token_ids, root) for root in roots] for arm in arms]
    assert not all(map(all, found)), "a budget of 8 must disagree somewhere, or this test shows nothing"


def test_replay_keeps_to_the_text_and_a_full_budget_replays_without_a_miss(engine, texts):
    prompt, text = texts
    tight, full = (arm for arm in parse_arms("moe-spec:truncation:8 moe-spec:substitution:64") if arm.is_lossy)
    root_agrees, summary = replay(engine, tight, prompt, text)
    assert summary.token_ids == text and not summary.lossless
    assert len(root_agrees) == summary.num_steps
    root_agrees, summary = replay(engine, full, prompt, text)
    *_, last = engine.generate(prompt, GenerationConfig(max_new_tokens=NUM_TOKENS, ignore_eos=True), tree=full.tree)
    assert all(root_agrees) and summary.num_steps == last.summary.num_steps


def test_speeds_are_those_of_all_answers_together():
    answers = [Timed(100, 1.0), Timed(10, 0.5), Timed(0, 0.25)]
    assert overall(answers) == 110 / 1.75
    assert speeds(answers) == {"all": round(110 / 1.75, 2), "p20": 20.0, "p80": 100.0}
    assert speeds([Timed(0, 0.0)]) == {"all": 0.0, "p20": 0.0, "p80": 0.0}


def test_paired_ratio_is_inside_its_interval():
    theirs = [Timed(10 * n, 1.0) for n in range(1, 6)]
    ratio = paired_ratio([Timed(answer.num_tokens, 0.5) for answer in theirs], theirs)
    assert ratio == {"ratio": 2.0, "interval_95": [2.0, 2.0]}
    ours = [
        Timed(answer.num_tokens, seconds) for answer, seconds in zip(theirs, (0.9, 1.1, 0.5, 0.9, 1.2), strict=True)
    ]
    ratio = paired_ratio(ours, theirs)
    low, high = ratio["interval_95"]
    assert ratio["ratio"] == round(5 / 4.6, 3) and low < 1 < ratio["ratio"] < high


def test_answers_end_where_the_model_ends_them_for_every_contestant(engine):
    contestants = Contestants(engine, EMBEDDED_TARGET, 64)
    prompt = engine.encode([{"role": "user", "content": "Work out 1 + 90."}])
    *_, last = engine.generate(prompt, GenerationConfig(max_new_tokens=64))
    assert last.summary.finish_reason == "eos"
    for arm in parse_arms("transformers plain eagle3"):
        written = contestants.write(arm, prompt)
        assert written.token_ids == last.summary.token_ids
        assert written.timed.num_tokens == len(written.token_ids) - 1 and written.timed.seconds > 0


def test_names_say_what_is_run():
    budget = BudgetConfig(16, policy="truncation", score="natural", row_weight="path", protect_root=True)
    arm = parse_arms("plain moe-spec:truncation:16:natural+path+root@16,5,4")[1]
    assert arm.budget == budget and arm.tree_numbers == [16, 5, 4, TreeConfig().min_path_p]
    assert parse_arms("transformers")[0].name == "plain", "lossy texts need the lossless one beside them"
    keys = [arm.key for arm in default_arms()]
    assert len(keys) == len(set(keys)) and [arm.key for arm in parse_arms(" ".join(keys))] == keys


@pytest.mark.parametrize("name", ["eagle4", "moe-spec:substitution", "moe-spec:substitution:16:mine", "eagle3@8,4"])
def test_an_unknown_arm_is_one_sentence(name, capsys):
    assert main(["bench", "decode", "--arms", name]) == 2
    assert name in capsys.readouterr().err


def test_the_record_is_the_last_line(capsys):
    arms = "transformers eagle3 moe-spec:truncation:8"
    options = ["--limit", "1", "--rounds", "2", "--max-new-tokens", "8"]
    assert main(["bench", "decode", "--json", *options, "--arms", arms]) == 0
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    by_name = {arm["name"]: arm for arm in record["arms"]}
    assert set(by_name) == {"transformers", "plain", "eagle3", "moe-spec:truncation:8"}
    lossless, lossy = by_name["eagle3"], by_name["moe-spec:truncation:8"]
    assert by_name["transformers"]["equal_prefix"] == lossless["equal_prefix"] == 8
    assert lossy["experts_active"] <= 8 < lossy["experts_natural"] and 0 < lossy["mass_kept"] < 1
    assert lossless["mass_kept"] == 1 and lossless["agreement_top1"] is None
    assert 0 <= lossy["agreement_top1"] <= 1 and 0 <= lossy["agreement_top1_own_kv"] <= 1
    lossless_key = "eagle3@16,8,3,0.12"
    assert [ratio["to"] for ratio in record["ratios"]] == ["transformers", "plain", lossless_key]
