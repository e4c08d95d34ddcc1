"""The list of files that makes a checkpoint folder complete."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepspeed._core.ckpt import manifest as manifest_module
from deepspeed._core.ckpt.blockfile import FileSum
from deepspeed._core.ckpt.manifest import (
    MANIFEST,
    Manifest,
    check_complete,
    known_tags,
    read_manifest,
    write_manifest,
)
from deepspeed._core.ckpt.save import WriterOptions, _Tolerant
from deepspeed.errors import CheckpointError


def make(root: Path, tag: str = "step1", *, saved_at: float = 1.5, step: int = 1, **contents: bytes) -> Manifest:
    """A complete folder with some files."""
    folder = root / tag
    folder.mkdir(parents=True)
    sums: dict[str, FileSum] = {}
    for name, content in (contents or {"a": b"first", "b": b"", "c": b"third one"}).items():
        file = _Tolerant(folder / f"{name}.pt", WriterOptions())
        file.write(content) if content else None
        known = file.close()
        assert known is not None
        sums[f"{name}.pt"] = known
    manifest = Manifest(tag, saved_at, step, 2, 3, "9.9", sums)
    write_manifest(folder, manifest)
    return manifest


def test_round_trip(tmp_path: Path) -> None:
    manifest = make(tmp_path, "Ünïcode tag")
    folder = tmp_path / "Ünïcode tag"
    assert read_manifest(folder) == manifest
    assert check_complete(folder) == manifest
    assert manifest.nbytes == 14
    manifest.check_content(folder)
    assert sorted(os.listdir(folder)) == ["a.pt", "b.pt", "c.pt", MANIFEST]


def test_folders_without_one_are_taken_as_they_are(tmp_path: Path) -> None:
    assert read_manifest(tmp_path) is None
    assert check_complete(tmp_path / "nowhere") is None
    (tmp_path / "file").write_text("")
    assert check_complete(tmp_path / "file") is None


@given(st.data())
def test_any_damage_of_the_manifest_itself_is_found(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    root = tmp_path_factory.mktemp("m")
    manifest = make(root)
    path = root / "step1" / MANIFEST
    text = path.read_bytes()
    at = data.draw(st.integers(0, len(text) - 2))
    if data.draw(st.booleans()):
        path.write_bytes(text[:at])
    else:
        path.write_bytes(text[:at] + bytes([text[at] ^ 1 << data.draw(st.integers(0, 7))]) + text[at + 1 :])
    try:
        found = check_complete(root / "step1")
    except CheckpointError as error:
        assert str(path) in str(error)
    else:
        assert found == manifest  # white space, or another spelling of the same


def test_missing_truncated_and_flipped_files_are_named(tmp_path: Path) -> None:
    manifest = make(tmp_path)
    folder = tmp_path / "step1"
    (folder / "c.pt").write_bytes(b"third_one")
    assert check_complete(folder) == manifest
    with pytest.raises(CheckpointError, match=r"c\.pt is damaged"):
        manifest.check_content(folder)
    os.truncate(folder / "c.pt", 3)
    with pytest.raises(CheckpointError, match=r"c\.pt has 3 bytes, but 9 were written"):
        check_complete(folder)
    (folder / "a.pt").unlink()
    with pytest.raises(CheckpointError, match=r"a\.pt is missing"):
        check_complete(folder)


def test_a_manifest_of_a_later_version_asks_for_that(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(manifest_module, "FORMAT", 2)
        make(tmp_path)
    with pytest.raises(CheckpointError, match=r"format 2, written by deepspeed 9\.9.*upgrade"):
        read_manifest(tmp_path / "step1")


@pytest.mark.parametrize("text", ["", "[]", "{}", "null", '{"format": 1}', "\xff"])
def test_something_else_under_its_name_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / MANIFEST).write_text(text, encoding="latin-1")
    with pytest.raises(CheckpointError, match=r"manifest\.json.*Load another tag, or remove it"):
        read_manifest(tmp_path)


@given(st.lists(st.integers(0, 40), min_size=1, max_size=5), st.integers(1, 7))
def test_parts_of_the_content_are_read_by_exactly_one(sizes: list[int], parts: int) -> None:
    """Blocks of 8 bytes, of which the parts check each once."""
    sums = {f"f{i}": FileSum(size, tuple(range(-(-size // 8))), 8) for i, size in enumerate(sizes)}
    manifest = Manifest("t", 0.0, 0, 0, 1, "", sums)
    read: list[tuple[str, int]] = []
    counts = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            manifest_module,
            "check_blocks",
            lambda path, known, blocks, progress, reader: read.extend((path.name, b) for b in blocks),
        )
        for part in range(parts):
            before = len(read)
            manifest.check_content(Path("/nowhere"), part, parts)
            counts.append(len(read) - before)
    assert read == [(name, block) for name, known in sums.items() for block in range(len(known.crc32))]
    assert max(counts) - min(counts) <= 1


def test_known_tags_are_the_complete_ones_newest_first(tmp_path: Path) -> None:
    make(tmp_path, "b", saved_at=1, step=1)
    make(tmp_path, "a", saved_at=3, step=2)
    make(tmp_path, "d.e", saved_at=3, step=5)
    make(tmp_path, "truncated", saved_at=9)
    os.truncate(tmp_path / "truncated" / "a.pt", 1)
    make(tmp_path, ".b.host.1.00000000.new", saved_at=8)
    (tmp_path / "foreign").mkdir()
    (tmp_path / "latest").write_text("a")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    assert known_tags(tmp_path) == ["d.e", "a", "b"]


def test_a_manifest_is_replaced_whole(tmp_path: Path) -> None:
    manifest = make(tmp_path)
    write_manifest(tmp_path / "step1", replace(manifest, global_steps=7))
    found = read_manifest(tmp_path / "step1")
    assert found is not None and found.global_steps == 7
    assert json.loads((tmp_path / "step1" / MANIFEST).read_text())["format"] == manifest_module.FORMAT
