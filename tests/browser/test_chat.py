"""The chat in a real browser: what a visitor does, what they then see, and that nothing goes wrong unseen."""

from __future__ import annotations

import itertools

from playwright.sync_api import expect

from tests.browser.visitor import FRAME, LONG, Visitor


def test_text_and_all_panels_change_while_the_answer_streams(watcher):
    page = watcher.page
    watcher.ask_for_a_long_answer("Tell me a short story.")
    watcher.wait("writing")
    drawn = """() => {
        const find = (name) => document.querySelector(`.mss-${name}`);
        const images = ["heat", "tail"].map((name) => find(name).toDataURL());
        return [find("tokens").children.length, find("tree").innerHTML, ...images];
    }"""
    page.wait_for_function("document.querySelectorAll('#live .mss-tokens span').length > 4", timeout=LONG)
    before = page.evaluate(drawn)
    page.wait_for_function(
        f"document.querySelectorAll('#live .mss-tokens span').length > {before[0] + 8}", timeout=LONG
    )
    after = page.evaluate(drawn)
    assert page.locator(FRAME).get_attribute("data-status") == "writing"
    assert all(one != other for one, other in zip(before, after, strict=True))
    assert len(watcher.answer) > 10
    page.click("#stop")
    watcher.wait("done")
    expect(page.locator("#live .mss-message")).to_have_text("Stopped.")
    assert page.locator(".mss-guessed").count() > 1, "accepted drafts are marked"


# The words of the last answer of the conversation, and of the panels' tokens, of which some are no words.
WORDS = """const last = (place) => [...document.querySelectorAll(place)].at(-1);
    const words = () => ["#chat .bot", "#live .mss-tokens"].map((place) => last(place).textContent
        .replace(/<[|][^|]*[|]>/g, "").replace(/[\\s]+/g, " ").trim());"""
# At every animation frame of three seconds.
WATCHED_WORDS = f"""() => new Promise((done) => {{
    {WORDS}
    const seen = [], began = performance.now();
    const look = () => {{
        seen.push(words());
        if (performance.now() - began < 3000) requestAnimationFrame(look); else done(seen);
    }};
    requestAnimationFrame(look);
}})"""


def test_words_stand_in_the_conversation_with_their_step(watcher):
    """Gradio is told of them once a second, which is not seen, nor that what it was told is older."""
    page = watcher.page
    watcher.ask_for_a_long_answer("Tell me a long story about a dog.")
    watcher.wait("writing")
    page.wait_for_function("document.querySelectorAll('#live .mss-tokens span').length > 8", timeout=LONG)
    seen = page.evaluate(WATCHED_WORDS)
    answers = [answer for answer, _ in seen]
    assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(answers)), "nothing is taken back"
    assert len(set(answers)) > 12
    assert sum(answer.startswith(tokens) for answer, tokens in seen) > 0.9 * len(seen)
    # As Markdown it is Gradio's alone, and nothing of what stood there is taken back, either.
    view = page.locator("#chat").get_by_role("button", name="Markdown")
    view.click()
    grown = f"[...document.querySelectorAll('#chat .bot')].at(-1).textContent.length > {len(answers[-1]) + 40}"
    page.wait_for_function(grown, timeout=LONG)
    view.click()
    page.click("#stop")
    watcher.wait("done")
    page.wait_for_function(f"() => {{ {WORDS} return words()[0] === words()[1]; }}", timeout=LONG)


def test_moving_the_budget_acts_on_the_running_answer(watcher):
    page = watcher.page
    watcher.ask_for_a_long_answer("Tell me a long story about a dog.")
    page.wait_for_selector(f'{FRAME}[data-status="writing"][data-budget="16"]', timeout=LONG)
    watcher.set_budget(20)
    page.wait_for_selector(f'{FRAME}[data-status="writing"][data-budget="20"]', timeout=LONG)
    expect(page.locator('#live [data-figure="force"]')).to_have_text("budget 20, substitution")
    page.get_by_label("No budget").check()
    page.wait_for_selector(f'{FRAME}[data-status="writing"][data-budget="null"]', timeout=LONG)
    expect(page.locator('#live [data-figure="lossless"]')).to_have_text("lossy")  # what was written under it stays
    page.click("#stop")
    watcher.wait("done")


