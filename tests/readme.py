"""Tables of README.md that tests write: a block between two markers must be what the tests have found.

With MOESPEC_WRITE_TABLES=1 in the environment a block that differs is rewritten instead of failing its test. Knows
nothing of what is in a block.
"""

from __future__ import annotations

import os
from pathlib import Path

README = Path(__file__).parent.parent / "README.md"


def assert_block(name: str, text: str, path: Path = README) -> None:
    """Between `<!-- name -->` and `<!-- /name -->` stands `text`, ends of lines around it aside."""
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    page = path.read_text(encoding="utf-8")
    assert page.count(begin) == page.count(end) == 1, f"{path.name} needs one {begin} and one {end}"
    before, rest = page.split(begin)
    assert end in rest, f"{path.name} has {end} before {begin}"
    found, after = rest.split(end)
    if found.strip() == text.strip():
        return
    assert os.environ.get("MOESPEC_WRITE_TABLES") == "1", (
        f"{path.name} differs from what the tests have found; MOESPEC_WRITE_TABLES=1 rewrites it.\n"
        f"--- in {path.name}\n{found.strip()}\n--- found\n{text.strip()}"
    )
    path.write_text(f"{before}{begin}\n{text.strip()}\n{end}{after}", encoding="utf-8")
