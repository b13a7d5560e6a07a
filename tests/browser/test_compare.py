"""The Compare tab in a real browser: what a visitor does, what they then see, and that nothing is lost by nonsense."""

from __future__ import annotations

import json
import urllib.parse

import pytest
from playwright.sync_api import Page, expect

from tests.browser.visitor import LONG, Visitor

RACE = "#race .race"
CONTEST = {"prompt": "What is 12 + 30?", "of": [{"budget": None, "drafter": "none"}, {}, {"budget": 8}], "runs": 1}


def link_to(address: str, compare: str) -> str:
    return f"{address}/?compare={urllib.parse.quote(compare)}"


def wait(page: Page, status: str) -> None:
    page.wait_for_selector(f'{RACE}[data-status="{status}"]', timeout=LONG)


def open_tab(page: Page) -> None:
    page.get_by_role("tab", name="Compare").click()
    page.locator(RACE).wait_for()


def choose(page: Page, letter: str, kind: str) -> None:
    page.get_by_label(f"Contestant {letter}").click()
    page.get_by_role("option", name=kind, exact=True).click()


@pytest.fixture(scope="module")
def linked(browser, address):
    """A visitor who came by a link and has had it run, with leave to use the clipboard."""
    seen = Visitor(browser, link_to(address, json.dumps(CONTEST)))
    page = seen.page
    page.context.grant_permissions(["clipboard-read", "clipboard-write"], origin=address)
    page.locator(RACE).wait_for(timeout=LONG)
    expect(page.locator("#race .mss-message")).to_have_text("From a link: press Compare to run it here.")
    assert page.locator(RACE).get_attribute("data-status") == "idle", "it does not run by itself"
    page.click("#compare-start")
    wait(page, "done")
    yield seen
    page.context.close()
    assert seen.errors == []
    assert [url for url in seen.requests if not url.startswith((address, "data:", "blob:"))] == []


def test_a_link_fills_the_tab(linked):
    page = linked.page
    assert page.input_value("#compare-prompt textarea") == CONTEST["prompt"]
    shown = [page.get_by_label(f"Contestant {letter}").input_value() for letter in "ABCD"]
    assert shown == ["Plain decoding", "Balanced", "Tight", "nobody"]


def test_texts_stand_side_by_side_and_say_where_they_part(linked):
    page = linked.page
    texts = page.locator(".race-text")
    expect(texts).to_have_count(3)
    assert "42" in texts.first.inner_text()
    expect(page.locator(".race-equal").first).to_contain_text("tokens, ended by itself.")
    for number in (1, 2):
        told = page.locator(".race-equal").nth(number).inner_text()
        num_marks = texts.nth(number).locator("mark").count()
        assert ("The same as A" in told, num_marks) in ((True, 0), (False, 1)), told
    rows = page.locator(".race-figures tbody tr")
    assert rows.filter(has_text="tokens/s").locator("td b").count() == 3
    assert rows.filter(has_text="lossless").locator("td b").all_inner_texts() == ["yes", "no", "no"]
    assert rows.filter(has_text="experts read").locator("td b").all_inner_texts()[0] == "8.0"
    expect(page.locator(".race-runs")).to_contain_text("measured once each: no spread is known")
    assert "×" in rows.filter(has_text="tokens/s").locator("td").nth(1).inner_text()
    assert "×" not in rows.filter(has_text="tokens/s").locator("td").first.inner_text()


def test_the_race_plays_pauses_and_goes_back_by_keyboard(linked):
    page = linked.page
    whole = page.locator(".race-text").first.inner_text()
    picture = "document.querySelector('.race-lane canvas').toDataURL()"
    finish = page.evaluate(picture)
    page.locator(".race-speed").select_option("100")
    page.get_by_label("Back to the start").focus()
    page.keyboard.press("Enter")
    expect(page.locator(".race-clock")).to_contain_text("0.000 s of")
    assert len(page.locator(".race-text").first.inner_text()) < len(whole)
    assert page.evaluate(picture) != finish
    page.get_by_label("Play the race").focus()
    page.keyboard.press("Enter")
    page.wait_for_function("Number(document.querySelector('.race-time').value) > 0", timeout=LONG)
    page.keyboard.press("Space")
    assert page.locator(RACE).get_attribute("data-playing") == "false"
    at = page.locator(".race-clock").inner_text()
    page.wait_for_timeout(300)
    assert page.locator(".race-clock").inner_text() == at, "it rests"
    page.locator(".race-time").focus()
    page.keyboard.press("End")
    assert page.locator(".race-text").first.inner_text() == whole
    assert page.evaluate(picture) == finish
    expect(page.locator(".race-where").first).to_contain_text("tokens in")


def exported(page: Page, contestant: str) -> list[dict]:
    """The lines of a contestant's trace."""
    href = page.get_by_label(f"Export {contestant} as a trace").get_attribute("href")
    return [
        json.loads(line)
        for line in page.evaluate("(href) => fetch(href).then((found) => found.text())", href).splitlines()
    ]


def test_lanes_stand_where_their_steps_were_at_the_time(linked):
    page = linked.page
    move = """(view, at) => {
        view.value = view.max * at;
        view.dispatchEvent(new Event("input"));
        return Number(view.value);
    }"""
    traces = [exported(page, name)[1:] for name in ("A, Plain decoding", "B, Balanced", "C, Tight")]
    for at in (0.0, 0.3, 0.6, 1.0):
        ms = page.locator(".race-time").evaluate(move, at)
        for told, steps in zip(page.locator(".race-where").all_inner_texts(), traces, strict=True):
            begun = [step for step in steps if round(step["t_ms"] - steps[0]["t_ms"], 2) <= ms]
            assert int(told.split(" ")[0]) == sum(len(step["token_ids"]) for step in begun), (at, told)


