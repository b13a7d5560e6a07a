"""The benchmark of whole steps: what it says of a model's bytes, of replayed routing, of a profile, and its record."""

from __future__ import annotations

import json

import pytest
import torch

from moespec import EMBEDDED_TARGET, Engine, GenerationConfig, TreeConfig
from moespec.bench.routing_replay import RoutingReplay, record_logits, scale_logits
from moespec.bench.step import NUM_WARM_UP_STEPS
from moespec.bench.step_models import load_engine
from moespec.bench.step_profile import kind_of, summed
from moespec.cli import main
from moespec.cost import expected_union
from moespec.shapes import shape_of
from tests.conftest import VOCAB, tiny_model
from tests.drafters import PlantingDrafter


@pytest.fixture(scope="module")
def embedded() -> Engine:
    return Engine.from_pretrained(EMBEDDED_TARGET, device="cpu")


def test_the_bytes_of_a_step_are_those_of_the_parameters(embedded):
    shape = shape_of(embedded.target.model, "embedded")
    config = embedded.target.model.config
    per_expert = 3 * config.hidden_size * config.moe_intermediate_size * 4
    assert shape.expert_bytes == per_expert
    everything = sum(p.numel() * 4 for p in embedded.target.model.parameters())
    experts = config.num_hidden_layers * config.num_experts * per_expert
    tables = 1 if config.tie_word_embeddings else 2
    embeddings = config.vocab_size * config.hidden_size * 4
    assert shape.dense_bytes == everything - experts - (embeddings if tables == 2 else 0)
    assert (shape.num_moe_layers, shape.num_experts, shape.top_k) == (8, 64, 8)


