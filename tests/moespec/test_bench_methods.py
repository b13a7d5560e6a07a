"""What `bench methods` compares: settings matched by experts read, rivals of a governor, and its refusals."""

from __future__ import annotations

import argparse
import itertools
import json

import pytest

from moespec import EMBEDDED_TARGET, Engine
from moespec.bench import measure as measure_module
from moespec.bench import methods, methods_cli
from moespec.bench.arms import parse_arm
from moespec.bench.contestants import Written
from moespec.bench.measure import BLOCK, ArmMeasurements, BenchPrompt
from moespec.bench.methods import families, groups, matched_arms
from moespec.bench.rivals import governor_ratios
from moespec.bench.timed import Timed
from moespec.policies.profiles import EMBEDDED_PROFILES
from tests.conftest import tiny_model


@pytest.fixture(scope="module")
def engine():
    return Engine.from_pretrained(EMBEDDED_TARGET)


def test_every_group_has_arms_of_different_names_and_plain_decoding_to_be_held_against():
    matched = [parse_arm(setting, EMBEDDED_PROFILES) for family in families(8, 64) for setting in family.settings]
    found = groups(matched, [0.7, 0.9])
    for arms in found.values():
        assert len({arm.key for arm in arms}) == len(arms)
        assert [arm.name for arm in arms].count("plain") == 1
    assert {arm.name for arm in found["lossless"]} == {"plain", "eagle3", "evict", "cascade-like", "utility"}
    assert not any(arm.is_lossy for arm in found["lossless"])
    governed = [arm for arm in found[methods.FLOORED] if arm.governor != "fixed"]
    assert [(arm.governor, arm.is_lossy) for arm in governed] == [
        ("utility:floor=0.7", True),
        ("utility:floor=0.9", True),
    ]
    assert set(matched) < set(found[methods.MATCHED])


@pytest.mark.parametrize("wanted", [8, 11.3, 12, 20, 40])
def test_each_method_is_matched_at_the_nearest_of_its_settings(engine, monkeypatch, wanted):
    """Read experts are planted: they rise along each family's settings, each in its own way."""
    planted = {
        setting: 8 + (place + 1) ** 1.3 * (1 + len(family.name)) / 9
        for family in families(8, 64)
        for place, setting in enumerate(family.settings)
    }
    monkeypatch.setattr(methods, "_num_read", lambda engine, arm, prompts: planted[arm.name])
    arms = list(matched_arms(engine, wanted, [], EMBEDDED_PROFILES, lambda line: None))
    assert len(arms) == len(families(8, 64))
    for arm, family in zip(arms, families(8, 64), strict=True):
        best = min(family.settings, key=lambda setting: abs(planted[setting] - wanted))
        assert abs(planted[arm.name] - wanted) == pytest.approx(abs(planted[best] - wanted))


def test_what_a_setting_reads_is_what_its_steps_read(engine):
    read = methods._num_read(engine, parse_arm("moe-spec:b=9@16,5,4,0"), [engine.encode("Tell me a story.")])
    assert 8 <= read <= 9


TREE = "@16,8,3,0.02"


def measured(name: str, speeds: list[int], mass: float = 1.0) -> ArmMeasurements:
    class Summary:
        mass_kept = mass

    timed = [Timed(speed, 1.0) for speed in speeds]
    return ArmMeasurements(parse_arm(name), timed, [[one] for one in timed], [Summary()] * len(speeds))


def test_a_governor_is_held_against_the_fastest_setting_it_might_have_chosen():
    prompts = [BenchPrompt(name, "", []) for name in ("tasks-0", "tasks-1", "prose-0", "prose-1")]
    found = governor_ratios(
        [
            measured("plain", [100, 100, 100, 100]),
            measured("eagle3@16,8,3,0.2", [200, 200, 50, 50]),
            measured("eagle3@4,3,3,0", [90, 90, 120, 120]),
            measured("moe-spec:b=16@16,8,3,0.2", [300, 300, 300, 300], mass=0.8),
            measured("moe-spec:b=8@16,8,3,0.2", [900, 900, 900, 900], mass=0.5),
            measured(f"utility{TREE}", [190, 190, 114, 114]),
            measured(f"utility:floor=0.7{TREE}", [330, 330, 300, 300]),
        ],
        prompts,
    )
    by_place = {(row["governor"], row["class"]): row for row in found}
    lossless = by_place[f"utility{TREE}", "tasks"], by_place[f"utility{TREE}", "prose"]
    assert [row["best_afterwards"] for row in lossless] == ["eagle3@16,8,3,0.2", "eagle3@4,3,3,0"]
    assert [row["to_best_afterwards"]["ratio"] for row in lossless] == [0.95, 0.95]
    assert [row["to_plain"]["ratio"] for row in lossless] == [1.9, 1.14]
    floored = by_place[f"utility:floor=0.7{TREE}", "tasks"]
    assert floored["best_afterwards"] == "moe-spec:b=16@16,8,3,0.2"  # b=8 keeps too little
    assert floored["to_best_afterwards"]["ratio"] == 1.1


