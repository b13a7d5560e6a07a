"""Every way in which weight files break: the sentence names the file and the remedy."""

from __future__ import annotations

import pytest

from moespec.integrity import LFS_HEADER, verify_manifest
from moespec.train.manifest import write_manifest


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(bytes(range(200)))
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "README.md").write_text("a card may change")
    write_manifest(tmp_path)
    return tmp_path


def test_whole_files_pass_and_the_card_may_change(folder):
    (folder / "README.md").write_text("changed")
    verify_manifest(folder)


@pytest.mark.parametrize(
    ("breaking", "sentence"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "199 bytes instead of 200"),
        (lambda path: path.write_bytes(b"\xff" + path.read_bytes()[1:]), "does not match its checksum"),
        (lambda path: path.unlink(), "is missing"),
        (lambda path: path.write_bytes(LFS_HEADER + b"v1\noid sha256:0\n"), "git lfs pull"),
        (lambda path: path.write_bytes(b""), "is empty"),
    ],
)
def test_broken_weights_are_named_with_the_remedy(folder, breaking, sentence):
    breaking(folder / "model.safetensors")
    with pytest.raises(ValueError, match=sentence) as caught:
        verify_manifest(folder)
    assert "model.safetensors" in str(caught.value)
    assert "restore it" in str(caught.value) or "git lfs pull" in str(caught.value)


def test_a_broken_manifest_is_named(folder):
    (folder / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match=r"manifest\.json is not a readable manifest"):
        verify_manifest(folder)
