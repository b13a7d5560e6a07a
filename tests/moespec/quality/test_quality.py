"""A quality run from end to end: what its figures are, what a resumed run keeps, what it refuses."""

from __future__ import annotations

import json
import math
import random
import statistics

import pytest
import torch

from moespec import EMBEDDED_TARGET, Engine
from moespec.cli import main
from moespec.hf import AutoModelForCausalLM
from moespec.quality.cli import quality_arms
from moespec.quality.frontier import frontier_figure
from moespec.quality.results import Results, weights_sha256
from moespec.quality.summary import Z_95, estimate, paired_difference, recommended, summarise
from moespec.quality.trials import TEXTS, read_texts, readings
from tests.conftest import tiny_model

SMALL = ["quality", "--arms", "moe-spec:substitution:8", "--limit", "1", "--max-new-tokens", "24"]


@pytest.fixture(scope="module")
def engine():
    engine = Engine.from_pretrained(EMBEDDED_TARGET)
    yield engine
    engine.close()


def test_readings_are_those_of_transformers_where_no_budget_acts(engine):
    texts = read_texts(TEXTS, engine)[20:22]
    arms = quality_arms("moe-spec:truncation:8@16,5,4,0")
    reference = AutoModelForCausalLM.from_pretrained(EMBEDDED_TARGET, dtype=torch.float32)
    found = list(readings(engine, arms, texts, lambda key: False))
    assert [record["arm"] for record in found] == [arm.key for arm in arms] * 2
    for text, natural, budgeted in zip(texts, found[::2], found[1::2], strict=True):
        ids = torch.tensor([text.token_ids])
        with torch.inference_mode():
            logits = reference(ids).logits[0, 1:-1].double()
        nats = torch.nn.functional.cross_entropy(logits, ids[0, 2:], reduction="sum")
        assert natural["nats"] == pytest.approx(float(nats), rel=1e-4)
        assert natural["num_tokens"] == natural["num_agreed"] == len(text.token_ids) - 2
        assert natural["kl"] == pytest.approx(0, abs=1e-5)
        assert budgeted["kl"] > 1e-3, "a budget of 8 changes what the model says"


def test_readings_done_before_are_not_done_again(engine):
    texts, arms = read_texts(TEXTS, engine)[:1], quality_arms("eagle3 moe-spec:truncation:8")
    missing = list(readings(engine, arms, texts, lambda key: key[1].startswith("eagle3")))
    assert [record["arm"] for record in missing] == [arms[1].key]


@pytest.mark.parametrize(("num_right", "n"), [(0, 10), (3, 10), (500, 1000), (10, 10)])
def test_the_interval_of_rights_and_wrongs_is_wilsons(num_right, n):
    found = estimate([1.0] * num_right + [0.0] * (n - num_right))
    for bound in (found.low, found.high):  # the two p at which the observed share lies z standard errors away
        error = Z_95 * math.sqrt(bound * (1 - bound) / n)
        assert abs(num_right / n - bound) == pytest.approx(error, abs=1e-7)
    assert found.low - 1e-12 <= num_right / n <= found.high + 1e-12


def test_the_interval_of_a_difference_covers_the_truth_as_often_as_it_says():
    rng, covered = random.Random(0), 0
    for _ in range(400):
        pairs = [(rng.random() < 0.6, rng.random() < 0.6) for _ in range(200)]
        ours, theirs = (
            [{"item": n, "seed": 0, "score": float(p[side])} for n, p in enumerate(pairs)] for side in (0, 1)
        )
        found = paired_difference(ours, theirs)
        covered += found.low <= 0 <= found.high
    assert 0.91 < covered / 400 < 0.985  # 95 %: a false alarm in about one of 3,000 seeds


def answer(arm: str, n: int, score: float, ms: float) -> dict:
    return {
        "kind": "answer", "arm": arm, "temperature": 0.0, "seed": 0, "family": "lists", "item": f"lists-{n}",
        "score": score, "num_tokens": 11, "num_steps": 5, "ms": ms, "experts_natural": 20.0, "experts_active": 16.0,
        "mass_kept": 0.9,
    }  # fmt: skip


