"""The pages, the browser and the visitors of the browser tests."""

from __future__ import annotations

import pytest

from tests.browser.browser import open_browser, serve_page
from tests.browser.visitor import Visitor


@pytest.fixture(scope="session")
def address():
    with serve_page() as url:
        yield url


@pytest.fixture(scope="session")
def unhurried_address():
    with serve_page("tests/browser/unhurried.py") as url:
        yield url


@pytest.fixture(scope="module")
def browser():
    with open_browser() as opened:
        yield opened


def a_visit(browser, address: str):
    seen = Visitor(browser, address)
    yield seen
    seen.page.context.close()
    assert seen.errors == []
    elsewhere = [url for url in seen.requests if not url.startswith((address, "data:", "blob:"))]
    assert elsewhere == [], "the page asks no other host for anything"


@pytest.fixture
def visitor(browser, address):
    yield from a_visit(browser, address)


@pytest.fixture
def watcher(browser, unhurried_address):
    """Who has time to act while an answer is written."""
    yield from a_visit(browser, unhurried_address)
