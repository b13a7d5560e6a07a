"""The Replay and About tabs: recorded answers without a model, files from anywhere, the method in its own drawings."""

from __future__ import annotations

import json

import pytest
from playwright.sync_api import expect

from tests.browser.browser import ROOT
from tests.browser.visitor import LONG

STORY = ROOT / "assets" / "traces" / "story.jsonl"


@pytest.fixture
def replay(visitor):
    visitor.page.get_by_role("tab", name="Replay").click()
    return visitor.page


def open_file(page, path) -> None:
    page.locator("#replay-file input[type=file], #replay-head input[type=file]").first.set_input_files(path)


def test_it_begins_with_a_recorded_answer_at_its_end(replay):
    last = len(STORY.read_text(encoding="utf-8").splitlines()) - 2  # behind the header, counted from the prompt's, 0
    label, at_the_end = replay.locator("#replay .mss-step-label"), f"step {last} of {last}"
    expect(label).to_have_text(at_the_end, timeout=LONG)
    expect(replay.locator("#replay .mss-tokens")).to_contain_text("Once upon a time", timeout=LONG)
    replay.locator("#replay .mss-play").click()
    expect(label).not_to_have_text(at_the_end, timeout=LONG)  # from the beginning
    expect(label).to_have_text(at_the_end, timeout=LONG)


def test_an_example_is_played_and_can_be_gone_through(replay):
    replay.get_by_label("What would you like to see again?").click()
    replay.get_by_role("option", name="Arithmetic, no budget").click()
    replay.wait_for_selector('#replay .mss[data-status="opened"]', timeout=LONG)
    expect(replay.locator("#replay .mss-message")).to_contain_text("no budget. Asked: What is 12 + 30?")
    expect(replay.locator('#replay [data-figure="lossless"]')).to_have_text("lossless", timeout=LONG)
    replay.locator("#replay .mss-range").fill("2")
    expect(replay.locator("#replay .mss-tree g:visible").first).to_be_visible(timeout=LONG)
    assert replay.locator("#replay .mss-tail").get_attribute("role") == "img", "a recording's budget cannot be moved"


def test_ones_own_file_is_opened_and_exported_again(replay, visitor, tmp_path):
    open_file(replay, STORY)
    replay.wait_for_selector('#replay .mss[data-status="opened"]', timeout=LONG)
    link = replay.locator("#replay .mss-exports a").first.get_attribute("href")
    body = replay.request.get(f"{visitor.address}/{link}").text()
    assert [json.loads(line) for line in body.splitlines()] == [
        json.loads(line) for line in STORY.read_text(encoding="utf-8").splitlines()
    ]


@pytest.mark.parametrize("harm", ["version", "cut", "type", "picture", "step"])
def test_a_bad_file_is_a_sentence_and_what_was_open_stays(replay, tmp_path, harm):
    open_file(replay, STORY)
    replay.wait_for_selector('#replay .mss[data-status="opened"]', timeout=LONG)
    tokens = replay.locator("#replay .mss-tokens").inner_text()
    lines = STORY.read_text(encoding="utf-8").splitlines()
    first = json.loads(lines[0])
    made = {
        "version": ("\n".join([json.dumps(first | {"schema": 9}), *lines[1:]]), "schema 9 is not one of"),
        "cut": ("\n".join(lines)[:-50], f"line {len(lines)} is not a step of a trace"),
        "type": ("hello", "line 1 is not a trace header"),
        "picture": ("\x89PNG\x00", "line 1 is not a trace header"),
        "step": ("\n".join([lines[0], '{"step": 0}']), "line 2 is not a step"),
    }
    text, sentence = made[harm]
    path = tmp_path / "mine.jsonl"
    path.write_text(text, encoding="utf-8")
    open_file(replay, path)
    replay.wait_for_selector('#replay .mss[data-status="error"]', timeout=LONG)
    expect(replay.locator("#replay .mss-message")).to_contain_text(sentence)
    expect(replay.locator("#replay .mss-message")).to_contain_text("What was open stays.")
    assert replay.locator("#replay .mss-tokens").inner_text() == tokens


def test_a_file_of_100_megabytes_is_a_sentence_and_what_was_open_stays(replay, tmp_path):
    open_file(replay, STORY)
    replay.wait_for_selector('#replay .mss[data-status="opened"]', timeout=LONG)
    before = replay.locator("#replay .mss-message").inner_text()
    large = tmp_path / "large.jsonl"
    with large.open("wb") as file:
        file.truncate(100 << 20)
    open_file(replay, large)
    said = replay.get_by_text("exceed the maximum allowed size of 64.0 Mb").first
    expect(said).to_be_visible(timeout=LONG)
    assert replay.locator("#replay .mss-message").inner_text() == before
    expect(replay.locator("#replay .mss-tokens")).to_contain_text("Once upon a time")


def test_hostile_strings_in_a_file_stay_text(replay, tmp_path):
    replay.evaluate("window.harmed = false")
    hostile = "<img src=x onerror='window.harmed=true'></script><script>window.harmed=true</script>"
    lines = STORY.read_text(encoding="utf-8").splitlines()
    header = json.loads(lines[0])
    header["prompt"] = hostile
    header["device"]["name"] = header["model"]["name"] = hostile
    steps = [json.loads(line) for line in lines[1:]]
    for step in steps:
        step["pieces"] = [hostile] * len(step["pieces"])
        step["text"] = hostile
        if step["tree"]:
            step["tree"]["pieces"] = [hostile] * len(step["tree"]["pieces"])
            for top in (*step["tree"]["target_top"], *step["tree"]["draft_top"]):
                for one in top:
                    one[1] = hostile
    path = tmp_path / "hostile.jsonl"
    path.write_text("\n".join(map(json.dumps, [header, *steps])), encoding="utf-8")
    open_file(replay, path)
    replay.wait_for_selector('#replay .mss[data-status="opened"]', timeout=LONG)
    replay.locator("#replay .mss-range").fill("3")
    replay.wait_for_timeout(500)
    replay.locator("#replay .mss-tree g[data-node='1']").click()
    expect(replay.locator("#replay .mss-card")).to_be_visible()
    assert replay.locator("#replay img, #replay script").count() == 0
    assert replay.evaluate("window.harmed") is False


def test_about_shows_the_method_in_the_panels_own_drawings(visitor):
    page = visitor.page
    page.get_by_role("tab", name="About").click()
    for part in ("tree", "heat", "tail"):
        expect(page.locator(f"#about-{part} .mss-{part}")).to_be_visible(timeout=LONG)
    expect(page.locator("#about-tree .mss-tree g.mss-on:visible").first).to_be_visible(timeout=LONG)
    expect(page.locator("#about-tree .mss-tree g.mss-off:visible").first).to_be_visible()
    expect(page.get_by_text("moespec/budget.py: score_experts")).to_be_visible()
    page.get_by_text("The model, its data and their licences").click()
    expect(page.get_by_text("Project Gutenberg name, header and footer stripped")).to_be_visible(timeout=LONG)
