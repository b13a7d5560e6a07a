"""The panels by pointer and by keyboard: what they show of a step is what its trace says."""

from __future__ import annotations

import json
import re

import pytest
from playwright.sync_api import Locator, Page, expect

from moespec.trace import unpack_ids, unpack_routing
from moespec.trace_reading import read_step
from tests.browser.visitor import FRAME, LONG, Visitor

STORY = "Tell me a short story about a hen."


@pytest.fixture
def reader(visitor):
    """Who has an answer in front of them."""
    visitor.ask(STORY)
    visitor.wait("done")
    return visitor


def part(page: Page, name: str) -> Locator:
    return page.locator(f"#live .mss-{name}")


def trace_of(visitor: Visitor) -> list:
    """The steps of the answer that is shown, as the page exports them."""
    link = part(visitor.page, "exports").locator("a").first.get_attribute("href")
    body = visitor.page.request.get(f"{visitor.address}/{link}").text()
    return [read_step(json.loads(line)) for line in body.strip().split("\n")[1:]]


def go_to(page: Page, step: int) -> None:
    part(page, "range").fill(str(step))
    page.wait_for_selector(f'{FRAME}[data-mode="hold"][data-step="{step}"]', timeout=LONG)
    page.wait_for_timeout(300)  # its frame is fetched


def test_a_recording_plays_until_the_first_prompt(visitor):
    page = visitor.page
    visitor.wait("recorded")
    expect(part(page, "message")).to_contain_text("Recorded on")
    before = page.locator(FRAME).get_attribute("data-step")
    page.wait_for_function(f"document.querySelector('{FRAME}').dataset.step !== '{before}'", timeout=LONG)
    assert page.locator(FRAME).get_attribute("data-mode") == "play"
    visitor.ask("What is 2 + 2?")
    visitor.wait("done")
    assert page.locator(FRAME).get_attribute("data-mode") == "follow"
    expect(part(page, "message")).not_to_contain_text("Recorded")
    assert "hen" not in part(page, "tokens").inner_text()


def test_steps_are_asked_for_again_where_that_failed(browser, unhurried_address):
    visitor = Visitor(browser, unhurried_address)
    page, num_cut = visitor.page, 3

    def cut(route) -> None:
        nonlocal num_cut
        num_cut -= 1
        route.abort() if num_cut >= 0 else route.continue_()

    page.route("**/live/*", cut)
    visitor.ask_for_a_long_answer("Tell me a long story about a fox.")
    visitor.wait("writing")
    shown = f"Number(document.querySelector('{FRAME}').dataset.step)"
    page.wait_for_function(f"{shown} >= 12", timeout=LONG)
    assert num_cut < 0 and page.locator(FRAME).get_attribute("data-status") == "writing"
    page.click("#stop")
    visitor.wait("done")
    steps = trace_of(visitor)
    assert page.evaluate(shown) == len(steps) - 1
    tokens = page.locator("#live .mss-tokens").inner_text()
    assert "".join(tokens.split()) == "".join("".join("".join(step.pieces) for step in steps).split())
    page.context.close()


def test_who_wants_no_motion_sees_the_recordings_end(browser, address):
    calm = Visitor(browser, address, reduced_motion="reduce")
    calm.wait("recorded")
    calm.page.wait_for_selector(f'{FRAME}[data-mode="hold"]', timeout=LONG)
    before = calm.page.locator(FRAME).get_attribute("data-step")
    calm.page.wait_for_timeout(1000)
    assert calm.page.locator(FRAME).get_attribute("data-step") == before != "0"
    calm.page.context.close()


