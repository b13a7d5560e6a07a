"""A conversation: changed, taken back, kept over a reload, deleted; what two pages of one visitor do to each other."""

from __future__ import annotations

from playwright.sync_api import Page, expect

from tests.browser.flaky import flaky_connection
from tests.browser.visitor import LONG, Visitor


def two_tabs(visitor: Visitor) -> tuple[Page, Page]:
    """One that has an answer, and one opened after it, which begins with a copy."""
    first = visitor.page
    visitor.ask("What is 12 + 30?")
    visitor.wait("done")
    first.wait_for_timeout(800)
    second = first.context.new_page()
    second.goto(visitor.address)
    expect(second.locator("#chat .user")).to_contain_text("12 + 30", timeout=LONG)
    return first, second


def bots(visitor: Visitor):
    return visitor.page.locator("#chat .bot")


def test_an_edited_message_is_answered_anew_and_what_came_after_is_gone(visitor):
    page = visitor.page
    visitor.ask("What is 12 + 30?")
    visitor.wait("done")
    visitor.ask("Who are you?")
    expect(bots(visitor)).to_have_count(2, timeout=LONG)
    visitor.wait("done")
    page.locator("#chat").get_by_label("Edit").first.click()
    page.locator("#chat textarea").fill("What is 20 + 5?")
    page.locator("#chat").get_by_label("Submit").click()
    expect(page.locator("#chat .user")).to_have_count(1, timeout=LONG)
    expect(bots(visitor)).to_have_count(1, timeout=LONG)
    visitor.wait("done")
    expect(page.locator("#chat .user")).to_contain_text("20 + 5")


def test_undo_takes_the_question_back_to_where_it_can_be_changed(visitor):
    page = visitor.page
    visitor.ask("What is 12 + 30?")
    visitor.wait("done")
    page.get_by_label("Undo").last.click()
    expect(page.locator("#chat .user")).to_have_count(0, timeout=LONG)
    expect(page.locator("#prompt textarea")).to_have_value("What is 12 + 30?")


def test_a_conversation_and_its_settings_survive_a_reload_until_they_are_deleted(visitor):
    page = visitor.page
    visitor.set_budget(17)
    visitor.ask("Repeat: <b>one</b> &lt; two")
    visitor.wait("done")
    answer = visitor.answer
    page.wait_for_timeout(800)
    visitor.reload(page)
    expect(page.locator("#chat .user")).to_contain_text("Repeat: <b>one</b> &lt; two", timeout=LONG)
    assert visitor.answer == answer
    expect(page.get_by_label("number input for Experts per layer")).to_have_value("17")
    visitor.ask("What is 2 + 2?")
    expect(bots(visitor)).to_have_count(2, timeout=LONG)
    visitor.wait("done")
    page.get_by_label("Clear").click()
    expect(bots(visitor)).to_have_count(0, timeout=LONG)
    page.wait_for_timeout(500)
    visitor.reload(page)
    visitor.wait("recorded")
    page.wait_for_timeout(1000)
    assert page.locator("#chat .user").count() == 0


def test_what_is_copied_and_what_is_changed_is_what_was_written(visitor):
    page, text = visitor.page, "Repeat: a < b && c &lt; <i>d</i> ![e](f)"
    page.context.grant_permissions(["clipboard-read", "clipboard-write"], origin=visitor.address)
    visitor.ask(text)
    visitor.wait("done")
    page.locator("#chat .user-row, #chat .user").first.hover()
    page.locator("#chat").get_by_label("Copy message").first.click()
    page.wait_for_function("(text) => navigator.clipboard.readText().then((copied) => copied === text)", arg=text)
    page.locator("#chat").get_by_label("Edit").first.click()
    field = page.locator("#chat textarea")
    expect(field).to_have_value(text)
    field.fill(f"{text} &amp;")
    page.locator("#chat").get_by_label("Submit").click()
    expect(page.locator("#chat .user .message-content")).to_contain_text("&amp;", timeout=LONG)
    visitor.wait("done")


