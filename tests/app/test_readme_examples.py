"""What README.md says that other programs may write is run as it stands, against a page that is served."""

from __future__ import annotations

import json
import re
import subprocess

import pytest

from tests.readme import README

ADDRESS = "http://127.0.0.1:7860"


def examples() -> dict[str, str]:
    """The section's code, by a word that only one has."""
    (section,) = re.findall(r"^## From other programs\n(.*?)^## ", README.read_text(encoding="utf-8"), re.M | re.S)
    blocks = re.findall(r"^```\w+\n(.*?)^```$", section, re.M | re.S)
    found = {word: next(block for block in blocks if word in block) for word in ("gradio_client", "openai", "curl")}
    assert len(blocks) == len(found) and all(ADDRESS in block for block in blocks)
    return found


def run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def code(studio):
    return {word: block.replace(ADDRESS, studio.address) for word, block in examples().items()}


def test_gradio_client(studio, code, capsys):
    exec(compile(code["gradio_client"], "README.md", "exec"), {})
    printed = capsys.readouterr().out
    assert "num_accepted" in printed and "'maximum': 64" in printed
    assert studio.service.advise().headline in printed


def test_openai(code, capsys):
    exec(compile(code["openai"], "README.md", "exec"), {})
    printed = capsys.readouterr().out
    assert "42" in printed and "accepted_prediction_tokens=" in printed and printed.endswith("True\n")


def test_curl(code):
    *events, end, _ = run(["bash", "-c", code["curl"]]).split("\n\n")
    assert end == "data: [DONE]"
    chunks = [json.loads(event.removeprefix("data: ")) for event in events]
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks[:-1])
    assert chunks[-1]["usage"]["completion_tokens"] > 0