def test_any_step_is_shown_again_as_its_trace_has_it(reader):
    page, steps = reader.page, trace_of(reader)
    assert part(page, "range").get_attribute("max") == str(len(steps) - 1)
    for number in (1, len(steps) // 2, len(steps) - 2):
        go_to(page, number)
        step = steps[number]
        nodes = page.locator("#live .mss-tree g:visible")
        assert nodes.count() == (len(step.tree.parents) if step.tree else 0)
        accepted = page.locator("#live .mss-tree g.mss-on:visible").count()
        assert accepted == sum(step.tree.accepted) - 1
        expect(part(page, "step-label")).to_have_text(f"step {number} of {len(steps) - 1}")
        so_far = steps[1 : number + 1]
        ms = sum(one.draft_ms + one.verify_ms + one.other_ms for one in so_far)
        shown = float(page.locator('#live [data-figure="tokens_per_s"]').inner_text())
        assert shown == pytest.approx(1000 * sum(len(one.token_ids) for one in so_far) / ms, rel=0.02)
    page.locator("#live .mss-newest").click()
    page.wait_for_selector(f'{FRAME}[data-mode="follow"]')


def test_the_scrubber_and_play_work_by_keyboard(reader):
    page = reader.page
    go_to(page, 3)
    part(page, "range").focus()
    page.keyboard.press("ArrowRight")
    page.wait_for_selector(f'{FRAME}[data-step="4"]')
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowLeft")
    page.wait_for_selector(f'{FRAME}[data-step="2"]')
    part(page, "play").focus()
    page.keyboard.press("Enter")
    page.wait_for_selector(f'{FRAME}[data-mode="play"][data-step="4"]', timeout=LONG)
    page.keyboard.press("Enter")
    page.wait_for_selector(f'{FRAME}[data-mode="hold"]')


def test_a_node_tells_its_alternatives_and_what_was_dropped_for_it(reader):
    page, steps = reader.page, trace_of(reader)
    number = max(range(1, len(steps)), key=lambda n: len(steps[n].tree.parents) if steps[n].tree else 0)
    go_to(page, number)
    step, node = steps[number], len(steps[number].tree.parents) - 1
    page.locator(f"#live .mss-tree g[data-node='{node}']").click()
    card = part(page, "card")
    expect(card).to_be_visible()
    parent = step.tree.parents[node]
    for _, _, p in (*step.tree.target_top[parent], *step.tree.draft_top[parent]):
        assert f"{100 * round(p, 4):.1f} %" in card.inner_text()
    rows = card.locator("tr")
    for layer, row in zip(step.layers, range(rows.count()), strict=True):
        ids, weights = unpack_routing(layer, len(step.tree.parents))
        used = {expert for expert, weight in zip(ids[node], weights[node], strict=True) if weight}
        natural = unpack_ids(layer.natural_ids)[node * len(ids[node]) :][: len(ids[node])]
        struck = {int(text) for text in rows.nth(row).locator("del").all_inner_texts()}
        instead = {int(text.strip("→")) for text in rows.nth(row).locator("ins").all_inner_texts()}
        assert struck == set(natural) - used and instead == used - set(natural)
    page.keyboard.press("Escape")
    expect(card).to_be_hidden()


def test_the_tree_is_walked_by_keyboard_and_focus_comes_back(reader):
    page = reader.page
    go_to(page, 2)
    part(page, "tree-room").focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    expect(page.locator("#live .mss-tree .mss-selected")).to_have_attribute("data-node", re.compile(r"[1-9]"))
    page.keyboard.press("Enter")
    expect(part(page, "card")).to_be_visible()
    page.locator("#live .mss-close").focus()
    page.keyboard.press("Escape")
    expect(part(page, "card")).to_be_hidden()
    assert page.evaluate("document.activeElement.className") == "mss-tree-room"


def test_an_expert_tells_which_tokens_used_it(reader):
    page, steps = reader.page, trace_of(reader)
    number = max(range(1, len(steps)), key=lambda n: len(steps[n].tree.parents) if steps[n].tree else 0)
    go_to(page, number)
    step = steps[number]
    row, layer = 5, step.layers[5]
    expert = max(range(64), key=lambda one: layer.score[one] * (one in layer.active))
    box = part(page, "heat").bounding_box()
    width = (box["width"] - 26) / 64
    part(page, "heat").click(position={"x": 26 + (expert + 0.5) * width, "y": (row + 0.5) * box["height"] / 8})
    expect(part(page, "card")).to_contain_text(f"layer {layer.layer}, expert {expert}")
    ids, weights = unpack_routing(layer, len(step.tree.parents))
    routed = [dict(zip(*pair, strict=True)) for pair in zip(ids, weights, strict=True)]
    users = [row for row, weight_of in enumerate(routed) if weight_of.get(expert)]
    marked = page.locator("#live .mss-tree g.mss-user:visible").evaluate_all("all => all.map((g) => +g.dataset.node)")
    assert set(users) <= set(marked) and users
    assert part(page, "layer").input_value() == str(layer.layer), "the tail follows"
    share = layer.score[expert] / sum(layer.score)
    expect(part(page, "card")).to_contain_text(f"{100 * share:.1f}"[:2])


def test_a_token_leads_to_its_step(reader):
    page, steps = reader.page, trace_of(reader)
    written = [n for n, step in enumerate(steps) for _ in step.token_ids]
    place = len(written) // 2
    part(page, "tokens").locator("span").nth(place).click()
    page.wait_for_selector(f'{FRAME}[data-mode="hold"][data-step="{written[place]}"]', timeout=LONG)
    part(page, "tokens").focus()
    page.keyboard.press("ArrowRight")
    expect(part(page, "tip")).to_contain_text("step")
    page.keyboard.press("Enter")
    page.wait_for_selector(f'{FRAME}[data-mode="hold"]')


def test_tokens_are_coloured_by_what_is_asked_for(reader):
    page, steps = reader.page, trace_of(reader)
    tokens = part(page, "tokens").locator("span")
    kinds = tokens.evaluate_all("all => all.map((one) => one.className)")
    assert [kind == "mss-guessed" for kind in kinds] == [origin > 0 for step in steps for origin in step.origins]
    part(page, "colouring").select_option("missing")
    expect(part(page, "tokens").locator("span:not(.mss-level)")).to_have_count(0)  # which are asked for first
    levels = tokens.evaluate_all("all => all.map((one) => one.style.getPropertyValue('--level'))")
    assert len(set(levels)) > 3
    part(page, "colouring").select_option("none")
    assert set(tokens.evaluate_all("all => all.map((one) => one.className)")) == {""}
    assert "".join(tokens.all_text_contents()).startswith("".join(step.text for step in steps))


def test_the_cut_moves_the_budget_of_a_running_answer(watcher):
    page = watcher.page
    watcher.ask_for_a_long_answer("Tell me a long story about a cat.")
    page.wait_for_selector(f'{FRAME}[data-status="writing"][data-budget="16"]', timeout=LONG)
    part(page, "tail").focus()
    for _ in range(3):
        page.keyboard.press("ArrowRight")
    page.wait_for_selector(f'{FRAME}[data-status="writing"][data-budget="19"]', timeout=LONG)
    expect(page.locator("#budget input[type=number]")).to_have_value("19")
    box = part(page, "tail").bounding_box()
    page.mouse.move(box["x"] + box["width"] * 19 / 64, box["y"] + 30)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 24 / 64, box["y"] + 30, steps=3)
    page.mouse.up()
    page.wait_for_selector(f'{FRAME}[data-status="writing"][data-budget="24"]', timeout=LONG)
    page.click("#stop")
    watcher.wait("done")


