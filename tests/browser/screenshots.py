"""Takes the pictures of the README, page and committed frontier: `python -m tests.browser.screenshots`."""

from __future__ import annotations

import json

from playwright.sync_api import Page

from moespec.trace_reading import read_step
from tests.browser.browser import ROOT, open_browser, serve_page

FOLDER = ROOT / "assets" / "screenshots"
SIZES = {1440: 900, 390: 844}
PROMPTS = ("Tell me a short story.",)
FRAME = "#live .mss"
FRONTIER = ROOT / "assets" / "bench" / "frontier-cpu.html"


def widest_step(page: Page, address: str) -> int:
    """The step of the answer with the most guesses: the last one of an answer seldom has many."""
    link = page.locator("#live .mss-exports a").first.get_attribute("href")
    lines = page.request.get(f"{address}/{link}").text().strip().split("\n")[1:]
    steps = [read_step(json.loads(line)) for line in lines]
    return max(range(len(steps)), key=lambda n: len(set(steps[n].tree.parents)) if steps[n].tree else 0)


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    with serve_page() as address, open_browser() as browser:
        page = browser.new_page(viewport={"width": 1100, "height": 620})
        page.goto(FRONTIER.as_uri())
        page.locator(".main-svg").first.wait_for()
        page.screenshot(path=FOLDER / "frontier.png")
        page.close()
        for theme in ("light", "dark"):
            for width, height in SIZES.items():
                page = browser.new_context(viewport={"width": width, "height": height}).new_page()
                page.goto(f"{address}/?__theme={theme}")
                page.get_by_text("measured here").wait_for(timeout=60_000)
                for number, prompt in enumerate(PROMPTS, start=1):
                    page.fill("#prompt textarea", prompt)
                    page.press("#prompt textarea", "Enter")
                    answered = f"document.querySelectorAll('#chat .bot').length >= {number}"
                    page.wait_for_function(answered, timeout=60_000)
                    page.wait_for_selector(f'{FRAME}[data-status="done"]', timeout=60_000)
                    page.wait_for_timeout(1000)
                page.locator("#live .mss-range").fill(str(widest_step(page, address)))
                page.wait_for_timeout(800)
                page.screenshot(path=FOLDER / f"{theme}-{width}.png", full_page=width < 700)
                page.context.close()


if __name__ == "__main__":
    main()
