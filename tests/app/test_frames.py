"""What the panels are sent, against the trace that it projects."""

from __future__ import annotations

import base64
import json
import struct

import numpy as np
import pytest

from app.live import added_frame, opened
from app.live.frames import (
    ACTIVE,
    KEPT,
    MASS_STEPS,
    MOST,
    NATURAL,
    SEPARATOR,
    Sums,
    detailed_frame,
    token_facts,
    written,
)
from app.live.live import steps_between
from app.recordings import Recordings
from app.settings import Settings
from moespec import EMBEDDED_TARGET, Engine
from moespec.trace import unpack_routing

HOSTILE = "<script>alert(1)</script> **bold** \x1f\x00\x1b[31m ünïcödé 🙂"


@pytest.fixture(scope="module")
def engine():
    return Engine.from_pretrained(EMBEDDED_TARGET)


def answer(engine, prompt=HOSTILE, **changes):
    settings = Settings.from_json(
        {"budget": 16, "total_tokens": 16, "max_new_tokens": 40, "ignore_eos": True} | changes
    )
    asked = settings.generation_config, settings.budget_config, settings.tree_config
    messages = [{"role": "user", "content": prompt}]
    return engine.header(messages, *asked), list(engine.generate(messages, *asked))


def unpacked(kind: str, packed: str) -> list[int]:
    data = base64.b64decode(packed)
    return list(struct.unpack(f"<{len(data) // struct.calcsize(kind)}{kind}", data))


def test_a_frame_says_what_the_trace_says_in_under_5_kb(engine):
    _, steps = answer(engine)
    text = written(steps)
    token_ids = [token for step in steps for token in step.token_ids]
    assert text["tokens"].replace(SEPARATOR, "") == engine.target.tokenizer.decode(token_ids)
    assert text["tokens"].count(SEPARATOR) == 40 and text["origins"] == "".join(
        str(origin) for step in steps for origin in step.origins
    )
    for step in (one for one in steps if one.kind == "tree"):
        frame = added_frame(step.step, [step])
        cells = iter(unpacked("H", frame["now"]["layers"]["cells"]))
        for layer in step.layers:
            for expert in range(64):
                value = next(cells)
                expected = [expert in members for members in (layer.natural, layer.kept, layer.active)]
                assert [bool(value & bit) for bit in (NATURAL, KEPT, ACTIVE)] == expected
                share = layer.score[expert] / sum(layer.score)
                assert (value >> 3) / MASS_STEPS == pytest.approx(share, abs=1 / MASS_STEPS)
        assert len(json.dumps(frame)) < 5000


def test_parts_of_an_answer_make_the_whole(engine):
    _, steps = answer(engine, temperature=0.9)
    parts = [added_frame(first, steps[first:last]) for first, last in ((0, 1), (1, 4), (4, 4), (4, len(steps)))]
    assert "".join(part["text"] for part in parts) == steps[-1].summary.text
    for name, whole in written(steps).items():
        assert "".join(part[name] for part in parts) == whole
    assert [(part["first"], part["is_end"]) for part in parts] == [(0, False), (1, False), (4, False), (4, True)]
    trees = [number for number, step in enumerate(steps) if step.kind == "tree"]
    newest = [0, max(number for number in trees if number < 4), None, max(trees)]
    assert [part["now"] and part["now"]["step"] for part in parts] == newest


def test_a_tokens_facts_are_of_the_row_that_chose_it(engine):
    _, steps = answer(engine, budget=8)
    seen_bonus = seen_missing = 0
    for step in steps:
        facts = token_facts(step)
        assert len(facts) == len(step.token_ids)
        if step.tree is None:
            continue
        tree, row = step.tree, 0
        for token, origin, fact in zip(step.token_ids, step.origins, facts, strict=True):
            target = {one[0]: one[2] for one in tree.target_top[row]}
            drafter = [one[0] for one in tree.draft_top[row]]
            assert int(fact[0], 36) == origin
            assert int(fact[1:3], 36) == tree.missing[row]
            by_layer = [int(digit, 36) for digit in fact[8:]]
            assert len(by_layer) == (len(step.layers) if tree.missing[row] else 0)
            assert sum(by_layer) == tree.missing[row]
            for count, layer in zip(by_layer, step.layers, strict=False):
                assert count == 0 or len(layer.natural) > len(layer.kept), "nothing was dropped there"
            assert (int(fact[5:7], 36) - 1) / (MOST - 1) == pytest.approx(target[token], abs=1e-3)
            assert int(fact[7], 36) == (drafter.index(token) + 1 if token in drafter else 0)
            seen_missing += tree.missing[row] > 0
            if origin:
                row = next(n for n, parent in enumerate(tree.parents) if parent == row and tree.token_ids[n] == token)
                assert (int(fact[3:5], 36) - 1) / (MOST - 1) == pytest.approx(tree.draft_p[row], abs=1e-3)
            else:
                seen_bonus += 1
    assert seen_bonus > 3 and seen_missing > 3


