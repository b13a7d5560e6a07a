"""For everyone: no serious finding of axe-core on any tab in either theme, no sideways scrolling on a phone, every
control by keyboard."""

from __future__ import annotations

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import expect

from tests.browser.visitor import LONG, Visitor

SEVERE = ("serious", "critical")


def tabs_of(page) -> list[str]:
    return page.locator("[role=tablist]").first.locator("[role=tab]").all_inner_texts()


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_no_serious_finding_on_any_tab(browser, address, theme):
    visitor = Visitor(browser, f"{address}/?__theme={theme}", reduced_motion="reduce")
    visitor.ask("What is 12 + 30?")
    visitor.wait("done")
    findings = []
    for name in tabs_of(visitor.page):
        visitor.page.get_by_role("tab", name=name, exact=True).first.click()
        visitor.page.wait_for_timeout(1200)
        visitor.page.wait_for_function("![...document.querySelectorAll('.empty')].some((one) => one.offsetParent)")
        for found in Axe().run(visitor.page).response["violations"]:
            if found["impact"] in SEVERE:
                findings += [(name, found["id"], node["target"], node["failureSummary"]) for node in found["nodes"]]
    visitor.page.context.close()
    assert findings == []


def test_no_tab_scrolls_sideways_on_a_phone(browser, address):
    phone = Visitor(browser, address, width=390, height=844)
    phone.ask("What is 1 + 1?")
    phone.wait("done")
    for name in tabs_of(phone.page):
        phone.page.get_by_role("tab", name=name, exact=True).first.click()
        phone.page.wait_for_timeout(600)
        assert phone.page.evaluate("document.documentElement.scrollWidth") <= 390, name
    phone.page.context.close()
    assert phone.errors == []


def test_everything_of_a_first_visit_is_on_one_screen(visitor):
    """At 1440 by 900: chat, tree, heat map, tail and figures."""
    visitor.ask("What is 12 + 30?")
    visitor.wait("done")
    page = visitor.page
    for part in (
        "#chat",
        "#prompt",
        "#live .mss-figures",
        "#live .mss-tree-room",
        "#live .mss-heat",
        "#live .mss-tail",
    ):
        box = page.locator(part).bounding_box()
        assert box["y"] >= 0 and box["y"] + box["height"] <= 900, part


def test_nothing_moves_while_text_streams(watcher):
    page = watcher.page
    parts = [".mss-tokens", ".mss-line", ".mss-tree-room", ".mss-heat", ".mss-tail"]
    where = f"() => {parts}.map((part) => document.querySelector('#live ' + part).getBoundingClientRect().top)"
    watcher.wait("recorded")
    before = page.evaluate(where)
    watcher.ask_for_a_long_answer("Tell me a long story about a cat.")
    watcher.wait("writing")
    for _ in range(5):
        page.wait_for_timeout(300)
        assert page.evaluate(where) == before
    page.click("#stop")
    watcher.wait("done")
    assert page.evaluate(where) == before


def test_the_panels_have_names_roles_and_a_text_of_their_state(visitor):
    page = visitor.page
    visitor.ask("What is 12 + 30?")
    visitor.wait("done")
    for part in ("tree", "heat", "line"):
        view = page.locator(f"#live .mss-{part}")
        assert view.get_attribute("role") == "img"
        assert any(character.isdigit() for character in view.get_attribute("aria-label"))
    tail = page.locator("#live .mss-tail")
    assert tail.get_attribute("role") == "slider" and "experts" in tail.get_attribute("aria-valuetext")
    expect(page.locator("#live .mss-message")).to_have_attribute("aria-live", "polite")


def test_the_page_is_used_without_a_pointer(visitor):
    page = visitor.page
    page.locator("#prompt textarea").focus()
    page.keyboard.type("What is 3 + 4?")
    expect(page.locator("#prompt textarea")).to_have_value("What is 3 + 4?")
    page.keyboard.press("Enter")
    visitor.wait("done")
    reached = set()
    for _ in range(70):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("(document.activeElement.className || '').toString().split(' ')[0]"))
        outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
        if page.evaluate("Boolean(document.activeElement.closest('#live'))"):
            assert outline != "none", "what has the focus is seen to have it"
    wanted = {
        "mss-tokens",
        "mss-colouring",
        "mss-range",
        "mss-play",
        "mss-tree-room",
        "mss-heat",
        "mss-tail",
        "mss-layer",
    }
    assert wanted <= reached
    expect(page.locator("#chat .bot")).to_have_count(1, timeout=LONG)
