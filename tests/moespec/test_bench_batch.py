"""The benchmark of requests side by side: its record against what the arms must read and write, and its refusals."""

from __future__ import annotations

import json

import pytest

from moespec import EMBEDDED_TARGET, BudgetConfig, Engine, TreeConfig
from moespec.bench.batch import BatchArm
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
        assert (row["to_one_request"]["median"] == 1) == (size == 1)
    assert rows["plain", None, 1]["experts_read"] == 8 and rows["plain", None, 1]["tokens_per_step_of_each"] == 1
    assert 8 < rows["plain", None, 3]["experts_read"] <= 24
    assert rows["moe-spec", "batch", 3]["experts_read"] <= 12 < rows["moe-spec", "request", 3]["experts_read"]


def test_only_steps_in_which_all_take_part_are_timed():
    engine = Engine.from_pretrained(EMBEDDED_TARGET)
    prompts = [engine.encode(text) for text in ("Hello!", "Who are you?", "What is 1 + 1?")]
    sample = BatchArm("eagle3", TreeConfig(), BudgetConfig(), 2).write(engine, prompts[:2], 24)
    assert len(sample.steps) % 2 == 0 and 0 < sample.num_tokens <= 48
    assert sample.num_tokens == sum(len(step.token_ids) for step in sample.steps)
    assert any(step.summary is not None for step in sample.steps[-2:])
    assert all(step.summary is None for step in sample.steps[:-2])
    engine.close()


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
