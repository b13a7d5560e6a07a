"""What is measured for the expert policies, against plain formulas on the raw numbers; the commands that write it."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open

from moespec import EMBEDDED_TARGET, Engine, GenerationConfig
from moespec.calibrate import acceptance, cli, sensitivity, similarity
from moespec.calibrate.acceptance import EDGES, committed_rows, rates
from moespec.calibrate.similarity import all_experts, expert_inputs, similarities
from moespec.calibrate.texts import PROMPTS, own_texts
from moespec.cli import main
from moespec.config import TreeConfig
from moespec.policies.profiles import read_profile
from moespec.quality.items import own_items
from moespec.quality.trials import TEXTS
from moespec.target import Target
from tests.conftest import VOCAB, tiny_model
from tests.drafters import PlantingDrafter
from tests.moespec.test_layers import brute_force

BENCH_PROMPTS = sorted(TEXTS.parent.glob("prompts*.jsonl"))


def plain_similarities(outputs_END: torch.Tensor) -> dict[str, list[list[float]]]:
    """The three formulas as they are written, a pair of experts at a time, fp64."""
    experts = range(len(outputs_END))

    def distance(i, j):
        return float((outputs_END[i] - outputs_END[j]).norm())

    def cosine(i, j):
        rows = zip(outputs_END[i], outputs_END[j], strict=True)
        return sum(float(a @ b / (a.norm() * b.norm())) for a, b in rows) / outputs_END.shape[1]

    def cka(i, j):
        x, y = (outputs_END[e] - outputs_END[e].mean(dim=0) for e in (i, j))
        return float((y.T @ x).norm() ** 2 / ((x.T @ x).norm() * (y.T @ y).norm()))

    largest = max(distance(i, j) for i in experts for j in experts)
    return {
        "frobenius": [[1 - distance(i, j) / largest for j in experts] for i in experts],
        "cosine": [[(cosine(i, j) + 1) / 2 for j in experts] for i in experts],
        "cka": [[cka(i, j) for j in experts] for i in experts],
    }


@pytest.mark.parametrize("block", [1, 5, 64], ids=["row by row", "a last block that is shorter", "one block"])
def test_similarities_are_the_plain_formulas(block, monkeypatch):
    monkeypatch.setattr(similarity, "BLOCK_ROWS", block)
    generator = torch.Generator().manual_seed(0)
    outputs_END = torch.randn(4, 23, 6, generator=generator, dtype=torch.float64)
    outputs_END[1] = outputs_END[0] * 0.7 + outputs_END[1] * 0.2  # two that are alike
    outputs_END += torch.arange(4)[:, None, None]  # with means that CKA must take away
    x_ND = torch.arange(23.0)[:, None]  # rows that say where they stand
    found = similarities(lambda x_TD: outputs_END[:, x_TD[:, 0].long()].float(), x_ND)
    for name, expected in plain_similarities(outputs_END).items():
        torch.testing.assert_close(found[name], torch.tensor(expected, dtype=torch.float64), atol=1e-5, rtol=1e-5)
    assert found["cka"][0, 1] > found["cka"][0, 2] and found["frobenius"].diagonal().eq(1).all()


@torch.inference_mode()
def test_all_experts_run_on_what_transformers_gives_them(family):
    """The inputs stem from the model's own forward: its MoE output is what the experts make of them."""
    model = tiny_model(family)
    texts = [[5, 3, 8, 13, 2], [7, 7, 1]]
    target, seen = Target(model), []
    hook = model.model.layers[1].mlp.experts.register_forward_hook(lambda module, args, output: seen.append(output))
    inputs = expert_inputs(target, texts)
    hook.remove()
    experts = target.moe_layers[1].experts
    assert [len(x_ND) for x_ND in inputs] == [8] * 3
    outputs_END = all_experts(target, experts)(inputs[1])
    for expert in range(target.num_experts):
        ids_T1, weights_T1 = torch.full((8, 1), expert), torch.ones(8, 1)
        expected_TD = brute_force(experts, inputs[1], ids_T1, weights_T1)
        torch.testing.assert_close(outputs_END[expert].double(), expected_TD, atol=1e-4, rtol=1e-4)
    _, weights_TK, ids_TK = target.moe_layers[1].router(inputs[1])
    mixed_ND = sum(
        weights_TK[:, k, None] * outputs_END[ids_TK[:, k], torch.arange(8)] for k in range(weights_TK.shape[1])
    )
    torch.testing.assert_close(mixed_ND, torch.cat([part.view(-1, 32) for part in seen]), atol=1e-4, rtol=1e-4)
    assert not any(moe.experts._forward_pre_hooks for moe in target.moe_layers), "the model is as it was"