def test_the_time_line_adds_up_to_the_summary(engine):
    _, steps = answer(engine)
    entries = [entry.split(",") for entry in written(steps)["series"].split(";")[:-1]]
    summary = steps[-1].summary
    decoded, trees = entries[1:], [entry for entry in entries if entry[0] == "tr"]
    num_tokens = sum(int(entry[1]) for entry in decoded)
    ms = sum(float(value) for entry in decoded for value in entry[6:9])
    assert 1000 * num_tokens / ms == pytest.approx(summary.tokens_per_s, rel=0.01)
    mean = [sum(float(entry[n]) for entry in trees) / len(trees) for n in (3, 4, 5)]
    expected = [summary.experts_natural, summary.experts_active, summary.mass_kept]
    assert mean == pytest.approx(expected, rel=0.01)
    assert {entry[9] for entry in trees} == {"16"} and entries[-1][10] == "0"


def test_details_are_every_rows_routing(engine):
    _, steps = answer(engine, policy="truncation", budget=8)
    step = max((one for one in steps if one.kind == "tree"), key=lambda one: len(one.tree.parents))
    details = detailed_frame(step)["details"]
    num_rows = len(step.tree.parents)
    ids, natural = (np.reshape(unpacked("H", details[name]), (8, num_rows, 8)) for name in ("ids", "natural"))
    weights = np.reshape(unpacked("B", details["weights"]), (8, num_rows, 8))
    missing = np.zeros(num_rows, dtype=int)
    for number, layer in enumerate(step.layers):
        ids_TK, weights_TK = unpack_routing(layer, num_rows)
        assert ids[number].tolist() == ids_TK.tolist()
        assert weights[number] / 255 == pytest.approx(weights_TK.astype(float), abs=0.004)
        for row in range(num_rows):
            used = {int(e) for e, w in zip(ids[number, row], weights[number, row], strict=True) if w}
            assert used <= set(layer.active)
            missing[row] += len(set(natural[number, row].tolist()) - used)
        assert {int(expert) for expert in natural[number].ravel()} == set(layer.natural)
    assert missing.tolist() == step.tree.missing and missing.sum() > 0


def test_sums_are_means_over_tree_steps_however_they_are_gathered(engine):
    _, steps = answer(engine)
    whole, bit_by_bit = Sums(), Sums()
    whole.extend(steps)
    for step in steps:
        bit_by_bit.extend([step])
    found = whole.to_json()
    assert found == bit_by_bit.to_json() and Sums().to_json() is None
    trees = [step for step in steps if step.kind == "tree"]
    shares = np.mean([np.array(t.layers[3].score) / sum(t.layers[3].score) for t in trees], axis=0)
    mass = np.reshape(unpacked("H", found["mass"]), (8, 64))[3] / 65535
    assert mass == pytest.approx(shares, abs=1e-4)
    read = [np.mean([expert in t.layers[3].active for t in trees]) for expert in range(64)]
    assert np.reshape(unpacked("B", found["active"]), (8, 64))[3] / 255 == pytest.approx(read, abs=0.003)
    assert found["num_steps"] == len(trees)


def test_an_opened_recording_is_whole_and_its_steps_come_in_blocks(engine):
    header, steps = answer(engine, max_new_tokens=64)
    recording = Recordings().begin(header)
    recording.steps += steps
    frame = opened(recording, "opened", "message", "title")
    assert frame["series"].count(";") == len(steps) and "now" not in frame
    assert [one["step"] for one in steps_between(recording, 2, 5)] == [2, 3, 4]
    assert steps_between(recording, len(steps), 10**9) == []
    assert len(steps_between(recording, 0, 10**9)) == min(len(steps), 64)
