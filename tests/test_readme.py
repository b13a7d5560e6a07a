"""The blocks that tests keep in README.md: compared by default, rewritten when asked."""

from __future__ import annotations

import pytest

from tests.readme import assert_block

PAGE = "# Title\n\n<!-- heads -->\n| a |\n<!-- /heads -->\n\nafter\n"


@pytest.fixture
def page(tmp_path, monkeypatch):
    monkeypatch.delenv("MOESPEC_WRITE_TABLES", raising=False)
    path = tmp_path / "README.md"
    path.write_text(PAGE)
    return path


def test_a_block_that_differs_fails_and_stays(page):
    assert_block("heads", "| a |\n", page)
    with pytest.raises(AssertionError, match="MOESPEC_WRITE_TABLES=1 rewrites it"):
        assert_block("heads", "| b |", page)
    assert page.read_text() == PAGE


def test_a_block_is_rewritten_when_asked_and_nothing_else(page, monkeypatch):
    monkeypatch.setenv("MOESPEC_WRITE_TABLES", "1")
    assert_block("heads", "| b |\n| c |\n", page)
    assert page.read_text() == PAGE.replace("| a |", "| b |\n| c |")


@pytest.mark.parametrize("text", ["", PAGE + PAGE, "<!-- /heads -->\n<!-- heads -->\n"])
def test_a_page_without_the_markers_is_an_error_also_when_asked_to_write(page, monkeypatch, text):
    monkeypatch.setenv("MOESPEC_WRITE_TABLES", "1")
    page.write_text(text)
    with pytest.raises(AssertionError, match=r"needs one <!-- heads -->|before"):
        assert_block("heads", "| b |", page)
