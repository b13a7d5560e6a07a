"""A quality run from end to end: what its figures are, what a resumed run keeps, what it refuses."""

from __future__ import annotations

import json
import math
import random

import pytest
import torch

from moespec import EMBEDDED_TARGET, Engine
from moespec.bench.arms import parse_arm
from moespec.cli import main
from moespec.hf import AutoModelForCausalLM
from moespec.quality.cli import quality_arms
from moespec.quality.frontier import frontier_figure
from moespec.quality.results import DECIDING, Results, weights_sha256
from moespec.quality.summary import MARGIN, Z_95, Estimate, Scored, estimate, paired_difference, recommended, summarise
from moespec.quality.trials import TEXTS, check_lengths, read_texts, readings, record_key
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
    floored = [parse_arm("utility:floor=0.7"), parse_arm("utility")]
    assert [record["arm"] for record in readings(engine, floored, texts, lambda key: False)] == [floored[1].key]


@pytest.mark.parametrize(("num_right", "n"), [(0, 10), (3, 10), (500, 1000), (10, 10)])
def test_the_interval_of_rights_and_wrongs_is_wilsons(num_right, n):
    found = estimate([Scored(f"q{i}", f"q{i}", float(i < num_right)) for i in range(n)])
    assert found.n == n
    for bound in (found.low, found.high):  # the two p at which the observed share lies z standard errors away
        error = Z_95 * math.sqrt(bound * (1 - bound) / n)
        assert abs(num_right / n - bound) == pytest.approx(error, abs=1e-7)
    assert found.low - 1e-12 <= num_right / n <= found.high + 1e-12


@pytest.mark.parametrize("num_seeds", [1, 5])
def test_the_interval_of_a_difference_covers_the_truth_as_often_as_it_says(num_seeds):
    """Hard and easy questions, answered alike by both sides and under all seeds; records in any order."""
    rng, covered, narrower = random.Random(0), 0, 0
    for _ in range(400):
        ours, theirs = [], []
        for n in range(200):
            p, q = rng.choice([(0.05, 0.05), (0.95, 0.95), (0.2, 0.8), (0.8, 0.2)])  # the means of both sides are equal
            for seed in range(num_seeds):
                shared = {"item": n, "key": n, "seed": seed, "scorer": "exact"}
                ours.append(shared | {"score": float(rng.random() < p)})
                theirs.append(shared | {"score": float(rng.random() < q)})
        rng.shuffle(theirs)
        found = paired_difference(ours, theirs)
        covered += found.low <= 0 <= found.high
        unpaired = 2 * Z_95 * math.sqrt(2 * 0.25 / len(ours))
        narrower += found.high - found.low < unpaired
        assert found.n == 200
    assert 0.91 < covered / 400 < 0.985  # 95 %: a false alarm in about one of 3,000 seeds
    if num_seeds == 1:
        assert narrower > 350, "pairing helps"
    else:
        assert narrower == 0, "five seeds of a question are not five questions"


def test_the_interval_of_a_share_takes_questions_of_one_key_for_one():
    rng, covered = random.Random(0), 0
    for _ in range(400):
        is_right = [rng.random() < 0.6 for _ in range(100)]
        answers = [Scored(f"q{n}-{form}", f"q{n}", float(is_right[n])) for n in range(100) for form in range(3)]
        found = estimate(answers)
        covered += found.low <= 0.6 <= found.high
        assert found.n == 300
    assert 0.91 < covered / 400 < 0.985


def test_one_question_proves_nothing():
    pair = [[{"item": 0, "key": 0, "seed": 0, "scorer": "exact", "score": score}] for score in (1.0, 0.0)]
    assert paired_difference(*pair) == Estimate(mean=1.0, low=-1.0, high=1.0, n=1)