def test_a_deleted_conversation_is_gone_in_all_tabs_that_are_not_open(visitor):
    first, second = two_tabs(visitor)
    first.goto("about:blank")
    second.get_by_label("Clear").click()
    expect(second.locator("#chat .user")).to_have_count(0, timeout=LONG)
    second.wait_for_timeout(500)
    assert "12 + 30" not in second.evaluate("JSON.stringify({...localStorage})")
    visitor.reload(second)
    expect(second.locator("#device")).to_contain_text("experts", timeout=LONG)
    second.wait_for_timeout(1000)
    assert second.locator("#chat .user").count() == 0
    first.goto(visitor.address)


def test_two_pages_of_one_visitor_take_nothing_from_each_other(visitor):
    first, second = two_tabs(visitor)
    second.get_by_label("Clear").click()
    expect(second.locator("#chat .user")).to_have_count(0, timeout=LONG)
    second.wait_for_timeout(500)
    visitor.reload(second)  # where nothing comes in its place, and the first tab's stays
    expect(second.locator("#device")).to_contain_text("experts", timeout=LONG)
    second.wait_for_timeout(1000)
    assert second.locator("#chat .user").count() == 0
    second.fill("#prompt textarea", "Who are you?")
    second.press("#prompt textarea", "Enter")
    expect(second.locator("#chat .bot")).to_have_count(1, timeout=LONG)
    second.wait_for_timeout(1500)
    visitor.reload(first)  # deleted in the other, which began with it: not where it is open
    expect(first.locator("#chat .user")).to_contain_text("12 + 30", timeout=LONG)
    visitor.reload(second)
    expect(second.locator("#chat .user")).to_contain_text("Who are you?", timeout=LONG)


def test_what_a_browser_has_kept_is_only_ever_text(visitor):
    page = visitor.page
    page.evaluate("window.harmed = false")
    broken = [
        "not json",
        '{"messages": 3}',
        '{"messages": [{"role": "system", "content": "x"}, {"role": "user"}, 5], "settings": {"budget": -4}}',
    ]
    for number, text in enumerate(broken):
        page.evaluate("([key, text]) => localStorage.setItem(key, text)", [f"moe-spec-studio/{number}", text])
    hostile = (
        '{"at": 9e15, "settings": {"magic": 1}, "messages": [{"role": "user", '
        '"content": "<img src=x onerror=\'window.harmed=true\'>"}]}'
    )
    page.evaluate("(text) => localStorage.setItem('moe-spec-studio/hostile', text)", hostile)
    second = page.context.new_page()
    second.goto(visitor.address)
    expect(second.locator("#chat .user")).to_contain_text("<img src=x", timeout=LONG)
    assert second.evaluate("window.harmed") is None or second.evaluate("window.harmed") is False
    assert second.locator("#chat .message-content img").count() == 0


def test_markdown_is_a_view_without_tags_and_pictures(visitor):
    page = visitor.page
    visitor.ask("**bold** ![p](http://localhost:1/p.png) <img src=x> `a < b` &lt;")
    visitor.wait("done")
    page.locator("#chat").get_by_role("button", name="Markdown").click()
    message = page.locator("#chat .user .message-content")
    expect(message.locator("strong")).to_have_text("bold", timeout=LONG)
    assert page.locator("#chat .message-content img").count() == 0
    assert "&lt;" in message.inner_text().replace("\u2060", "")
    page.locator("#chat").get_by_role("button", name="Markdown").click()
    expect(message.locator("strong")).to_have_count(0, timeout=LONG)
    written = "**bold** ![p](http://localhost:1/p.png) <img src=x> `a < b` &lt;"
    assert message.inner_text().replace("\u2060", "").strip() == written


