"""The benchmark's prompts: how many of each class, where they end, and what is said where documents do not suffice."""

from __future__ import annotations

import argparse
import json
from collections import Counter

import pytest

from moespec import EMBEDDED_TARGET
from moespec.hf import AutoTokenizer
from moespec.train.bench_prompts import NUM_BY_GROUP, held_out_prompts
from moespec.train.cli import add_train_parser


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(EMBEDDED_TARGET)


def documents(num_each: int) -> list[dict]:
    """Of every group, two of one source and the others of another."""
    return [
        {
            "group": group,
            "source": f"{group} {1 if number < 2 else 2}",
            "messages": [
                {"role": "user", "content": f"Question {number} of {group}?"},
                {"role": "assistant", "content": "An answer."},
                {"role": "user", "content": "And then?"},
                {"role": "assistant", "content": "Another answer."},
            ],
        }
        for group in NUM_BY_GROUP
        for number in range(num_each)
    ]


def test_as_many_of_each_class_as_asked_for_ending_where_the_assistant_is_to_speak(tokenizer):
    wanted = {"tasks": 5, "dialogue": 4, "facts": 3, "prose": 2, "code": 1}
    found = list(held_out_prompts(documents(6), tokenizer, 0, wanted))
    assert Counter(prompt["id"].rsplit("-", 1)[0] for prompt in found) == wanted
    assert len({json.dumps(prompt["messages"]) for prompt in found}) == len(found)
    assert all(prompt["messages"][-1]["role"] == "user" for prompt in found)
    sources = [prompt["source"] for prompt in found if prompt["id"].startswith("facts")]
    assert Counter(sources).most_common() == [("facts 1", 2), ("facts 2", 1)], "the sources in turn"


def test_too_few_documents_are_counted(tokenizer):
    with pytest.raises(ValueError, match="group 'dialogue' give 2 prompts instead of 3"):
        list(held_out_prompts(documents(2), tokenizer, 0, dict.fromkeys(NUM_BY_GROUP, 3)))


def test_tasks_that_do_not_suffice_end_the_search(tokenizer, monkeypatch):
    monkeypatch.setattr("moespec.train.bench_prompts.MOST_DRAWS", 1)
    with pytest.raises(ValueError, match="different prompts instead of 1000"):
        list(held_out_prompts([], tokenizer, 0, {"tasks": 1000}))


def test_none_of_each_class_is_refused():
    parser = argparse.ArgumentParser()
    add_train_parser(parser.add_subparsers())
    args = parser.parse_args(["train", "prompts", "--data", "d", "--tokenizer", "t", "--out", "o", "--each", "0"])
    with pytest.raises(ValueError, match="each=0 is not allowed"):
        args.handler(args)