def answer(arm: str, n: int, score: float, ms: float, scorer: str = "exact") -> dict:
    return {
        "kind": "answer", "arm": arm, "temperature": 0.0, "seed": 0, "family": "lists", "item": f"lists-{n}",
        "key": f"lists-{n}", "scorer": scorer, "score": score, "num_tokens": 11, "num_steps": 5, "ms": ms,
        "experts_natural": 20.0, "experts_kept": 16.0, "experts_active": 15.0, "mass_kept": 0.9,
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
    figure = frontier_figure(entries, 0.0)
    line = next(trace for trace in figure["data"] if trace["name"].startswith("substitution"))
    assert line["text"] == ["B=8", "B=16", "B=24"]
    assert line["y"] == pytest.approx([-10, 0, 0])
    assert line["customdata"] == [f"moe-spec:substitution:{budget}@12,8,3,0.15" for budget in (8, 16, 24)]


def test_policies_share_a_line_that_their_first_number_runs_along():
    names = ["sere:s=1,rho=0.3", "sere:s=2,rho=0.3", "moe-spec:b=12,score=natural", "accept-moe-like:commitment=path"]
    names += ["oracle", "oracle:b=12"]
    arms = ["eagle3@8,4,3,0", *(f"{name}@8,4,3,0" for name in names)]
    entries = summarise([answer(arm, 0, 1.0, 10.0 * 1.5**place) for place, arm in enumerate(arms)])
    lines = {trace["name"]: trace["text"] for trace in frontier_figure(entries, 0.0)["data"]}
    assert lines.pop("no budget: 100.0% (eagle3@8,4,3,0)") == [""]
    assert lines == {
        "sere:rho=0.3@8,4,3,0": ["s=1", "s=2"],
        "moe-spec:score=natural@8,4,3,0": ["b=12"],
        "accept-moe-like:commitment=path@8,4,3,0": [""],
        "oracle@8,4,3,0": ["", "b=12"],
    }


def test_of_points_in_one_place_the_smallest_budget_is_named():
    speeds = {"eagle3": 10.0, "truncation:12": 20.0, "truncation:8": 20.01, "truncation:24": 40.0}
    arms = {name if name == "eagle3" else f"moe-spec:{name}": speed for name, speed in speeds.items()}
    figure = frontier_figure(summarise([answer(arm, 0, 1.0, speed) for arm, speed in arms.items()]), 0.0)
    assert figure["data"][0]["text"] == ["B=8", "", "B=24"]


def test_a_budget_that_may_lose_more_than_the_margin_does_not_pass():
    """It loses 1 point, but 4 % of the answers are turned round: 2 points lost are not ruled out."""
    records = []
    for n in range(1000):
        lost, won = n < 25, 25 <= n < 40
        records += [
            answer("eagle3", n, float(not won), 50.0),
            answer("moe-spec:truncation:8", n, float(not lost), 20.0),
        ]
    budgeted = summarise(records)[1]
    assert budgeted.difference.mean == pytest.approx(-0.01) and budgeted.difference.low < -MARGIN
    assert not budgeted.is_non_inferior
    assert recommended(summarise(records)) is None


def test_a_budget_slower_than_none_is_not_recommended():
    records = [
        answer(arm, n, 1.0, ms) for n in range(1000) for arm, ms in (("eagle3", 10.0), ("moe-spec:truncation:8", 40.0))
    ]
    assert summarise(records)[1].is_non_inferior
    assert recommended(summarise(records)) is None


def test_overlap_with_a_summary_is_no_exact_match():
    records = [answer("eagle3", 0, 1.0, 10.0), answer("eagle3", 1, 0.25, 10.0, scorer="rouge")]
    (entry,) = summarise(records)
    assert entry.overall.mean == 1.0 and entry.overall.n == 1
    assert entry.families["lists"].mean == pytest.approx(0.625)


def test_texts_stand_at_the_lowest_temperature_of_an_arm():
    text = {"kind": "text", "arm": "eagle3", "group": "facts", "text": "a", "num_tokens": 4, "nats": 4.0, "kl": 0.0,
            "num_agreed": 4}  # fmt: skip
    records = [answer("eagle3", 0, 1.0, 10.0) | {"temperature": t} for t in (1.0, 0.5)]
    low, high = summarise([*records, text])
    assert (low.temperature, low.perplexity, high.perplexity) == (0.5, {"facts": pytest.approx(math.e)}, {})


def test_a_run_can_be_interrupted_and_resumed(tmp_path, capsys):
    out, plot, texts = tmp_path / "results.jsonl", tmp_path / "frontier.html", tmp_path / "texts.jsonl"
    texts.write_text("".join(TEXTS.read_text("utf-8").splitlines(keepends=True)[::8]), encoding="utf-8")
    small = [*SMALL, "--texts", str(texts), "--out", str(out)]
    assert main([*small, "--json", "--plot", str(plot)]) == 0
    whole = out.read_text(encoding="utf-8")
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [arm["arm"] for arm in summary["arms"]] == ["eagle3@16,8,3,0.12", "moe-spec:substitution:8@16,8,3,0.12"]
    assert set(summary["arms"][0]["perplexity"]) == {"tasks", "dialogue", "facts", "prose", "code"}
    assert "Plotly.newPlot" in plot.read_text(encoding="utf-8")

    assert main(small) == 2
    assert "--resume" in capsys.readouterr().err
    lines = whole.splitlines(keepends=True)
    out.write_text("".join(lines[:-2]) + lines[-2][:40], encoding="utf-8")  # cut off in the last but one record
    assert main([*small, "--resume"]) == 0
    before, again = ([json.loads(line) for line in text.splitlines()] for text in (whole, out.read_text("utf-8")))
    assert again[: len(before) - 2] == before[:-2], "nothing lost"
    keys = [record_key(record) for record in again if record["kind"] != "run"]
    assert len(keys) == len(set(keys)) == len(before) - 1, "nothing repeated"
    assert [record["settings"] for record in again if record["kind"] == "run"] == [before[0]["settings"]] * 2


def test_several_temperatures_are_told_apart(tmp_path, capsys):
    arguments = ["--temperatures", "0", "1", "--seeds", "2", "--no-texts", "--max-new-tokens", "12", "--json"]
    written = ["--out", str(tmp_path / "r.jsonl"), "--plot", str(tmp_path / "plot.html")]
    assert main([*SMALL, *arguments, *written]) == 0
    arms = json.loads(capsys.readouterr().out.splitlines()[-1], parse_constant=pytest.fail)["arms"]
    assert [(arm["temperature"], arm["overall"]["n"]) for arm in arms] == [(0, 12), (0, 12), (1, 12), (1, 12)]
    records = [json.loads(line) for line in (tmp_path / "r.jsonl").read_text("utf-8").splitlines()[1:]]
    replies = {(r["item"], r["seed"]): r["reply"] for r in records if r["temperature"] == 1 and "eagle3" in r["arm"]}
    assert len(replies) == 24
    assert any(replies[item, 0] != replies[item, 1] for item, _ in replies), "seeds differ"
    assert "frontier1" in (tmp_path / "plot.html").read_text("utf-8")


def record_of(reply: str) -> dict:
    return {"kind": "answer", "arm": "a", "temperature": 0.0, "seed": 0, "item": reply, "reply": reply}


@pytest.mark.parametrize("reply", ["a\u2028b\x85c", "1 €"])
def test_any_reply_and_a_cut_inside_a_character_can_be_resumed(tmp_path, reply):
    path, header = tmp_path / "results.jsonl", {"kind": "run", "settings": dict.fromkeys(DECIDING, "same")}
    Results(path, header, resume=False).append(record_of(reply))
    whole = path.read_bytes()
    path.write_bytes(whole + json.dumps(record_of("€"), ensure_ascii=False).encode()[:-3])
    assert Results(path, header, resume=True).records == [record_of(reply)]
    assert path.read_bytes() == whole + json.dumps(header).encode() + b"\n"


@pytest.mark.parametrize("name", DECIDING)
def test_results_of_another_run_are_refused(tmp_path, name):
    path, settings = tmp_path / "results.jsonl", dict.fromkeys(DECIDING, "same")
    Results(path, {"kind": "run", "settings": settings}, resume=False)
    Results(path, {"kind": "run", "settings": settings}, resume=True)
    with pytest.raises(ValueError, match=f"another {name}"):
        Results(path, {"kind": "run", "settings": settings | {name: "other"}}, resume=True)


def test_a_file_of_something_else_is_refused(tmp_path):
    path = tmp_path / "results.jsonl"
    path.write_text("no json\n")
    with pytest.raises(ValueError, match="no results file"):
        Results(path, {"kind": "run", "settings": dict.fromkeys(DECIDING, "same")}, resume=True)


def test_the_fingerprint_follows_the_weights():
    model = tiny_model("olmoe")
    before = weights_sha256(model)
    assert before == weights_sha256(tiny_model("olmoe"))
    with torch.no_grad():
        weight = next(iter(model.parameters()))
        weight[[0, 1]] = weight[[1, 0]]  # the same values in another order
    assert weights_sha256(model) != before


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--arms", "plain"], "drafts no tree"),
        (["--arms", "moe-spec:substitution:4"], "outside 8 to 64"),
        (["--arms", "nonsense"], "cannot be run"),
        (["--arms", " "], "--arms names none"),
        (["--temperatures", "-1"], "temperature=-1"),
        (["--plot", "/nowhere/plot.html"], "its folder does not exist"),
        (["--limit", "0"], "limit=0"),
        (["--tasks-dir", "/nowhere"], "none of the known files"),
        (["--drafter", "none"], "needs a drafter"),
    ],
)
def test_bad_input_is_one_sentence(arguments, sentence, tmp_path, capsys):
    assert main(["quality", "--per-family", "2", "--out", str(tmp_path / "results.jsonl"), *arguments]) == 2
    error = capsys.readouterr().err
    assert sentence in error and error.count("\n") == 1
    assert not (tmp_path / "results.jsonl").exists()


