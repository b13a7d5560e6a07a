"""The benchmark of requests side by side: its record against what the arms must read and write, and its refusals."""

from __future__ import annotations

import json

import pytest

from moespec import EMBEDDED_TARGET, BudgetConfig, Engine, GenerationConfig, TreeConfig
from moespec.bench.batch import BatchArm, Sample
from moespec.bench.timed import Timed, overall
from moespec.cli import main


def test_the_record_is_the_last_line_and_every_arm_stands_against_one_request(capsys):
    assert main(["bench", "batch", "--json", "--groups", "1", "--sizes", "3", "--max-new-tokens", "32"]) == 0
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    rows = {(row["name"].partition(":")[0], row["scope"], row["requests"]): row for row in record["arms"]}
    lossless = [(name, None, size) for name in ("plain", "eagle3") for size in (1, 3)]
    lossy = [("moe-spec", None, 1), ("moe-spec", "request", 3), ("moe-spec", "batch", 3)]
    assert list(rows) == lossless + lossy
    for (_, _, size), row in rows.items():
        assert row["tokens_per_s"] > 0 and row["verify_ms"] > 0
        assert (row["to_one_request"]["ratio"] == 1) == (size == 1)
    assert rows["plain", None, 1]["experts_read"] == 8 and rows["plain", None, 1]["tokens_per_step_of_each"] == 1
    assert 8 < rows["plain", None, 3]["experts_read"] <= 24
    assert rows["moe-spec", "batch", 3]["experts_read"] <= 12 < rows["moe-spec", "request", 3]["experts_read"]


def test_only_steps_in_which_all_take_part_are_timed():
    """Three answers of known lengths, plain, two at a time: what is timed follows from the lengths."""
    engine = Engine.from_pretrained(EMBEDDED_TARGET)
    prompts = [engine.encode(text) for text in ("Hello!", "Who are you?", "What is 1 + 1?")]
    lengths = []
    for prompt in prompts:
        *_, last = engine.generate(prompt, GenerationConfig(max_new_tokens=24), tree=TreeConfig(1))
        lengths.append(len(last.summary.token_ids))
    sample = BatchArm("plain", TreeConfig(1), BudgetConfig(), 2).write(engine, prompts, 24)
    # The first tokens come with the prompts, in a step that takes everyone one token further; and the third one's, too.
    first, second, third = (length - 2 for length in lengths)
    together = min(first, second) + min(max(first, second) - min(first, second) - 1, third)
    assert min(first, second, third) > 0 and len(sample.steps) == 2 * together
    assert sample.together.num_tokens == len(sample.steps) and sample.together.seconds > 0
    assert sample.answers[0].num_tokens == min(first, second) or sample.answers[1].num_tokens == min(first, second)
    engine.close()


def test_tokens_are_held_against_the_speed_of_their_own_answer_alone():
    """Twice as fast together: 8 tokens of a slow answer and 2 of a quick one, which alone were 10 of each."""
    together = Sample([Timed(8, 0.4), Timed(2, 0.05), Timed(0, 0.0)], [])
    alone = Sample([Timed(10, 1.0), Timed(10, 0.5), Timed(4, 0.1)], [])
    assert together.alone(alone) == Timed(10, pytest.approx(0.9))
    assert overall([together.together]) / overall([together.alone(alone)]) == pytest.approx(2.0)


def test_answers_that_end_before_all_are_under_way_are_refused():
    engine = Engine.from_pretrained(EMBEDDED_TARGET)
    with pytest.raises(ValueError, match="max-new-tokens=2 is too few"):
        BatchArm("eagle3", TreeConfig(), BudgetConfig(), 1).write(engine, [engine.encode("Hello!")], 2)
    engine.close()


@pytest.mark.parametrize("wrong", [["--groups", "0"], ["--sizes", "0"], ["--max-new-tokens", "1"]], ids=" ".join)
def test_what_cannot_be_measured_is_refused(wrong, capsys):
    assert main(["bench", "batch", *wrong]) == 2
    assert "use 1 or more groups, 2 or more max-new-tokens and sizes of 1 or more." in capsys.readouterr().err
    assert main(["bench", "batch", "--drafter", "none"]) == 2
    assert "give it a drafter" in capsys.readouterr().err
    assert main(["bench", "batch", "--arms", "utility"]) == 2
    assert "arm utility cannot be run: a governor decides for one request" in capsys.readouterr().err
    assert main(["bench", "batch", "--arms", "sere:s=2", "--profiles", "/nowhere"]) == 2
    assert "/nowhere" in capsys.readouterr().err
