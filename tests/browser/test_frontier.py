"""The Frontier tab in a real browser: points load into the chat by pointer and by key, a sweep runs and stops, a
calculator answers."""

from __future__ import annotations

import itertools

import pytest
from playwright.sync_api import Page, expect

from tests.browser.visitor import FRAME, LONG, Visitor

BUDGET = "number input for Experts per layer"


def open_tab(page: Page) -> None:
    page.get_by_role("tab", name="Frontier").click()
    expect(page.locator("#frontier-table tbody tr")).to_have_count(25, timeout=LONG)
    page.locator("#frontier-plot .main-svg").first.wait_for(timeout=LONG)
    expect(page.locator("#sweep-budgets input")).to_have_count(6, timeout=LONG)


def in_chat(page: Page) -> None:
    page.get_by_role("tab", name="Chat").click()


def click_point(page: Page, plot: str, trace: int, point: int) -> None:
    """As a visitor does: where the point is drawn."""
    mark = page.locator(f"{plot} .scatterlayer .trace").nth(trace).locator(".points path").nth(point)
    mark.scroll_into_view_if_needed()
    box = mark.bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.locator(f"{plot} .hoverlayer .hovertext").wait_for(timeout=LONG)
    page.mouse.click(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)


def test_a_click_on_a_point_loads_its_settings_into_the_chat(visitor):
    page = visitor.page
    open_tab(page)
    expect(page.locator("#frontier-note p")).to_contain_text("Measured, greedy, over 1,163 held-out questions")
    expect(page.locator("#frontier-reported table")).to_contain_text("Qwen3-30B-A3B, GSM8K")
    click_point(page, "#frontier-plot", trace=2, point=0)  # truncation, the smallest budget
    expect(page.locator("#frontier-said p")).to_contain_text("Loaded into the chat's controls: B = 8, truncation")
    in_chat(page)
    expect(page.get_by_label(BUDGET)).to_have_value("8")
    expect(page.get_by_label("truncate")).to_be_checked()
    visitor.ask("What is 2 + 3?")
    page.wait_for_selector(f'{FRAME}[data-status="done"][data-budget="8"]', timeout=LONG)
    expect(page.locator('[data-figure="force"]')).to_have_text("budget 8, truncation")


def test_no_points_name_lies_on_another(visitor):
    page = visitor.page
    open_tab(page)
    names = page.locator("#frontier-plot .textpoint text").all()
    boxes = [box for one in names if one.text_content() and (box := one.bounding_box())]
    assert len(boxes) > 8
    for one, other in itertools.combinations(boxes, 2):
        is_aside = one["x"] + one["width"] <= other["x"] or other["x"] + other["width"] <= one["x"]
        assert is_aside or one["y"] + one["height"] <= other["y"] or other["y"] + other["height"] <= one["y"]


def test_a_row_loads_its_settings_by_key(visitor):
    page = visitor.page
    open_tab(page)
    button = page.get_by_role("button", name="Load into the chat: B = 20, substitution, natural weights by path")
    button.focus()
    page.keyboard.press("Enter")
    expect(page.locator("#frontier-said p")).to_contain_text("Loaded into the chat's controls: B = 20")
    assert page.evaluate("document.activeElement.textContent") == "Load", "focus stays"
    in_chat(page)
    expect(page.get_by_label(BUDGET)).to_have_value("20")
    page.get_by_role("tab", name="Frontier").click()
    page.get_by_role("button", name="Load into the chat: no budget").click()
    expect(page.locator("#frontier-said p")).to_contain_text("no budget")
    in_chat(page)
    expect(page.get_by_role("checkbox", name="No budget")).to_be_checked()


def test_a_sweep_appends_its_results_and_draws_them(visitor):
    page = visitor.page
    open_tab(page)
    expect(page.locator("#sweep-table .points-empty")).to_contain_text("appears here as the sweep runs")
    page.click("#sweep-start")
    expect(page.locator("#sweep-said p")).to_contain_text("Done. 24 of 24 answers, measured here", timeout=LONG)
    rows = page.locator("#sweep-table tbody tr")
    names = [row.locator("th").inner_text() for row in rows.all()]
    assert names == ["no budget", "plain decoding", "B = 8", "B = 12", "B = 16", "B = 24"]
    expect(rows.first).to_contain_text("100 % (100 % to 100 %)")
    expect(page.locator("#sweep-table .points-range")).to_have_count(6)
    page.locator("#sweep-plot .main-svg").first.wait_for(timeout=LONG)
    page.get_by_role("button", name="Load into the chat: B = 24").last.click()
    expect(page.locator("#sweep-said p")).to_contain_text("Loaded into the chat's controls: B = 24")
    expect(rows).to_have_count(6)