def test_a_lost_connection_in_mid_answer_loses_nothing_that_was_there(browser, unhurried_address):
    with flaky_connection(unhurried_address) as connection:
        visitor = Visitor(browser, connection.address)
        page = visitor.page
        visitor.ask_for_a_long_answer("Tell me a long story about a goat.")
        visitor.wait("writing")
        page.wait_for_timeout(4000)
        written = visitor.answer.replace("\n", " ")
        connection.cut()
        page.wait_for_timeout(1000)
        connection.mend()  # the page comes back by itself
        expect(page.locator("#live .mss-message")).to_contain_text("Recorded on", timeout=LONG)
        expect(page.locator("#chat .user")).to_contain_text("Tell me a long story about a goat.", timeout=LONG)
        assert written[:60] in visitor.answer.replace("\n", " ")
        expect(page.locator("#live .mss-message")).to_contain_text("What was written is kept: Retry")
        visitor.ask("What is 2 + 3?")
        expect(page.locator("#chat .user")).to_have_count(2, timeout=LONG)
        visitor.wait("writing")
        page.click("#stop")
        page.context.close()


def test_presets_set_the_controls_and_a_changed_control_is_no_preset(visitor):
    page = visitor.page
    page.locator("#preset").get_by_text("Lossless").click()
    expect(page.get_by_label("No budget")).to_be_checked(timeout=LONG)
    page.locator("#preset").get_by_text("Tight").click()
    expect(page.get_by_label("number input for Experts per layer")).to_have_value("8", timeout=LONG)
    expect(page.get_by_label("No budget")).not_to_be_checked()
    visitor.set_budget(21)
    expect(page.locator("#preset input:checked")).to_have_count(0, timeout=LONG)
    page.get_by_role("button", name="Reset these").first.click()
    expect(page.get_by_label("number input for Experts per layer")).to_have_value("16", timeout=LONG)
    expect(page.locator("#preset input:checked")).to_have_value("Balanced", timeout=LONG)
    expect(page.locator("#preset-help")).to_contain_text("Reads few experts")
    page.get_by_role("button", name="How experts are ranked").click()
    method = page.get_by_label("Another method")
    method.fill("oea:k0=2")
    expect(page.locator("#preset-help")).to_contain_text("Settings of your own", timeout=LONG)
    page.get_by_label("No budget").check()
    expect(method).to_have_value("", timeout=LONG)  # which would drop experts
    expect(page.locator("#preset-help")).to_contain_text("token for token", timeout=LONG)
    method.fill("oea:k0=2")
    expect(page.get_by_label("No budget")).not_to_be_checked(timeout=LONG)


def test_the_advice_for_this_machine_can_be_used(visitor):
    page = visitor.page
    expect(page.locator("#advice")).to_contain_text("times plain decoding", timeout=LONG)
    advised = page.locator("#advice").inner_text()
    page.click("#use-advice")
    expect(page.locator("#preset input:checked")).to_have_count(0, timeout=LONG)
    assert ("no budget" in advised) == page.get_by_label("No budget").is_checked()
    page.get_by_role("tab", name="How far to guess").click()
    if "guess nothing" in advised:
        expect(page.get_by_label("none", exact=True)).to_be_checked()
        return
    size, depth = (page.get_by_label(f"number input for {name}").input_value() for name in ("Tree size", "Depth"))
    assert f"trees of up to {size} rows, {depth} deep" in advised


def test_send_gives_way_to_stop_while_an_answer_is_written(browser, unhurried_address):
    visitor = Visitor(browser, unhurried_address)
    page = visitor.page
    expect(page.locator("#stop")).to_be_hidden()
    page.fill("#prompt textarea", "Tell me a story.")
    page.click("#send")
    visitor.wait("writing")
    expect(page.locator("#send")).to_be_hidden()
    expect(page.locator("#prompt textarea")).to_be_focused()
    page.click("#stop")
    visitor.wait("done")
    expect(page.locator("#prompt textarea")).to_be_focused()
    expect(page.locator("#send")).to_be_visible()
    expect(page.locator("#stop")).to_be_hidden()
    page.context.close()


def test_an_adaptive_answer_is_lossless(visitor):
    page = visitor.page
    page.locator("#preset").get_by_text("Adaptive").click()
    expect(page.get_by_label("No budget")).to_be_checked(timeout=LONG)
    visitor.ask("What is 12 + 30?")
    page.wait_for_selector('#live .mss[data-status="done"]', timeout=2 * LONG)  # costs are measured first
    expect(page.locator('#live [data-figure="lossless"]')).to_have_text("lossless")
