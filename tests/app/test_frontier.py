"""The committed record on the page: each point against the record itself, and the settings that it loads."""

from __future__ import annotations

import json
import lzma
import statistics
from types import SimpleNamespace
from typing import Any

import pytest

from app.controls import LIVE, NAMES, read, values_of
from app.frontier import (
    RECORD,
    REPORTED,
    committed,
    committed_figure,
    committed_note,
    committed_table,
    in_words,
    reported_note,
    reported_table,
    settings_of,
)
from app.settings import Settings
from app.tabs.frontier import load, show_record

TREE = "16,8,3,0.12"


@pytest.fixture(scope="module")
def answers():
    """The record's answers by arm, read without the package."""
    by_arm: dict[str, list[dict]] = {}
    for line in lzma.decompress(RECORD.read_bytes()).decode("utf-8").split("\n")[:-1]:
        one = json.loads(line)
        if one["kind"] == "answer":
            by_arm.setdefault(one["arm"], []).append(one)
    return by_arm


def arm_of(settings: Settings) -> str:
    if settings.budget is None:
        return f"eagle3@{TREE}"
    score = ":natural+path" if settings.score == "natural" else ""
    assert settings.row_weight == ("path" if score else "uniform")
    return f"moe-spec:{settings.policy}:{settings.budget}{score}@{TREE}"


def speed(answers: list[dict]) -> float:
    return sum(one["num_tokens"] - 1 for one in answers) / (sum(one["ms"] for one in answers) / 1e3)


def points(figure: Any) -> dict[str, tuple[float, float, str]]:
    """By arm: x, y and what is said on hovering."""
    found = {}
    for trace in figure.data:
        for x, y, data, text in zip(trace.x, trace.y, trace.customdata, trace.hovertext, strict=True):
            found[arm_of(Settings.from_json(json.loads(data)))] = (x, y, text)
    return found


def test_every_arm_of_the_record_is_a_point_where_the_record_puts_it(answers):
    found = points(committed_figure(committed()))
    assert found.keys() == answers.keys()
    right = {one["item"]: one["score"] for one in answers[f"eagle3@{TREE}"]}
    for arm, (x, y, text) in found.items():
        own = [one for one in answers[arm] if one["score"] is not None]
        difference = statistics.fmean(one["score"] - right[one["item"]] for one in own)
        assert x == pytest.approx(speed(answers[arm]), abs=0.06)
        assert y == pytest.approx(100 * difference, abs=0.006)
        assert f"{speed(answers[arm]):,.0f} tokens/s" in text


def test_hovering_says_the_settings_and_intervals_hold_their_points():
    record = committed()
    texts = [text for *_, text in points(committed_figure(record)).values()]
    wanted = f"B = 12, substitution, natural weights by path, tree {TREE}"
    assert any(text.startswith(wanted) for text in texts)
    for trace in committed_figure(record).data:
        assert min(trace.error_y.array) >= 0 and min(trace.error_y.arrayminus) >= 0


def test_lines_are_told_apart_by_more_than_colour_and_ink_suits_both_themes():
    figure = committed_figure(committed())
    assert len({trace.marker.symbol for trace in figure.data}) == len(figure.data)
    assert figure.layout.paper_bgcolor == figure.layout.plot_bgcolor == "rgba(0,0,0,0)"
    assert not any("open" in trace.marker.symbol for trace in figure.data), "hollow is for what is modelled"


def test_the_table_has_the_figures_points(answers):
    table = committed_table(committed())
    drawn = points(committed_figure(committed()))
    assert {arm_of(Settings.from_json(row["settings"])) for row in table["rows"]} == drawn.keys()
    unbudgeted = speed(answers[f"eagle3@{TREE}"])
    for row in table["rows"]:
        own = speed(answers[arm_of(Settings.from_json(row["settings"]))])
        assert row["cells"][:2] == [f"{own:,.0f}", f"{own / unbudgeted:.2f}"]
        assert len(row["cells"]) == len(table["columns"]) - 1
    assert TREE in table["caption"]


def test_what_is_reported_is_called_so_and_stands_apart(answers):
    table = reported_table()
    assert "reported" in table["caption"] and not any("settings" in row for row in table["rows"])
    drawn = {round(x, 1) for x, *_ in points(committed_figure(committed())).values()}
    assert not drawn & {one for row in REPORTED for one in (row.unbudgeted, row.budgeted)}
    assert [row["cells"][-1] for row in table["rows"]] == ["1.19", "1.26", "1.35"]
    note = reported_note(committed())
    gain = speed(answers[f"moe-spec:substitution:16@{TREE}"]) / speed(answers[f"eagle3@{TREE}"])
    assert "not measured by us" in note and f"{gain:.2f} for the embedded model" in note


def test_the_note_says_what_was_measured_on_what(answers):
    note = committed_note(committed())
    scored = [one["score"] for one in answers[f"eagle3@{TREE}"] if one["score"] is not None]
    assert f"{100 * statistics.fmean(scored):.1f} %" in note and f"{len(scored):,} held-out" in note
    assert "AMD EPYC, 2 threads" in note


def test_the_record_is_shown_once():
    assert all(isinstance(one, dict) and one["__type__"] == "update" for one in show_record(True))
    figure, *_ = show_record(False)
    assert len(figure.data) == 4


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (Settings(budget=None), f"no budget, tree {TREE}"),
        (Settings(budget=None, drafter="none"), "no budget, plain decoding"),
        (Settings(method="oea:k0=2"), f"oea:k0=2, tree {TREE}"),
        (
            Settings(budget=9, policy="truncation", row_weight="depth", protect_root=True, min_path_p=0),
            "B = 9, truncation, the paper's score by depth, root protected, tree 16,8,3,0",
        ),
    ],
)
def test_settings_in_words(settings, words):
    assert in_words(settings) == words


def served(refusal: str = "") -> Any:
    def check(settings: Settings) -> None:
        if refusal:
            raise ValueError(refusal)

    return SimpleNamespace(check=check)


def test_loading_moves_what_is_loaded_and_guessed_and_nothing_else():
    chosen = Settings(budget=20, policy="truncation", total_tokens=12, temperature=0.7, seed=5)
    said, *values = load(served(), chosen.changed())
    assert "B = 20, truncation" in said["message"]
    writing = Settings(budget=None, temperature=0.3, seed=9)
    named = dict(zip(NAMES, values_of(writing), strict=True)) | dict(zip(LIVE, values, strict=True))
    after = read(json.dumps([named[name] for name in NAMES]))
    assert (after.budget, after.policy, after.total_tokens) == (20, "truncation", 12)
    assert (after.temperature, after.seed) == (0.3, 9)
    said, *values = load(served(), settings_of(f"eagle3@{TREE}").changed())
    assert dict(zip(LIVE, values, strict=True))["lossless"] is True


@pytest.mark.parametrize(
    ("chosen", "refusal", "said"),
    [
        ({"budget": 0}, "", "budget=0"),
        ({"budgte": 8}, "", "budgte"),
        ("<b>", "", "are no settings"),
        ({"budget": [8]}, "", "budget"),
        ({"budget": 65}, "budget=65 is outside 8 to 64.", "outside 8 to 64"),
    ],
)
def test_what_cannot_be_loaded_is_said_and_moves_nothing(chosen, refusal, said):
    line, *values = load(served(refusal), chosen)
    assert line["message"].startswith("Not loaded") and said in line["message"]
    assert all(value["__type__"] == "update" and len(value) == 1 for value in values)