def test_recorded_routing_is_scaled_by_share():
    recorded = torch.randn(2, 4, 3, 8) * 100  # so far apart that the noise changes no order
    scaled = scale_logits(recorded, num_layers=8, num_experts=16)
    assert scaled.shape == (2, 8, 3, 16)
    for layer in range(8):
        for expert in range(16):
            assert (scaled[:, layer, :, expert] - recorded[:, layer // 2, :, expert // 2]).abs().max() < 3
    assert torch.equal(scaled, scale_logits(recorded, 8, 16))  # the same noise in every run
    fewer = scale_logits(recorded, num_layers=2, num_experts=4)
    assert (fewer[:, 1, :, 1] - recorded[:, 2, :, 2]).abs().max() < 3


def test_recorded_trees_use_fewer_experts_than_chance(embedded):
    """What the recording is for: neighbouring rows share experts."""
    texts = [embedded.encode(text) for text in ("Tell me a short story.", "What does river mean?")]
    logits_NLTE = record_logits(embedded, texts, TreeConfig(16, 5, 4, 0))
    assert logits_NLTE.shape == (2, 8, 16, 64)
    unions = [len(logits_TE.topk(8).indices.unique()) for logits_LTE in logits_NLTE for logits_TE in logits_LTE]
    assert sum(unions) / len(unions) < 0.75 * expected_union(64, 8, 16)


def test_replayed_routing_is_what_a_step_uses(family):
    model = tiny_model(family)
    engine = Engine.from_model(model, drafter=PlantingDrafter(list(range(VOCAB)), VOCAB), backend="reference")
    num_experts, num_layers = engine.info.num_experts, engine.info.num_moe_layers
    steps = list(engine.generate([3, 1, 4], GenerationConfig(max_new_tokens=8, ignore_eos=True)))
    num_rows = next(len(step.tree.token_ids) for step in steps if step.kind == "tree")
    logits_NLTE = torch.zeros(1, num_layers, num_rows, num_experts)
    logits_NLTE[..., : engine.info.top_k] = torch.arange(engine.info.top_k) + 5.0
    replayed, others = [], []
    with RoutingReplay(engine.target, logits_NLTE).active():
        engine.forget()
        engine.drafter._rng.seed(0)
        for step in engine.generate([3, 1, 4], GenerationConfig(max_new_tokens=16, ignore_eos=True)):
            if step.kind == "tree":
                (replayed if len(step.tree.token_ids) == num_rows else others).append(step.experts_natural)
    assert replayed
    assert all(found == [engine.info.top_k] * num_layers for found in replayed)
    assert any(found != [engine.info.top_k] * num_layers for found in others)
    after = [step.experts_natural for step in engine.generate([3, 1, 4]) if step.kind == "tree"]
    assert any(found != [engine.info.top_k] * num_layers for found in after)


def test_a_profile_is_summed_by_kind():
    kernels = [
        ("gate_up_kernel", 600.0, 16),
        ("down_kernel", 300.0, 16),
        ("select_kernel", 80.0, 16),
        ("fmha_cutlassF_bf16_aligned_64x128_rf_sm80", 40.0, 16),
        ("nvjet_tst_64x8_64x16_4x1_v_bz_TNT", 200.0, 32),
        ("Memcpy DtoH (Device -> Pinned)", 20.0, 2),
    ]
    assert summed(kernels, num_steps=2, num_layers=8) == {
        "experts_ms": 0.45,
        "routing_ms": 0.04,
        "attention_ms": 0.02,
        "copies_ms": 0.01,
        "dense_ms": 0.1,
        "launches_per_layer": 6.0,  # copies are no kernels
    }
    assert kind_of("gate_up_kernel") == kind_of("combine_kernel") == "experts"


def test_a_model_that_does_not_fit_is_refused(monkeypatch):
    monkeypatch.setattr("moespec.bench.step_models.free_bytes", lambda device: 24 << 30)
    with pytest.raises(ValueError, match=r"^Qwen3-30B-A3B takes 65 GB and cpu has 26 GB free: choose another of"):
        load_engine("Qwen3-30B-A3B", torch.device("cpu"), "auto")


def test_the_record_of_the_command(capsys, monkeypatch):
    monkeypatch.setattr("moespec.bench.machine.CPU_BUFFER_BYTES", 1 << 20)
    monkeypatch.setattr("moespec.bench.step.TREES", (TreeConfig(8, 4, 3, 0),))
    monkeypatch.setattr("moespec.bench.step.BUDGETS", (8, 64))  # 64 are all: no arm of their own
    assert main(["bench", "step", "--device", "cpu", "--rounds", "2", "--steps", "3", "--json"]) == 0
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    (model,) = record["models"]
    assert [arm["name"] for arm in model["arms"]] == ["plain", "8 rows, no budget", "8 rows, B = 8"]
    plain, whole, budgeted = model["arms"]
    assert all(arm["num_steps"] == 2 * 3 for arm in model["arms"])
    assert plain["experts_active"] == budgeted["experts_active"] == 8
    assert whole["experts_active"] == whole["experts_natural"] > 8
    assert plain["break_even_tokens"] == 1
    dense, experts = shape_bytes()
    read = record["device"]["ceilings"]["read_bytes_per_s"]
    for arm in model["arms"]:
        assert arm["modelled_floor_ms"] == pytest.approx(
            (dense + arm["experts_active"] * experts) / read * 1e3, rel=1e-2
        )
    assert NUM_WARM_UP_STEPS >= 1


def test_what_begins_after_the_limit_is_left_out_and_named(capsys, monkeypatch):
    monkeypatch.setattr("moespec.bench.machine.CPU_BUFFER_BYTES", 1 << 20)
    assert main(["bench", "step", "--device", "cpu", "--seconds-limit", "1e-9", "--json"]) == 0
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert record["models"] == [{"model": "embedded", "not_run": "no time was left"}]


def shape_bytes() -> tuple[int, int]:
    """What every step reads, and one expert of every layer."""
    engine = Engine.from_pretrained(EMBEDDED_TARGET, device="cpu")
    shape = shape_of(engine.target.model, "embedded")
    return shape.dense_bytes, shape.num_moe_layers * shape.expert_bytes


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--rounds", "0"], "rounds=0, steps=8 is not allowed"),
        (["--seconds-limit", "0"], "seconds-limit=0.0 is not allowed"),
        (["--device", "cuda"], "device='cuda' cannot be used here"),
    ],
)
def test_what_cannot_be_measured_is_a_sentence(arguments, sentence, capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert main(["bench", "step", *arguments]) == 2
    assert sentence in capsys.readouterr().err