def test_sensitivity_is_the_divergence_with_one_layer_budgeted(monkeypatch):
    """Checked from outside: transformers' own forward over a root and its drafts, one layer's router replaced."""
    monkeypatch.setattr(sensitivity, "TREE", TreeConfig(4, 3, 1, 0))
    model = tiny_model("qwen3_moe")
    token_ids = [3, 14, 15, 9, 26]
    drafter = PlantingDrafter(token_ids, VOCAB, known=0)
    engine = Engine.from_model(model, drafter=drafter)
    budgets = sensitivity.budgets_to_try(3, 12)
    assert budgets == [3, 4, 5, 6, 8, 10]
    drafter._rng.seed(0)
    kl_LG = sensitivity.sensitivity(engine, [token_ids], budgets, lambda line: None)
    assert kl_LG.shape == (3, 6) and (kl_LG >= 0).all()
    assert (kl_LG[:, 0] > kl_LG[:, -1]).all(), "a tight budget costs more than a loose one"
    drafter._rng.seed(0)
    trees = {}
    for root in (3, 2, 1):
        context = SimpleNamespace(token_ids=token_ids[: root + 1])
        trees[root] = drafter.propose(context)
    plain = tiny_model("qwen3_moe")
    for layer, place in ((0, 0), (2, 1)):
        total = 0.0
        for root, tree in trees.items():
            natural_V, budgeted_V = (
                root_logits(plain, token_ids, root, tree, at) for at in (None, (layer, budgets[place]))
            )
            total += float((natural_V.exp() * (natural_V - budgeted_V)).sum())
        assert float(kl_LG[layer, place]) == pytest.approx(total / 3, rel=1e-3)


@torch.inference_mode()
def root_logits(model, token_ids, root, tree, budgeted) -> torch.Tensor:
    """log p after the root, fp64 [V], in one forward over prefix and tree; the budget sees tree rows alone."""
    num_rows, length = tree.num_rows, root + tree.num_rows
    seen = torch.ones(length, length).tril().bool()
    seen[root:, root:] = tree.mask_TT
    ids = torch.tensor([token_ids[:root] + tree.tokens_T.tolist()])
    positions = torch.cat([torch.arange(root), root + tree.depths_T])[None]
    mask = torch.zeros(length, length).masked_fill(~seen, torch.finfo(torch.float32).min)[None, None]

    def reroute(module, args, output):
        logits, weights, chosen = output
        probs = logits[root:].double().softmax(-1)
        kept = probs.sum(0).topk(budgeted[1]).indices
        inside = torch.full_like(probs, -1.0)
        inside[:, kept] = probs[:, kept]
        new = inside.topk(chosen.shape[1]).indices
        new_weights = probs.gather(1, new)
        weights, chosen = weights.clone(), chosen.clone()
        weights[root:], chosen[root:] = (new_weights / new_weights.sum(-1, keepdim=True)).float(), new
        return logits, weights, chosen

    handle = None if budgeted is None else model.model.layers[budgeted[0]].mlp.gate.register_forward_hook(reroute)
    logits = model(ids, position_ids=positions, attention_mask=mask).logits[0, root]
    if handle is not None:
        handle.remove()
    assert num_rows > 1
    return logits.double().log_softmax(-1)


def test_acceptance_counts_what_greedy_runs_commit(monkeypatch):
    monkeypatch.setattr(acceptance, "RUN_TOKENS", 6)
    model = tiny_model("mixtral")
    prompt_ids = [3, 1, 4, 1, 5]
    reference = model.generate(torch.tensor([prompt_ids]), do_sample=False, max_new_tokens=30)[0].tolist()
    engine = Engine.from_model(tiny_model("mixtral"), drafter=PlantingDrafter(reference, VOCAB))
    text = reference[:20]
    drafted_NP, committed_NP = committed_rows(engine, [text], lambda line: None)
    engine.drafter._rng.seed(0)
    drafted, committed = {}, {}
    for length in (1, 7, 13, 19):
        engine.forget()
        for step in engine.generate(text[:length], GenerationConfig(6, ignore_eos=True), tree=acceptance.TREE):
            tree = step.tree
            rows = zip(tree.depths, tree.path_p, tree.accepted, strict=True) if tree else ()
            for depth, path_p, accepted in rows:
                cell = depth, sum(path_p > edge for edge in EDGES)
                drafted[cell] = drafted.get(cell, 0) + 1
                committed[cell] = committed.get(cell, 0) + accepted
    roots = [cell for cell in drafted if cell[0] == 0]
    assert roots == [(0, len(EDGES))] and sum(committed.values()) > drafted[roots[0]], "drafts are committed, too"
    for cell, number in drafted.items():
        assert (drafted_NP[cell], committed_NP[cell]) == (number, committed[cell])
    assert drafted_NP.sum() == sum(drafted.values())