def test_a_text_without_a_place_for_a_tree_or_with_an_id_twice_is_refused(engine, tmp_path):
    path, row = tmp_path / "texts.jsonl", {"id": "a", "group": "facts", "text": "One\u2028line of text."}
    path.write_text(json.dumps(row, ensure_ascii=False) + "\n" + json.dumps(row | {"id": "b", "text": "a"}) + "\n")
    texts = read_texts(path, engine)
    check_lengths(engine, texts[:1], 8)
    with pytest.raises(ValueError, match="text b has 1 tokens"):
        check_lengths(engine, texts, 8)
    path.write_text((json.dumps(row) + "\n") * 2)
    with pytest.raises(ValueError, match="the id a more than once"):
        read_texts(path, engine)


def test_a_question_beyond_the_context_is_named_before_anything_is_measured(tmp_path, capsys):
    (tmp_path / "gsm8k_test.jsonl").write_text(json.dumps({"question": "word " * 5000, "answer": "#### 1"}) + "\n")
    arguments = [*SMALL, "--tasks-dir", str(tmp_path), "--out", str(tmp_path / "results.jsonl")]
    assert main(arguments) == 2
    assert "gsm8k-0001 cannot be asked" in capsys.readouterr().err
    assert not (tmp_path / "results.jsonl").exists()
