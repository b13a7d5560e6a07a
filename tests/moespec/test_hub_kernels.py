"""With the PyPI distribution `kernels` installed, transformers would take our package for it: models still load."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LOAD = "import transformers.models.qwen3_moe.modeling_qwen3_moe"
USE = (
    "from moespec import Engine, GenerationConfig\n"
    "from tests.conftest import tiny_model\n"
    "engine = Engine.from_model(tiny_model('qwen3_moe'), drafter='ngram')\n"
    "print(len([*engine.generate([1, 2, 3], GenerationConfig(max_new_tokens=5))][-1].summary.token_ids))"
)


@pytest.fixture
def run_beside_kernels(tmp_path):
    """Run a program where a distribution named kernels is installed whose module is as empty as ours."""
    metadata = tmp_path / "kernels-0.18.2.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: kernels\nVersion: 0.18.2\n")
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}

    def run(program: str) -> subprocess.CompletedProcess:
        return subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)

    return run


def test_the_engine_runs(run_beside_kernels):
    done = run_beside_kernels(USE)
    assert done.stdout.strip() == "5", done.stderr


def test_without_our_door_it_would_not(run_beside_kernels):
    done = run_beside_kernels(LOAD)
    assert done.returncode != 0 and "kernels" in done.stderr