def test_rates_lean_on_the_drafter_where_little_was_seen():
    drafted_NP, committed_NP = torch.zeros(2, 3, len(EDGES) + 1, dtype=torch.float64)
    drafted_NP[1, 0], drafted_NP[1, -1], committed_NP[1, -1] = 99, 1, 1
    rate_NP = rates(drafted_NP, committed_NP)
    assert (rate_NP[0] == 1).all()
    assert rate_NP[1, 0] == pytest.approx(0.005 / 100)
    assert rate_NP[1, -1] == pytest.approx(1.95 / 2)
    assert rate_NP[2].tolist() == pytest.approx([(a + b) / 2 for a, b in zip([0, *EDGES], [*EDGES, 1], strict=True)])


def test_calibration_reads_no_benchmark_prompt_and_no_question():
    asked = {item.messages[-1]["content"] for item in own_items(100, 0)}
    assert len(BENCH_PROMPTS) == 2
    for path in (TEXTS, *BENCH_PROMPTS):
        for line in path.read_text("utf-8").splitlines():
            asked |= {message["content"] for message in json.loads(line).get("messages", ())}
    assert not asked & set(PROMPTS)


@pytest.fixture(scope="module")
def embedded():
    opened = Engine.from_pretrained(EMBEDDED_TARGET)
    yield opened
    opened.close()


def test_own_texts_are_the_models_and_repeat(embedded):
    texts = own_texts(embedded, 60)
    assert texts == own_texts(embedded, 60)
    assert sum(map(len, texts)) == 60
    for prompt, text in zip(PROMPTS, texts, strict=False):
        ids = embedded.encode(prompt)
        assert text[: len(ids)] == ids[: len(text)]
    with pytest.raises(ValueError, match="no tokenizer"):
        own_texts(Engine.from_model(tiny_model("olmoe")), 10)


@pytest.mark.parametrize("kind", ["similarity", "sensitivity", "acceptance"])
def test_commands_write_files_that_are_read_back(kind, embedded, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sensitivity, "STEPS_PER_DOUBLING", 1)
    arguments = SimpleNamespace(out=tmp_path / f"{kind}.safetensors", texts=TEXTS, tokens=12)
    assert getattr(cli, f"inspect_{kind}")(embedded, arguments) == 0
    profile = read_profile(tmp_path, kind, "a method")
    assert profile.model == embedded.routed_model
    assert all(tensor.dtype == torch.float32 and tensor.isfinite().all() for tensor in profile.tensors.values())
    with safe_open(arguments.out, "pt") as file:
        notes = file.metadata()
    assert (notes["model_name"], notes["tokens"], notes["texts"]) == ("embedded model", "12", "texts.jsonl")
    assert "| layer |" in (out := capsys.readouterr().out) or "| depth |" in out


def test_the_command_line_writes_a_file_or_says_why_not(tmp_path, capsys):
    path = tmp_path / "acceptance.safetensors"
    assert main(["inspect", "acceptance", "--tokens", "20", "--out", str(path)]) == 0
    assert read_profile(tmp_path, "acceptance", "a method").tensors["rate"].shape == (9, len(EDGES) + 1)
    output = capsys.readouterr()
    assert "| depth |" in output.out and "acceptance: text 1 of 1" in output.err
    elsewhere, other_name = tmp_path / "nowhere" / path.name, tmp_path / "file.safetensors"
    refused = [(["--tokens", "2", "--out", str(path)], "tokens=2 is not allowed: use 3 or more")]
    refused += [(["--out", str(out)], "it would not be found") for out in (elsewhere, other_name)]
    refused += [(["--out", str(path), "--drafter", "none"], "drafts no trees")]
    for arguments, sentence in refused:
        assert main(["inspect", "acceptance", *arguments]) == 2
        assert sentence in capsys.readouterr().err
