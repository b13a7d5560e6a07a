"""Which drafter an engine gets and what it says of it: beside the target, by name, from the hub's cache, or none."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import huggingface_hub.constants
import pytest

from moespec import EMBEDDED_TARGET, BudgetConfig, Engine, GenerationConfig, TreeConfig
from moespec.drafters.checkpoint import load_head, save_head
from moespec.drafters.hub import fetch_head
from moespec.drafters.loading import find_drafter
from moespec.drafters.ngram import NgramDrafter
from moespec.target import Target
from tests.moespec.heads import CASES, NUM_LAYERS, attach, target, write

SAFEAILAB, SPECFORGE = CASES[0], CASES[1]
HUB_ID, REVISION = "owner/head", "0" * 40


@pytest.fixture(scope="module")
def attached():
    engine_target = Target(target())
    yield engine_target
    engine_target.close()


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The hub's cache, with nothing behind it; puts files of a repository there."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))

    def put(case) -> Path:
        repository = tmp_path / "hub" / "models--owner--head"
        (repository / "refs").mkdir(parents=True)
        (repository / "refs" / "main").write_text(REVISION)
        snapshot = repository / "snapshots" / REVISION
        snapshot.mkdir(parents=True)
        write(case, snapshot)
        return snapshot

    return put


def test_auto_takes_a_head_beside_the_target_and_says_so(attached, tmp_path):
    folder = tmp_path / "target"
    folder.mkdir()
    found = find_drafter("auto", attached, folder)
    assert (found.drafter.name, found.reason) == ("n-gram", "no head beside the target: prompt look-up")
    for place in (tmp_path / "drafter", folder / "drafter"):  # inside comes first
        write(SPECFORGE, place)
        assert find_drafter("auto", attached, folder).reason == "a head was found beside the target"
    shutil.rmtree(tmp_path / "drafter")
    assert find_drafter("auto", attached, folder).drafter.tap_layers == SPECFORGE.taps
    assert find_drafter("auto", attached, folder, (0, 1, 2)).drafter.tap_layers == (0, 1, 2)


@pytest.mark.parametrize(("wanted", "name"), [(None, None), ("none", None), ("ngram", "n-gram")])
def test_a_name_is_taken_as_it_is(attached, wanted, name):
    found = find_drafter(wanted, attached, None)
    assert found.reason == "asked for"
    assert getattr(found.drafter, "name", None) == name


def test_a_drafter_of_ones_own_is_taken_as_it_is(attached):
    own = NgramDrafter()
    assert find_drafter(own, attached, None).drafter is own


def test_a_name_that_means_nothing_is_refused(attached):
    for wanted in ("eagle", "/nowhere/at/all", Path("nowhere")):
        with pytest.raises(ValueError, match=f"drafter {wanted} is neither a directory, a hub id"):
            find_drafter(wanted, attached, None)


@pytest.mark.parametrize("wanted", ["auto", "ngram", None, NgramDrafter(), "model:/nowhere"], ids=str)
def test_taps_are_for_heads_alone(attached, wanted):
    with pytest.raises(ValueError, match=r"tap_layers=\[2, 3\] is for a draft head"):
        find_drafter(wanted, attached, None, (2, 3))


@pytest.mark.parametrize("case", [SAFEAILAB, SPECFORGE], ids=["bin", "safetensors"])
def test_a_head_is_read_from_the_hubs_cache(attached, hub, case):
    hub(case)
    found = find_drafter(HUB_ID, attached, None)
    assert (found.drafter.name, found.reason, found.drafter.tap_layers) == ("EAGLE-3", "asked for", case.taps)


def test_only_the_config_and_one_kind_of_weights_are_asked_for(hub, monkeypatch):
    snapshot, asked = hub(SPECFORGE), []

    def fake_download(repo_id: str, allow_patterns: list[str]) -> str:
        asked.append(allow_patterns)
        return str(snapshot)

    monkeypatch.setattr("moespec.drafters.hub.snapshot_download", fake_download)
    assert fetch_head(HUB_ID) == snapshot
    assert asked == [["config.json", "model*.safetensors", "model.safetensors.index.json"]]
    (snapshot / "model.safetensors").unlink()
    fetch_head(HUB_ID)
    assert asked[2] == ["config.json", "pytorch_model*.bin", "pytorch_model.bin.index.json"]


@pytest.mark.parametrize("name", [HUB_ID, "owner/..head.."])
def test_without_a_way_to_the_hub_there_is_one_sentence(attached, hub, name):
    with pytest.raises(
        ValueError, match=f"the draft head {name} is no directory here and could not be fetched"
    ) as refusal:
        find_drafter(name, attached, None)
    assert "\n" not in str(refusal.value)


def test_the_engine_the_trace_and_the_card_name_the_drafter_and_the_reason(tmp_path):
    write(SPECFORGE, tmp_path)
    engine = attach(target(), tmp_path)
    assert (engine.info.drafter_name, engine.info.drafter_reason) == ("EAGLE-3", "asked for")
    header = engine.header([1], GenerationConfig(), BudgetConfig(), TreeConfig())
    assert header.drafter == {"name": "EAGLE-3", "reason": "asked for", "tap_layers": [2, 3, 5]}
    plain = Engine.from_model(target())
    assert (plain.info.drafter_name, plain.info.drafter_reason, plain.info.tap_layers) == ("none", "asked for", ())


def test_our_own_heads_keep_their_taps_in_any_reading(tmp_path):
    """As we write them, vLLM and SGLang find the same taps where they look; the head that ships with us has its own."""
    write(SPECFORGE, tmp_path / "theirs")
    head = load_head(tmp_path / "theirs", NUM_LAYERS)
    save_head(head, tmp_path / "ours")
    assert load_head(tmp_path / "ours", NUM_LAYERS).config == head.config
    values = json.loads((tmp_path / "ours" / "config.json").read_text())
    taps = values.pop("eagle_aux_hidden_state_layer_ids")
    assert taps == [2, 3, 5]
    (tmp_path / "ours" / "config.json").write_text(json.dumps(values))
    assert load_head(tmp_path / "ours", NUM_LAYERS).config.tap_layers == (2, 3, 5)
    assert load_head(EMBEDDED_TARGET.parent / "drafter", 8).config.tap_layers == (2, 4, 5)
