"""The table of what steps cost here, kept between starts, and when it is measured anew.

Owns where it is kept and whether it still holds. How steps are measured is `profile.py`'s.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import statistics
import tempfile
from pathlib import Path

from moespec.config import TreeConfig
from moespec.cost_table import CostTable, Spread
from moespec.engine import Engine
from moespec.profile import BRANCHING, DEPTH, PLAIN, Kind, costs_key, measure_costs, run_rounds

STEADY = 0.1  # median held-out error; two quiet cores gave 0.03
# By how much plain steps may have changed, and what a tree costs in plain steps: as a factor, and drafting by itself in
# plain steps. On one machine it fell from 0.91 to 0.65 of them, and they from 3.1 to 1.4 ms, when its guests had gone.
SAME_SPEED, SAME_SHAPE, SAME_DRAFTING = 1.5, 1.2, 0.15
PROBED_ROWS, NUM_PROBES = (6, 16), 6  # trees, and rounds: 0.3 seconds of the embedded pair


def profile_costs(engine: Engine, seconds: float = 10.0) -> CostTable:
    """The table of this pair on this machine: the engine's, the one kept from an earlier start, or measured now.

    A table that does not predict its own points within `STEADY` was measured while something else held the machine: it
    is used, but not kept. A kept file that cannot be read, or is of another pair, machine or version, or of the machine
    as it no longer is (`still_holds`), is measured anew.
    ValueError where there is no drafter, or none that drafts anything.
    """
    if engine.costs is None:
        engine.costs = _kept_or_measured(engine, seconds)
    return engine.costs


def _kept_or_measured(engine: Engine, seconds: float) -> CostTable:
    about = costs_key(engine)
    path = cache_folder() / f"costs-{hashlib.sha256(repr(about).encode()).hexdigest()[:16]}.json"
    with contextlib.suppress(OSError, ValueError):
        table = CostTable.load(path)
        if table.about == about and still_holds(engine, table):
            return table
    table = measure_costs(engine, seconds)
    if table.held_out_error <= STEADY:
        with contextlib.suppress(OSError):  # nowhere to keep it: measured again next time
            path.parent.mkdir(parents=True, exist_ok=True)
            _replace(path, table)
    return table


def cache_folder() -> Path:
    """$XDG_CACHE_HOME/moespec-studio, or ~/.cache/moespec-studio."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moespec-studio"


def still_holds(engine: Engine, table: CostTable) -> bool:
    """Whether plain steps and two sizes of trees cost now what the table says. The conversation is forgotten."""
    kinds = [Kind(TreeConfig(rows, DEPTH, BRANCHING, 0), None) for rows in PROBED_ROWS]
    found, _ = run_rounds(engine, kinds, NUM_PROBES)
    plain_ms = Spread.of(step.verify_ms + step.other_ms for step in found[PLAIN]).p20
    holds = 1 / SAME_SPEED < plain_ms / table.plain_ms < SAME_SPEED
    for kind in kinds:
        steps = [step for step in found[kind] if step.tree is not None]  # look-up does not always find something
        if steps:
            num_rows = statistics.median(len(step.tree.parents) for step in steps if step.tree)
            draft = Spread.of(step.draft_ms for step in steps).p20 / plain_ms
            rest = Spread.of(step.verify_ms + step.other_ms for step in steps).p20 / plain_ms
            said = table.predict_ms(num_rows, None) / table.plain_ms
            holds &= abs(draft - table.draft_ms(DEPTH, BRANCHING) / table.plain_ms) < SAME_DRAFTING
            holds &= 1 / SAME_SHAPE < rest / said < SAME_SHAPE
    return holds


def _replace(path: Path, table: CostTable) -> None:
    """Written beside and moved: whoever reads meanwhile finds a whole file."""
    handle, beside = tempfile.mkstemp(dir=path.parent)
    os.close(handle)
    table.save(Path(beside))
    os.replace(beside, path)
