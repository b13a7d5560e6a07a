"""Takes the README's pictures of the running page: `python -m tests.browser.screenshots`."""

from __future__ import annotations

from tests.browser.browser import ROOT, open_browser, serve_page

FOLDER = ROOT / "assets" / "screenshots"
SIZES = {1440: 900, 390: 844}
FRAME = "#live .mss"


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    with serve_page() as address, open_browser() as browser:
        for theme in ("light", "dark"):
            for width, height in SIZES.items():
                page = browser.new_context(viewport={"width": width, "height": height}).new_page()
                page.goto(f"{address}/?__theme={theme}")
                page.get_by_text("measured here").wait_for(timeout=60_000)
                page.fill("#prompt textarea", "Tell me a short story.")
                page.press("#prompt textarea", "Enter")
                # Half-way through the answer, at a step whose tree held.
                page.wait_for_function("document.querySelectorAll('.mss-tokens span').length > 40", timeout=60_000)
                page.click("#stop")
                page.wait_for_selector(f'{FRAME}[data-status="done"]', timeout=60_000)
                page.wait_for_timeout(500)
                page.screenshot(path=FOLDER / f"{theme}-{width}.png", full_page=width < 700)
                page.context.close()


if __name__ == "__main__":
    main()