def test_the_link_is_copied_and_is_the_comparison(linked, address):
    page = linked.page
    page.locator(".race-copy").click()
    expect(page.locator(".race-copy")).to_have_text("Link copied")
    copied = page.evaluate("navigator.clipboard.readText()")
    base, _, query = copied.partition("?compare=")
    assert base == f"{address}/" and json.loads(urllib.parse.unquote(query)) == CONTEST


def test_one_of_them_is_opened_in_replay_and_exported(linked):
    page = linked.page
    assert exported(page, "B, Balanced")[0]["settings"]["budget"]["budget"] == 16
    page.get_by_label("Replay C, Tight").click()
    page.wait_for_selector('#replay .mss[data-status="opened"]', timeout=LONG)
    expect(page.locator("#replay .mss-message")).to_contain_text("budget 8. Asked: What is 12 + 30?")
    page.get_by_role("tab", name="Compare").click()
    expect(page.locator(".race-text")).to_have_count(3)


@pytest.mark.parametrize(
    ("compare", "sentence"),
    [
        ("{nonsense", "it is not JSON"),
        ('{"prompt":"Hi","of":[{"budget":9000},{"budgets":1}]}', "'budgets' is not known"),
        ('{"prompt":"Hi","of":[{}]}', "choose 2 to 4"),
        ("<img src=x onerror=window.harmed=1>", "it is not JSON"),
    ],
)
def test_nonsense_in_a_link_is_a_sentence(browser, address, compare, sentence):
    seen = Visitor(browser, link_to(address, compare))
    wait(seen.page, "error")
    expect(seen.page.locator("#race .mss-message")).to_contain_text(sentence)
    assert seen.page.input_value("#compare-prompt textarea") == "Tell me a short story."
    assert seen.page.evaluate("window.harmed") is None
    seen.page.context.close()
    assert seen.errors == []


def test_what_cannot_run_is_refused_before_anything_runs(visitor):
    page = visitor.page
    open_tab(page)
    choose(page, "C", "Own settings")
    page.get_by_label("Settings of C, as JSON").fill('{"budget": 7}')
    page.click("#compare-start")
    wait(page, "error")
    expect(page.locator("#race .mss-message")).to_have_text(
        "C: budget=7 is outside 8 to 64, this model's top-k and experts."
    )
    expect(page.locator(".race-lane")).to_have_count(0)
    page.get_by_label("Settings of C, as JSON").fill('{"budget": 20, "max_new_tokens": 24}')
    page.click("#compare-start")
    wait(page, "done")
    expect(page.locator(".race-runs")).to_contain_text("medians and range of 3 runs each, in turns")
    expect(page.locator(".race-what").nth(2)).to_have_text("budget 20 · max new tokens 24")


def test_stop_keeps_what_is_finished_and_others_can_ask_on(watcher):
    page = watcher.page
    open_tab(page)
    page.click("#compare-start")
    page.wait_for_function("document.querySelector('.race-text')?.textContent.length > 20", timeout=LONG)
    page.click("#compare-stop")
    wait(page, "done")
    expect(page.locator("#race .mss-message")).to_contain_text("answers are finished, and shown")
    assert len(page.locator(".race-text").first.inner_text()) > 20
    expect(page.locator(".race-equal").last).to_have_text("Not finished yet.")
    page.get_by_role("tab", name="Chat").click()
    watcher.ask("What is 2 + 3?")
    watcher.wait("done")


def test_another_visitors_answer_is_waited_for_or_named(watcher, browser, unhurried_address):
    other = Visitor(browser, unhurried_address)
    other.ask_for_a_long_answer("Tell me a long story about a cat.")
    other.wait("writing")
    page = watcher.page
    open_tab(page)
    page.click("#compare-start")
    expect(page.locator("#race .mss-message")).to_contain_text("waiting for 1 other visitor", timeout=LONG)
    other.page.click("#stop")
    other.wait("done")
    expect(page.locator("#race .mss-message")).not_to_contain_text("waiting for", timeout=LONG)
    page.click("#compare-stop")
    wait(page, "done")
    other.page.context.close()
    assert other.errors == []


def test_who_wants_no_motion_sees_the_finish(browser, address):
    calm = Visitor(browser, link_to(address, json.dumps(CONTEST)))
    page = calm.page
    page.emulate_media(reduced_motion="reduce")
    page.locator(RACE).wait_for(timeout=LONG)
    page.click("#compare-start")
    wait(page, "done")
    expect(page.locator(".race-note")).to_contain_text("The finish: where all are when")
    expect(page.get_by_label("Play the race")).to_be_disabled()
    told = page.locator(".race-where").all_inner_texts()
    assert sum("tokens in" in one for one in told) == 1, "one is done, the others are on their way"
    page.context.close()
    assert calm.errors == []


def test_a_phone_needs_no_sideways_scrolling(browser, address):
    phone = Visitor(browser, link_to(address, json.dumps(CONTEST)), width=390, height=844)
    phone.page.locator(RACE).wait_for(timeout=LONG)
    phone.page.click("#compare-start")
    wait(phone.page, "done")
    assert phone.page.evaluate("document.documentElement.scrollWidth") <= 390
    phone.page.context.close()
    assert phone.errors == []