def test_without_a_budget_the_page_says_lossless_and_shows_the_closer_view(visitor):
    page = visitor.page
    page.get_by_label("No budget").check()
    visitor.ask("What is 12 + 30?")
    visitor.wait("done")
    expect(page.locator('#live [data-figure="lossless"]')).to_have_text("lossless")
    expect(page.locator('#live [data-figure="mass"]')).to_have_text("100.0 %")
    page.get_by_text("Look closer at the last answer").click()
    plot = page.locator(".js-plotly-plot")
    expect(plot).to_be_visible(timeout=LONG)
    heat = "document.querySelector('.js-plotly-plot .heatmaplayer')"
    before = page.evaluate(f"{heat}.innerHTML")
    visitor.ask("Tell me a short story.")  # it follows while it is open
    page.wait_for_function(f"before => {heat} && {heat}.innerHTML !== before", arg=before, timeout=LONG)


def test_what_stands_before_is_said_to_make_an_answer_lossy(visitor):
    page = visitor.page
    visitor.set_budget(8)
    visitor.ask("What is 12 + 30?")
    visitor.wait("done")
    page.get_by_label("No budget").check()
    visitor.ask("Tell me a joke, please.")
    expect(page.locator("#chat .bot")).to_have_count(2, timeout=LONG)
    visitor.wait("done")
    expect(page.locator('#live [data-figure="lossless"]')).to_have_text("lossy")
    expect(page.locator("#live .mss-message")).to_contain_text("what stands before was written under a budget")


def test_a_message_sent_at_the_very_end_of_an_answer_is_answered(visitor):
    page = visitor.page
    visitor.ask("Who are you?")
    page.locator("#chat .bot").first.wait_for(timeout=LONG)
    page.fill("#prompt textarea", "What is 12 + 30?")
    visitor.wait("done")  # before the browser has heard that the event is over
    page.press("#prompt textarea", "Enter")
    expect(page.locator("#chat .bot")).to_have_count(2, timeout=LONG)


def test_a_second_visitor_is_served_beside_the_first(watcher, browser, unhurried_address):
    second = Visitor(browser, unhurried_address)
    watcher.ask_for_a_long_answer("Tell me a long story about a cat.")
    watcher.wait("writing")
    second.set_budget(20)  # other than the first one's
    second.ask("What is 2 + 3?")
    second.page.wait_for_selector(f'{FRAME}[data-status="done"][data-budget="20"]', timeout=LONG)
    expect(second.page.locator("#live .mss-message")).to_contain_text("beside other visitors' answers")
    assert second.answer.strip()
    assert watcher.page.locator(FRAME).get_attribute("data-status") == "writing"
    assert watcher.page.locator(FRAME).get_attribute("data-budget") == "16"
    watcher.page.click("#stop")
    watcher.wait("done")
    second.page.context.close()
    assert second.errors == []


def test_closing_the_page_stops_its_answer(watcher, browser, unhurried_address):
    leaver = Visitor(browser, unhurried_address)
    leaver.ask_for_a_long_answer("Tell me a long story about a fox.")
    leaver.wait("writing")
    leaver.page.context.close()
    watcher.ask("What is 4 + 4?")
    # Well before the other answer would have ended.
    watcher.page.wait_for_selector(f'{FRAME}[data-status="done"]', timeout=15_000)


def test_bad_input_is_a_sentence_and_loses_nothing(visitor):
    page = visitor.page
    visitor.ask("   ")
    visitor.wait("error")
    expect(page.locator("#live .mss-message")).to_contain_text("the message is empty")
    too_long = "many words " * 6000
    visitor.ask(too_long)
    visitor.wait("error")
    expect(page.locator("#live .mss-message")).to_contain_text("context is 4096")
    assert page.input_value("#prompt textarea") == too_long
    visitor.ask("What is 5 + 5?")
    visitor.wait("done")
    assert visitor.answer.strip()


def test_hostile_text_stays_text(visitor):
    page = visitor.page
    page.evaluate("window.harmed = false")
    markup = "<img src=x onerror='window.harmed=true'> <script>window.harmed=true</script>"
    hostile = f"Repeat: {markup} &lt; **b** $$5 and $$6 \x1b[31m"
    visitor.ask(hostile)
    visitor.wait("done")
    assert page.evaluate("window.harmed") is False
    assert (
        page.locator("#live img, #live script, #chat .message-content img, #chat .message-content script").count() == 0
    )
    assert (
        page.locator("#chat .user .message-content")
        .last.inner_text()
        .startswith(hostile.removesuffix("\x1b[31m").strip())
    )


def test_retry_and_clear(visitor):
    page = visitor.page
    visitor.ask("What is 12 + 30?")
    visitor.wait("done")
    first = visitor.answer
    page.get_by_label("Retry").last.click()
    page.wait_for_function(f"document.querySelector('{FRAME}').dataset.status !== 'done'", timeout=LONG)
    visitor.wait("done")
    assert visitor.answer == first, "greedy: the same answer again"
    assert page.locator("#chat .user").count() == 1
    page.get_by_label("Clear").click()
    visitor.wait("recorded")
    expect(page.locator("#chat .bot")).to_have_count(0)