def entry(name: str, speeds: list[int]) -> ArmMeasurements:
    """Three prompts that are answered at these speeds, round by round."""
    return ArmMeasurements(parse_arm(name), rounds=[[Timed(speed, 1.0) for speed in speeds]] * 3)


def test_a_prompt_is_held_against_what_a_sweep_finds_on_others_of_all_sources():
    """Two sources in turn, of which the first two settings like one each; a third was lucky with a single prompt.

    Afterwards it is the best: 106.875. A sweep over three quarters, with as much of both sources, finds it only where
    the lucky prompt is among them, and then gets 85 for the six others; for that prompt and one of the other source it
    finds the first setting, and gets 130 and 70: 88.75 in the mean.
    """
    prompts = [BenchPrompt(f"tasks-{n}", "ab"[n % 2], []) for n in range(8)]
    speeds = [
        ("plain", [50] * 8),
        ("eagle3@4,3,1,0", [130, 70] * 4),
        ("eagle3@4,3,3,0", [70, 130] * 4),
        ("eagle3@5,4,1,0", [260, *[85] * 7]),
        (f"utility{TREE}", [100] * 8),
    ]
    entries = [ArmMeasurements(parse_arm(name), rounds=[[Timed(n, 1.0)] * 3 for n in each]) for name, each in speeds]
    of_all, of_tasks = governor_ratios(entries, prompts)
    assert of_all | {"class": "tasks"} == of_tasks
    assert of_all["best_afterwards"] == "eagle3@5,4,1,0"
    assert of_all["to_best_afterwards"]["ratio"] == pytest.approx(100 / 106.875, abs=1e-3)
    assert of_all["to_best_fixed"]["ratio"] == pytest.approx(100 / 88.75, abs=1e-3)
    assert of_all["to_plain"]["ratio"] == 2.0


def test_of_a_few_prompts_a_sweep_tells_nothing():
    entries = [measured(name, [50] * 3) for name in ("plain", f"utility{TREE}")]
    assert [row["to_best_fixed"] for row in governor_ratios(entries, [BenchPrompt("code-0", "", [])] * 3)] == [None] * 2


def test_a_machine_that_became_twice_as_fast_between_two_arms_decides_nothing():
    """Slow in two rounds and fast in two; in the middle one it was slow for the one, and fast for the other."""
    prompts = [BenchPrompt(f"tasks-{n}", "", []) for n in range(3)]
    entries = [
        entry("plain", [50, 50, 50, 100, 100]),
        entry("eagle3@4,3,1,0", [100, 100, 100, 200, 200]),
        entry(f"utility{TREE}", [96, 96, 192, 192, 192]),
    ]
    of_all, _ = governor_ratios(entries, prompts)
    assert of_all["to_best_afterwards"]["ratio"] == pytest.approx(0.96)


def test_of_an_even_number_of_rounds_both_middle_ones_count():
    """Ratios of 0.5, 0.9, 1.1 and 2: of 90 to 100 and 110 to 100, together 1, not the lower one's 0.9."""
    prompts = [BenchPrompt(f"tasks-{n}", "", []) for n in range(3)]
    entries = [
        entry("plain", [100, 100, 100, 100]),
        entry("eagle3@4,3,1,0", [100, 100, 100, 100]),
        entry(f"utility{TREE}", [50, 90, 110, 200]),
    ]
    of_all, _ = governor_ratios(entries, prompts)
    assert of_all["to_best_afterwards"]["ratio"] == of_all["to_plain"]["ratio"] == 1.0