def test_a_sweep_that_is_stopped_keeps_what_it_has_and_is_one_visitors_place(watcher, browser, unhurried_address):
    page = watcher.page
    other = Visitor(browser, unhurried_address)
    other.ask_for_a_long_answer("Tell me a long story about a cat.")
    other.wait("writing")
    open_tab(page)
    page.get_by_label("number input for Prompts").fill("12")
    page.get_by_label("number input for Prompts").press("Tab")
    page.click("#sweep-start")
    rows = page.locator("#sweep-table tbody tr")
    expect(rows).to_have_count(6, timeout=LONG)
    expect(page.locator("#sweep-said p")).to_contain_text("answers were written beside other visitors'")
    expect(page.locator("#sweep-said progress")).to_be_visible()
    in_chat(page)
    watcher.ask("What is 2 + 3?")  # a visitor has one place
    watcher.wait("error")
    expect(page.get_by_text("Your comparison or sweep is still running").first).to_be_visible()
    page.get_by_role("tab", name="Frontier").click()
    page.click("#sweep-stop")
    expect(page.locator("#sweep-said p")).to_contain_text("Stopped.", timeout=LONG)
    expect(rows).to_have_count(6)
    page.locator("#sweep-plot .main-svg").first.wait_for(timeout=LONG)
    assert other.page.locator(FRAME).get_attribute("data-status") == "writing", "the other's chat went on"
    for box in page.locator("#sweep-budgets input").all():
        box.uncheck()
    page.click("#sweep-start")
    expect(page.locator("#sweep-said p")).to_contain_text("Choose at least one budget", timeout=LONG)
    expect(rows).to_have_count(6)  # a refusal takes nothing away
    other.page.context.close()
    assert other.errors == []


def test_the_calculator_answers_and_refuses_in_sentences(visitor):
    page = visitor.page
    open_tab(page)
    said = page.locator("#calculator-said p")
    expect(said).to_contain_text("modelled", timeout=LONG)  # Qwen3-30B-A3B on an H100, before a click
    page.get_by_label("Model", exact=True).click()
    page.get_by_role("option", name="Mixtral-8x7B").click()
    expect(said).to_contain_text("which is lossy", timeout=LONG)
    expect(page.locator("#calculator-choices tbody tr")).to_have_count(2)
    page.locator("#calculator-plot .main-svg").first.wait_for(timeout=LONG)
    page.get_by_label("Card", exact=True).click()
    page.get_by_role("option", name="by its GB/s, typed below").click()
    field = page.get_by_role("spinbutton", name="GB/s")
    field.fill("-3")
    field.press("Enter")
    expect(said).to_contain_text("give GB/s above 0. What stands below is the last", timeout=LONG)
    expect(page.locator("#calculator-choices tbody tr")).to_have_count(2)
    field.fill("900")
    page.click("#calculator-work")
    expect(page.locator("#calculator-lines p")).to_contain_text(
        "a device of 900 GB/s: 900 GB/s, typed in", timeout=LONG
    )


def test_the_tab_keeps_what_was_done_when_it_is_opened_again(visitor):
    page = visitor.page
    open_tab(page)
    page.locator("#sweep-budgets input").first.uncheck()
    in_chat(page)
    page.get_by_role("tab", name="Frontier").click()
    page.wait_for_timeout(1000)
    expect(page.locator("#sweep-budgets input").first).not_to_be_checked()
    expect(page.locator("#frontier-table tbody tr")).to_have_count(25)


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_a_phone_needs_no_sideways_scrolling_and_can_scroll_a_table(browser, address, theme):
    phone = Visitor(browser, f"{address}/?__theme={theme}", width=390, height=844)
    open_tab(phone.page)
    assert phone.page.evaluate("document.documentElement.scrollWidth") <= 390
    room = phone.page.locator("#frontier-table .points-room")
    assert room.evaluate("room => room.scrollWidth > room.clientWidth && room.tabIndex === 0")
    phone.page.context.close()
    assert phone.errors == []