def test_an_answer_is_undone_or_retried_when_it_has_ended(watcher):
    page = watcher.page
    watcher.ask_for_a_long_answer("Tell me a long story about a goat.")
    watcher.wait("writing")
    for button in ("Undo", "Retry"):
        expect(page.get_by_label(button).last).to_be_disabled()
    page.click("#stop")
    watcher.wait("done")
    for button in ("Undo", "Retry"):
        expect(page.get_by_label(button).last).to_be_enabled()


def test_clear_takes_back_the_answer_that_is_being_written(watcher):
    page = watcher.page
    watcher.ask_for_a_long_answer("Tell me a long story about a cow.")
    watcher.wait("writing")
    page.wait_for_function("document.querySelectorAll('#live .mss-tokens span').length > 4", timeout=LONG)
    page.get_by_label("Clear").click()
    page.wait_for_timeout(1500)  # what was still on its way has come by then
    watcher.wait("recorded")
    expect(page.locator("#chat .user")).to_have_count(0)
    expect(page.locator("#live .mss-message")).to_contain_text("Recorded on")


def test_refused_messages_stand_in_nobodys_way(watcher):
    page = watcher.page
    watcher.ask_for_a_long_answer("Tell me a long story about a hen.")
    watcher.wait("writing")
    for _ in range(20):
        watcher.ask(" ")
    expect(page.locator(".toast-body").first).to_contain_text("Write something first")
    assert page.locator(FRAME).get_attribute("data-status") == "writing"
    page.click("#stop")
    page.get_by_role("tab", name="How to write").click()
    page.get_by_label("Keep writing").uncheck()
    page.wait_for_timeout(500)
    watcher.ask("What is 2 + 2?")
    expect(page.locator("#chat .bot")).to_have_count(2, timeout=LONG)
    watcher.wait("done")


def test_a_number_is_typed_digit_by_digit_without_complaints(visitor):
    page = visitor.page
    field = page.get_by_label("number input for Experts per layer")
    field.fill("")
    field.press_sequentially("20", delay=80)
    field.press("Tab")
    page.wait_for_timeout(500)
    assert page.locator(".toast-body").count() == 0
    visitor.ask("What is 12 + 30?")
    page.wait_for_selector(f'{FRAME}[data-budget="20"]', timeout=LONG)
    visitor.wait("done")


def test_a_retry_with_settings_that_are_none_loses_nothing(visitor):
    page = visitor.page
    visitor.ask("What is 12 + 30?")
    visitor.wait("done")
    page.get_by_role("tab", name="How to write").click()
    page.get_by_label("Seed").fill("")
    page.get_by_label("Seed").press("Tab")
    page.get_by_label("Retry").last.click()
    visitor.wait("error")
    expect(page.locator("#live .mss-message")).to_contain_text("seed", timeout=LONG)
    expect(page.locator("#chat .user")).to_have_count(1, timeout=LONG)
    expect(page.locator("#chat .bot")).to_have_count(1, timeout=LONG)


def test_a_message_is_read_as_it_was_written(visitor):
    visitor.page.fill("#prompt textarea", "  Repeat:\n    a\tb\n    c")
    visitor.page.press("#prompt textarea", "Enter")
    visitor.wait("done")
    shown = visitor.page.locator("#chat .user .message-content").last.text_content()
    assert "  Repeat:\n    a\tb\n    c" in shown


def test_a_phone_needs_no_sideways_scrolling(browser, address):
    phone = Visitor(browser, address, width=390, height=844)
    phone.ask("What is 1 + 1?")
    phone.wait("done")
    assert phone.page.evaluate("document.documentElement.scrollWidth") <= 390
    for choice in phone.page.locator("#preset label").all():  # what is cut off at the edge scrolls nothing
        box = choice.bounding_box()
        assert box["x"] + box["width"] <= 390
    phone.page.context.close()
    assert phone.errors == []


def test_a_refusal_that_quotes_markup_is_text_and_short(visitor):
    page = visitor.page
    page.get_by_text("How experts are ranked, and other methods").click()
    hostile = "<img src='http://127.0.0.1:1/x.png'><b>bold</b>" + "x" * 3000
    page.get_by_label("Another method").fill(hostile)
    visitor.ask("What is 2 + 2?")
    visitor.wait("error")
    expect(page.locator(".toast-body").first).to_contain_text("<b>bold</b>", timeout=LONG)
    assert page.locator(".toast-body img, .toast-body b").count() == 0
    assert len(page.locator("#live .mss-message").inner_text()) < 500
