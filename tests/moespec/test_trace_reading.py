"""Trace files from anywhere: what is right comes back as it was, what is wrong is named by its line."""

from __future__ import annotations

import base64
import copy
import json
from dataclasses import asdict
from pathlib import Path

import pytest

from moespec import EMBEDDED_TARGET, BudgetConfig, Engine, GenerationConfig, TreeConfig, read_trace, write_trace
from moespec.trace_reading import MAX_BYTES, read_step


@pytest.fixture(scope="module")
def trace():
    engine = Engine.from_pretrained(EMBEDDED_TARGET)
    asked = GenerationConfig(max_new_tokens=24, temperature=0.8), BudgetConfig(12), TreeConfig()
    return engine.header("Hi", *asked), list(engine.generate("Tell me a story.", *asked))


def write(path: Path, header, steps) -> Path:
    lines = [json.dumps(header), *(json.dumps(step) for step in steps)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_what_is_written_is_read(trace, tmp_path):
    header, steps = trace
    write_trace(tmp_path / "trace.jsonl", header, steps)
    assert read_trace(tmp_path / "trace.jsonl") == (header, steps)


def test_hostile_text_is_text(trace, tmp_path):
    header, steps = trace
    hostile = "</script><img src=x onerror=alert(1)>\u2028\x85\x1f\n\x00"
    values = [step.to_json() for step in steps]
    values[1]["pieces"][0] = values[1]["text"] = values[1]["tree"]["pieces"][0] = hostile
    found = read_trace(write(tmp_path / "trace.jsonl", asdict(header), values))[1]
    assert found[1].pieces[0] == found[1].text == found[1].tree.pieces[0] == hostile


def test_the_schema_before_is_read_as_well(trace, tmp_path):
    header, steps = trace
    values = [step.to_json() for step in steps]
    for step in values:
        del step["pieces"]
        for layer in step["layers"]:
            del layer["natural_ids"]
    _, found = read_trace(write(tmp_path / "old.jsonl", asdict(header) | {"schema": 1}, values))
    assert ["".join(step.pieces) for step in found] == [step.text for step in steps]
    assert all(len(step.pieces) == len(step.token_ids) for step in found)
    assert {layer.natural_ids for step in found for layer in step.layers} == {""}


def changed(values: dict, path: str, value) -> dict:
    values = copy.deepcopy(values)
    *way, last = path.split(".")
    place = values
    for key in way:
        place = place[int(key)] if isinstance(place, list) else place[key]
    place[int(last) if isinstance(place, list) else last] = value
    return values


@pytest.mark.parametrize(
    ("path", "value", "sentence"),
    [
        ("kind", "magic", "kind 'magic' is none"),
        ("kind", 3, "step.kind is int, not str"),
        ("token_ids", ["1"], r"step.token_ids\[0\] is str, not int"),
        ("token_ids", [True], r"step.token_ids\[0\] is bool, not int"),
        ("token_ids", [1] * 50, "differ in number"),
        ("draft_ms", "1", "step.draft_ms is str"),
        ("draft_ms", float("nan"), "NaN is no number"),
        ("draft_ms", -1.0, "a time is negative"),
        ("mass_kept", None, "step.mass_kept is NoneType"),
        ("tree", None, "has no tree or layers"),
        ("tree.parents.0", 0, "a parent is no earlier row"),
        ("tree.parents.1", 5, "a parent is no earlier row"),
        ("tree.depths.1", 7, "depths are not those"),
        ("tree.pieces", ["a"], "lists differ in length"),
        ("tree.target_top.0", [["x", 1, 2]], "an alternative is not"),
        ("layers.0.score", [], "has 0 experts|differ in experts"),
        ("layers.0.natural", [64], "names an expert it has not"),
        ("layers.0.active", [-1], "names an expert it has not"),
        ("layers.0.ids", "%%%", "not packed as it should be"),
        ("layers.0.ids", "AAA=", "is not that of"),
        ("layers.0.natural_ids", "AAA=", "is not that of"),
        ("origins", [99], "differ in number|is no depth"),
        ("tree.accepted.0", False, "no path from the root"),
        ("tree.target_top.0", [[1, "x", 0.5]] * 40, "more than 16 alternatives"),
        ("layers.0.score.0", -1.0, "is negative"),
        ("layers.0.weights", "inf", "a weight of layer|not packed|is not that of"),
        ("verify_ms", 10**400, "step.verify_ms is int, not float"),
        ("expert_bytes", 10**40, "is too large"),
        ("layers", [], "has no tree or layers"),
        ("extra", 1, "does not know 'extra'"),
        ("settings.budget", "many", "settings.budget is str"),
    ],
)
def test_a_bad_step_is_named_by_its_line_and_what_is_wrong(trace, tmp_path, path, value, sentence):
    header, steps = trace
    values = [step.to_json() for step in steps]
    number = next(n for n, step in enumerate(steps) if step.kind == "tree" and len(step.tree.parents) > 2)
    if value == "inf":  # float16 of all bits of the exponent
        packed = base64.b64decode(values[number]["layers"][0]["weights"])
        value = base64.b64encode(b"\x00\x7c" * (len(packed) // 2)).decode()
    values[number] = changed(values[number], path, value)
    with pytest.raises(ValueError, match=rf"trace.jsonl: line {number + 2} is not a step of a trace \(.*({sentence})"):
        read_trace(write(tmp_path / "trace.jsonl", asdict(header), values))


def test_steps_of_different_models_are_refused(trace, tmp_path):
    header, steps = trace
    values = [step.to_json() for step in steps]
    del values[-1]["layers"][0]
    with pytest.raises(ValueError, match="other layers or experts than the step before"):
        read_trace(write(tmp_path / "trace.jsonl", asdict(header), values))


def test_steps_in_another_order_or_twice_are_refused(trace, tmp_path):
    header, steps = trace
    values = [step.to_json() for step in steps]
    for broken in (values[::-1], [values[0], *values], values[1:]):
        with pytest.raises(ValueError, match="steps are not in order"):
            read_trace(write(tmp_path / "trace.jsonl", asdict(header), broken))


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "line 1 is not a trace header"),
        ("hello", "line 1 is not a trace header .no JSON"),
        ("[1]", "line 1 is not a trace header .no JSON object"),
        ('{"schema": 7}', "schema 7 is not one of 1, 2"),
        ('{"schema": 2}', "header misses"),
        ("[" * 100_000, "line 1 is not a trace header"),
    ],
)
def test_what_is_no_trace_is_said_to_be_none(tmp_path, text, sentence):
    (tmp_path / "trace.jsonl").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=sentence):
        read_trace(tmp_path / "trace.jsonl")


def test_a_cut_off_file_a_picture_and_too_much_are_refused(trace, tmp_path):
    header, steps = trace
    path = tmp_path / "trace.jsonl"
    write_trace(path, header, steps)
    path.write_text(path.read_text(encoding="utf-8")[:-200], encoding="utf-8")
    with pytest.raises(ValueError, match=f"line {len(steps) + 1} is not a step of a trace .no JSON"):
        read_trace(path)
    write(path, asdict(header), [])
    with pytest.raises(ValueError, match="has a header and no step"):
        read_trace(path)
    path.write_bytes(b"\x89PNG\r\n\x1a\n\xff")
    with pytest.raises(ValueError, match="is not text"):
        read_trace(path)
    with path.open("wb") as file:
        file.truncate(MAX_BYTES + 1)
    with pytest.raises(ValueError, match="has more than 64 MB"):
        read_trace(path)


def test_a_step_comes_back_from_its_json(trace):
    for step in trace[1]:
        assert read_step(json.loads(json.dumps(step.to_json()))) == step
