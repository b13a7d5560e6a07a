"""What a process's other parts may do without a step noticing, and steps that leave their process."""

from __future__ import annotations

import pickle
import platform
import subprocess
import sys

import pytest
import torch

from moespec import EMBEDDED_TARGET, BudgetConfig, Engine, GenerationConfig, StepTrace, TreeConfig
from tests.conftest import tiny_model

PROMPT = [5, 6, 7, 8, 5, 6, 7]


@pytest.fixture(scope="module", params=["auto", "ngram"])
def engine(request):
    """Compiled with its head, and a tiny one through the model's own modules with look-up."""
    if request.param == "ngram":
        return Engine.from_model(tiny_model("mixtral"), drafter="ngram", backend="reference")
    return Engine.from_pretrained(EMBEDDED_TARGET)


def steps(engine: Engine, generation: GenerationConfig, budget: BudgetConfig) -> list[StepTrace]:
    engine.forget()
    return list(engine.generate(PROMPT, generation, budget, TreeConfig()))


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("budget", [BudgetConfig(), BudgetConfig(5, row_weight="path"), BudgetConfig(coverage=0.8)])
def test_steps_do_not_depend_on_torchs_default_dtype(engine, temperature, budget):
    """transformers changes it for all threads while it builds a model."""
    generation = GenerationConfig(max_new_tokens=24, ignore_eos=True, temperature=temperature)

    def written() -> list[tuple]:
        return [(step.token_ids, step.tree, step.layers) for step in steps(engine, generation, budget)]

    expected = written()
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert written() == expected
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_pickled_step_has_its_tree_and_layers(engine):
    for step in steps(engine, GenerationConfig(max_new_tokens=24, ignore_eos=True), BudgetConfig(budget=5)):
        copy = pickle.loads(pickle.dumps(step))
        assert copy == step and copy.to_json() == step.to_json()
    assert copy.summary is not None


WRITTEN_BY = """
import numba
from moespec import EMBEDDED_TARGET, BudgetConfig, Engine, GenerationConfig
from moespec.native import share_work
{first}
steps = list(Engine.from_pretrained(EMBEDDED_TARGET).generate("Hello", GenerationConfig(24), BudgetConfig(12)))
print(numba.threading_layer(), [(step.token_ids, step.tree.target_top) for step in steps if step.tree])
"""


@pytest.mark.skipif(
    (sys.platform, platform.machine()) != ("linux", "x86_64"), reason="TBB is a requirement there alone"
)
def test_threads_that_share_their_work_write_the_same():
    """By TBB, to the last digit of a trace. Each in a process of its own: threads are chosen once."""
    scripts = [WRITTEN_BY.format(first=first) for first in ("share_work()", "")]
    run = [subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=True) for text in scripts]
    shared, own = (found.stdout.split(" ", 1) for found in run)
    assert (shared[0], own[0]) == ("tbb", "omp") and shared[1] == own[1]