def test_a_cut_that_was_asked_for_is_not_drawn_on_steps_that_were_made_before(reader):
    page, steps = reader.page, trace_of(reader)
    part(page, "tail").focus()
    page.keyboard.press("ArrowRight")
    expect(part(page, "lost")).to_have_text("the budget is 17 experts from the next step on")
    number = next(n for n, step in enumerate(steps) if step.tree)
    go_to(page, number)
    expect(part(page, "lost")).to_contain_text("natural experts")


def test_the_map_of_the_answer_so_far_is_of_all_its_steps(reader):
    page, steps = reader.page, trace_of(reader)
    part(page, "span").select_option("answer")
    trees = sum(step.kind == "tree" for step in steps)
    expect(part(page, "lost")).to_have_text(f"mean over {trees} steps", timeout=LONG)
    go_to(page, 4)
    trees = sum(step.kind == "tree" for step in steps[:5])
    expect(part(page, "lost")).to_have_text(f"mean over {trees} steps", timeout=LONG)


def test_an_exported_page_replays_offline(reader, browser, tmp_path):
    page, steps = reader.page, trace_of(reader)
    with page.expect_download() as download:
        part(page, "exports").locator("a").nth(1).click()
    download.value.save_as(tmp_path / "answer.html")
    offline = browser.new_context(offline=True).new_page()
    asked, errors = [], []
    offline.on("request", lambda request: asked.append(request.url))
    offline.on("pageerror", lambda error: errors.append(str(error)))
    offline.goto((tmp_path / "answer.html").as_uri())
    assert "".join(offline.locator(".mss-tokens span").all_text_contents()).startswith(steps[-1].summary.text)
    offline.locator(".mss-range").fill("3")
    offline.wait_for_selector('.mss[data-mode="hold"][data-step="3"]')
    expect(offline.locator(".mss-tree g:visible")).to_have_count(len(steps[3].tree.parents))
    offline.locator(".mss-tree g[data-node='1']").click()
    expect(offline.locator(".mss-card")).to_be_visible()
    offline.locator(".mss-span").select_option("answer")
    expect(offline.locator(".mss-lost")).to_contain_text("mean over")
    assert asked == [(tmp_path / "answer.html").as_uri()] and errors == []
    offline.context.close()
