"""A visitor of the page: their own browser context, and what they do and see there."""

from __future__ import annotations

from typing import Any

from playwright.sync_api import Page, expect

LONG = 60_000  # ms; the machine may be busy
expect.set_options(timeout=LONG)
FRAME = "#live .mss"


class Visitor:
    """A page of its own, with everything that went wrong on it and every address it asked for."""

    def __init__(self, browser, address: str, width: int = 1440, height: int = 900, **context: Any) -> None:
        self.address = address
        self.page: Page = browser.new_context(viewport={"width": width, "height": height}, **context).new_page()
        self.errors: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda message: self.errors.append(message.text) if message.type == "error" else None)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(address)
        expect(self.page.locator("#device")).to_contain_text("experts", timeout=LONG)

    def ask(self, text: str) -> None:
        self.page.fill("#prompt textarea", text)
        self.page.press("#prompt textarea", "Enter")

    def wait(self, *statuses: str) -> None:
        """Until the panels are in one of these."""
        self.page.wait_for_selector(", ".join(f'{FRAME}[data-status="{one}"]' for one in statuses), timeout=LONG)

    def ask_for_a_long_answer(self, text: str, num_tokens: int = 2048) -> None:
        """One that is not finished before the next lines of a test: ask it of an unhurried page."""
        self.page.get_by_role("tab", name="How to write").click()
        field = self.page.get_by_label("number input for Maximum new tokens")
        field.fill(str(num_tokens))
        field.press("Tab")
        self.page.get_by_label("Keep writing").check()
        self.page.get_by_role("tab", name="How much to load").click()
        self.ask(text)

    def reload(self, page: Page) -> None:
        """Again from the server. What is cut by it is complained of by the page that ends."""
        page.reload()
        self.errors.clear()

    def set_budget(self, budget: int) -> None:
        field = self.page.get_by_label("number input for Experts per layer")
        field.fill(str(budget))
        field.press("Tab")

    @property
    def answer(self) -> str:
        return self.page.locator("#chat .bot").last.inner_text()