def test_the_recommended_budget_is_the_fastest_that_loses_nothing():
    records = []
    for n in range(1200):
        records += [
            answer("eagle3@12,8,3,0.15", n, float(n % 2), 50.0),
            answer(
                "moe-spec:substitution:8@12,8,3,0.15", n, float(n % 2 and n % 10 != 1), 20.0
            ),  # loses a tenth of all
            answer("moe-spec:substitution:16@12,8,3,0.15", n, float(n % 2), 40.0),
            answer("moe-spec:substitution:24@12,8,3,0.15", n, float(n % 2), 45.0),
        ]
    entries = summarise(records)
    by_arm = {entry.arm.split("@")[0]: entry for entry in entries}
    assert by_arm["eagle3"].difference is None
    assert by_arm["moe-spec:substitution:8"].difference.mean == pytest.approx(-0.1)
    assert not by_arm["moe-spec:substitution:8"].is_non_inferior
    assert by_arm["moe-spec:substitution:16"].tokens_per_s == pytest.approx(10 / 0.040)
    assert by_arm["moe-spec:substitution:16"].tokens_per_step == pytest.approx(2.0)
    assert recommended(entries) is by_arm["moe-spec:substitution:16"]
    assert recommended(summarise(records[:400])) is None, "100 questions prove nothing"
    figure = frontier_figure(entries)
    line = next(trace for trace in figure["data"] if trace["name"].startswith("substitution"))
    assert line["text"] == ["B=8", "B=16", "B=24"]
    assert line["y"][1] == pytest.approx(statistics.fmean(n % 2 for n in range(1200)))


def test_a_run_can_be_interrupted_and_resumed(tmp_path, capsys):
    out, plot = tmp_path / "results.jsonl", tmp_path / "frontier.html"
    assert main([*SMALL, "--out", str(out), "--json", "--plot", str(plot)]) == 0
    whole = out.read_text(encoding="utf-8")
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [arm["arm"] for arm in summary["arms"]] == ["eagle3@12,8,3,0.15", "moe-spec:substitution:8@12,8,3,0.15"]
    assert set(summary["arms"][0]["perplexity"]) == {"tasks", "dialogue", "facts", "prose", "code"}
    assert "Plotly.newPlot" in plot.read_text(encoding="utf-8")

    assert main([*SMALL, "--out", str(out)]) == 2
    assert "--resume" in capsys.readouterr().err
    lines = whole.splitlines(keepends=True)
    out.write_text("".join(lines[:-2]) + lines[-2][:40], encoding="utf-8")  # cut off in the last but one record
    assert main([*SMALL, "--out", str(out), "--resume"]) == 0
    again = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    before = [json.loads(line) for line in lines]
    assert again[: len(before) - 2] == before[:-2], "nothing lost"
    keys = [(record["kind"], record.get("arm"), record.get("item"), record.get("text")) for record in again]
    assert len(keys) == len(set(keys)) == len(before), "nothing repeated"


def test_results_of_another_model_are_refused(tmp_path):
    path, settings = tmp_path / "results.jsonl", dict.fromkeys(
        ("model_sha256", "drafter_sha256", "tokenizer_sha256", "tasks", "per_family", "items_seed", "max_new_tokens",
         "texts_sha256"), "same",
    )  # fmt: skip
    Results(path, {"kind": "run", "settings": settings}, resume=False)
    Results(path, {"kind": "run", "settings": settings}, resume=True)
    with pytest.raises(ValueError, match="another model_sha256"):
        Results(path, {"kind": "run", "settings": settings | {"model_sha256": "other"}}, resume=True)
    path.write_text("no json\n")
    with pytest.raises(ValueError, match="no results file"):
        Results(path, {"kind": "run", "settings": settings}, resume=True)


def test_the_fingerprint_follows_the_weights():
    model = tiny_model("olmoe")
    before = weights_sha256(model)
    assert before == weights_sha256(tiny_model("olmoe"))
    with torch.no_grad():
        next(iter(model.parameters()))[0, 0] += 1e-3
    assert weights_sha256(model) != before


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--arms", "plain"], "drafts no tree"),
        (["--arms", "moe-spec:substitution:4"], "outside 8 to 64"),
        (["--arms", "nonsense"], "cannot be run"),
        (["--limit", "0"], "limit=0"),
        (["--tasks-dir", "/nowhere"], "none of the known files"),
        (["--drafter", "none"], "needs a drafter"),
    ],
)
def test_bad_input_is_one_sentence(arguments, sentence, tmp_path, capsys):
    assert main(["quality", "--out", str(tmp_path / "results.jsonl"), *arguments]) == 2
    error = capsys.readouterr().err
    assert sentence in error and error.count("\n") == 1
    assert not (tmp_path / "results.jsonl").exists()