@pytest.mark.parametrize(
    ("options", "groups_measured"),
    [
        ([], ["lossless", "with a floor of mass", "at matched experts"]),
        (["--only", "lossless"], ["lossless"]),
        (["--only", "floors"], ["with a floor of mass"]),
        (["--only", "matched"], ["at matched experts"]),
    ],
)
def test_one_group_can_be_measured_by_itself(engine, monkeypatch, capsys, options, groups_measured):
    """Nothing is timed."""
    monkeypatch.setattr(methods_cli, "matched_arms", lambda *asked: iter([parse_arm("moe-spec:b=12@16,5,4,0")]))
    monkeypatch.setattr(methods_cli, "_exact_match", lambda *asked: {})
    monkeypatch.setattr(methods_cli, "measure", lambda contestants, arms, *asked: [*map(ArmMeasurements, arms)])
    monkeypatch.setattr(methods_cli, "_record", lambda measured, scores: {"key": measured.arm.key})
    monkeypatch.setattr(methods_cli, "governor_ratios", lambda measured, prompts: [])
    parser = argparse.ArgumentParser()
    methods_cli.add_arguments(parser)
    asked = parser.parse_args(["--json", "--limit", "3", "--floors", "0.7", *options])
    asked.target, asked.profiles, asked.revision = EMBEDDED_TARGET, None, None
    methods_cli.bench_methods(engine, EMBEDDED_TARGET, asked)
    record = json.loads(capsys.readouterr().out)
    assert [group["name"] for group in record["groups"]] == groups_measured
    assert (record["matched"] is not None) == ("at matched experts" in groups_measured)


@pytest.mark.parametrize(
    ("option", "sentence"),
    [
        (["--experts", "4"], "experts=4 is outside 8 to 64"),
        (["--follow", "0"], "follow=0 is not allowed"),
        (["--rounds", "0"], "rounds=0 is not allowed"),
        (["--max-new-tokens", "1"], "max-new-tokens=1 is not allowed"),
        (["--questions", "-1"], "questions=-1 is not allowed"),
        (["--floors", "0.7", "1.2"], "floors=1.2 is not allowed"),
    ],
)
def test_what_cannot_be_measured_is_refused(engine, option, sentence):
    parser = argparse.ArgumentParser()
    methods_cli.add_arguments(parser)
    with pytest.raises(ValueError, match=sentence):
        methods_cli.bench_methods(engine, EMBEDDED_TARGET, parser.parse_args(option))


def test_a_drafter_is_needed():
    engine = Engine.from_model(tiny_model("olmoe"))
    parser = argparse.ArgumentParser()
    methods_cli.add_arguments(parser)
    with pytest.raises(ValueError, match="give it a drafter"):
        methods_cli.bench_methods(engine, EMBEDDED_TARGET, parser.parse_args([]))


def test_arms_take_turns_at_blocks_and_the_first_answer_of_each_only_prepares():
    asked: list[tuple[str, int]] = []

    class Quick:
        def write(self, arm, prompt_ids):
            asked.append((arm.key, prompt_ids[0]))
            return Written([7, 8], Timed(1, float(len(asked))))

    arms = [parse_arm(name) for name in ("plain", "eagle3@4,3,1,0", "eagle3@9,8,1,0.1")]
    prompts = [BenchPrompt(f"tasks-{n}", "", [n]) for n in range(BLOCK + 3)]
    entries = [ArmMeasurements(arm) for arm in arms]
    texts = measure_module._measure_speed(Quick(), entries, prompts, 2, lambda line: None)
    turns = [list(group) for _, group in itertools.groupby(asked, key=lambda one: one[0])]
    first, second = [*range(BLOCK)], [*range(BLOCK, BLOCK + 3)]
    assert [[place for _, place in turn] for turn in turns] == ([[0, *first]] * 3 + [[BLOCK, *second]] * 3) * 2
    assert len({turns[n][0][0] for n in (0, 3, 9)}) == 3, "nobody is always first"
    for entry in entries:
        assert len(entry.timed) == len(prompts) and texts[entry.arm.key] == [[7, 8]] * len(prompts)
        began = [n for n, (key, _) in enumerate(asked) if key == entry.arm.key and (n == 0 or asked[n - 1][0] != key)]
        assert not {float(n + 1) for n in began} & {timed.seconds for timed in entry.timed}
