"""Who may import whom: the engine knows no page, the page reaches the engine through one file."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def imports(folder: str) -> list[tuple[Path, str]]:
    """(file, dotted name) of every import below a folder, those inside functions too."""
    found = []
    for path in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path}: imports are absolute"
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            found += [(path.relative_to(ROOT), name) for name in names]
    assert found
    return found


@pytest.mark.parametrize("unknown", ["app", "gradio", "plotly", "tests"])
def test_the_engine_knows_no_page(unknown):
    assert [path for path, name in imports("moespec") if name.split(".")[0] == unknown] == []


def test_only_the_service_runs_the_engine():
    run = [path.name for path, name in imports("app") if name in ("moespec.Engine", "moespec.engine.Engine")]
    assert set(run) == {"service.py", "stepping.py", "loading.py"}


def test_training_is_not_part_of_the_engine():
    outside = [
        path for path, name in imports("moespec") if name.startswith("moespec.train") and "train" not in path.parts
    ]
    assert {path.name for path in outside} <= {"__main__.py", "cli.py"}


def test_the_page_is_composed_without_a_model():
    code = (
        "import sys, app.main; sys.exit('torch.nn' in sys.modules and any('modeling_qwen3' in m for m in sys.modules))"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
