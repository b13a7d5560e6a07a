"""The command line with the embedded pair: what a newcomer types first, and what they mistype."""

from __future__ import annotations

import json

import pytest
import torch

from moespec import EMBEDDED_TARGET, read_trace
from moespec.cli import main


def test_json_ends_with_the_summary_and_steps_join_to_its_text(capsys, tmp_path):
    trace = tmp_path / "trace.jsonl"
    arguments = ["generate", "What is 12 + 30?", "--json", "--budget", "16", "--max-new-tokens", "24"]
    assert main([*arguments, "--drafter", "ngram", "--trace", str(trace)]) == 0
    *steps, summary = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert "".join(step["text"] for step in steps) == summary["text"]
    assert [token for step in steps for token in step["token_ids"]] == summary["token_ids"]
    wanted = "text prompt_token_ids token_ids num_steps tokens_per_step tokens_per_s experts_natural experts_kept"
    wanted += " experts_active mass_kept lossless finish_reason settings device"
    assert set(wanted.split()) <= set(summary)
    header, read = read_trace(trace)
    assert header.prompt == "What is 12 + 30?"
    assert len(read) == len(steps)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--budget", "4"], "outside 8 to 64"),
        (["--budget", "65"], "outside 8 to 64"),
        (["--budget", "many"], "is not a number of experts"),
        (["--policy", "drop"], "write NAME or NAME:key=value"),
        (["--tree", "0,4,3"], "total_tokens=0 is not allowed"),
        (["--tree", "8"], "three whole numbers"),
        (["--temperature", "-1"], "temperature=-1.0 is not allowed"),
        (["--drafter", "/nowhere"], "neither a directory"),
        (["--taps", "2,x"], "taps='2,x' is not a list of layers"),
        (["--drafter", "ngram", "--taps", "2,4,5"], "tap_layers=[2, 4, 5] is for a draft head"),
        (["--taps", "2,4,8"], "tap layers 8 for the target's 0 to 7"),
        (["--target", "/nowhere"], "neither a directory"),
        (["--threads", "0"], "threads=0 is not allowed"),
    ],
)
def test_bad_options_end_with_one_sentence(arguments, sentence, capsys):
    assert main(["generate", "Hello", *arguments]) == 2
    output = capsys.readouterr()
    assert sentence in output.err
    assert output.err.count("\n") == 1
    assert output.out == ""


def test_an_answer_ends_with_who_drafted_it_and_why(capsys):
    assert main(["generate", "Hi", "--drafter", "ngram", "--max-new-tokens", "2"]) == 0
    assert "; drafter n-gram (asked for)" in capsys.readouterr().out


@pytest.mark.parametrize(
    "problem",
    [
        torch.OutOfMemoryError("CUDA out of memory. More\nmore"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_memory_that_runs_out_is_one_sentence(problem, capsys, monkeypatch):
    def run_out(*_, **__):
        raise problem

    monkeypatch.setattr("moespec.Engine.from_pretrained", run_out)
    assert main(["generate", "Hi"]) == 2
    error = capsys.readouterr().err
    assert str(problem).splitlines()[0] in error and error.count("\n") == 1


def test_inspect_says_which_drafter_is_in_use_and_why(capsys):
    assert main(["inspect", "--taps", "2,4,6"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["drafter_name"], found["drafter_reason"]) == ("EAGLE-3", "a head was found beside the target")
    assert found["tap_layers"] == [2, 4, 6]


@pytest.mark.parametrize("prompt", ["", "  \n"])
def test_an_empty_prompt_is_refused(prompt, capsys):
    assert main(["generate", prompt]) == 2
    assert "the prompt is empty" in capsys.readouterr().err


def test_the_embedded_model_is_there():
    assert (EMBEDDED_TARGET / "manifest.json").is_file()
