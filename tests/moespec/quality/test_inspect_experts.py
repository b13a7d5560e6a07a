"""`inspect experts`: its report, its document and what it refuses. What it measures: test_specialisation.py."""

from __future__ import annotations

import argparse
import json

import pytest

from moespec import EMBEDDED_TARGET, Engine, TreeConfig
from moespec.quality.inspect_cli import REPORTED, add_arguments, inspect_experts
from tests.moespec.quality.test_specialisation import tiny_engine


@pytest.fixture(scope="module")
def embedded():
    engine = Engine.from_pretrained(EMBEDDED_TARGET)
    yield engine
    engine.close()


def run_command(engine: Engine, *arguments: str) -> int:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return inspect_experts(engine, parser.parse_args(arguments))


@pytest.fixture
def two_texts(tmp_path):
    chat = [{"role": "user", "content": "What is 12 + 30?"}, {"role": "assistant", "content": "12 + 30 = 42"}]
    entries = [
        {"id": "one", "group": "sums", "source": "here", "messages": chat},
        {"id": "two", "group": "tales", "source": "here", "text": "Once upon a time there was a small dog."},
    ]
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return path


def test_the_json_document_is_the_last_line_and_holds_what_is_measured(embedded, two_texts, capsys):
    assert run_command(embedded, "--texts", str(two_texts), "--positions", "1", "--json") == 0
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    found, num_layers = document["measured"], embedded.info.num_moe_layers
    assert [domain["domain"] for domain in found["domains"]] == ["sums", "tales"]
    assert all(len(domain["entropy_L"]) == num_layers for domain in found["domains"])
    assert [len(matrix) for matrix in found["overlap_LDD"]] == [2] * num_layers
    assert found["unions"][0]["union_L"] == [embedded.info.top_k] * num_layers
    assert document["texts"]["file"] == "texts.jsonl" and document["positions"] == 1
    assert document["tree"] == TreeConfig().numbers
    assert "not measured" in document["reported"]["by"] and len(document["reported"]["figures"]) == len(REPORTED)


def test_the_report_shows_every_domain_and_labels_what_others_report(embedded, two_texts, capsys):
    assert run_command(embedded, "--texts", str(two_texts), "--positions", "1") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines.count("| layer | sums | tales | all |") == 3
    assert "|  | sums | tales |" in lines
    for entry in REPORTED:
        said = lines.index(f"- {entry.model}: {entry.figure}")
        label = next(line for line in reversed(lines[:said]) if line and not line.startswith("- "))
        assert "not measured here" in label
    widths = [line.count("|") for line in lines]
    for line, width, before in zip(lines[1:], widths[1:], widths, strict=False):
        assert not (line.startswith("|") and before) or width == before, f"a ragged table at {line}"


@pytest.mark.parametrize("bad", ["no json", "[1, 2]", '{"id": "x", "group": "a"}', '{"group": "a", "text": "hello"}'])
def test_a_bad_line_is_named(embedded, two_texts, bad):
    with two_texts.open("a") as file:
        file.write(bad + "\n")
    with pytest.raises(ValueError, match=r"texts\.jsonl, line 3 ") as refusal:
        run_command(embedded, "--texts", str(two_texts))
    assert "\n" not in str(refusal.value)


def test_an_empty_file_is_refused(embedded, tmp_path):
    path = tmp_path / "none.jsonl"
    path.write_text("")
    with pytest.raises(ValueError, match="in 0 texts"):
        run_command(embedded, "--texts", str(path))


def test_without_a_tokenizer_there_is_one_sentence(two_texts):
    engine = tiny_engine()
    with pytest.raises(ValueError, match="needs a target with a tokenizer"):
        run_command(engine, "--texts", str(two_texts))
    engine.close()
