"""Files read past the page cache: every part once, in order, checked; ranges of them end up where they are wanted."""

from __future__ import annotations

import errno
import itertools
import os
import tempfile
import threading
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deepspeed._core import checksum
from deepspeed._core.checksum import crc32, crc32_combine
from deepspeed._core.ckpt import blockreader, filereader
from deepspeed._core.ckpt.blockfile import FileSum
from deepspeed._core.ckpt.blockreader import Ranges
from deepspeed._core.ckpt.filereader import FileReader, spans_of
from deepspeed._core.ckpt.io import load_file
from deepspeed._core.ckpt.pieces import Piece, join, merged, of_blocks, small_gaps
from deepspeed.errors import CheckpointError

BLOCK, PART = 16 << 10, 4 << 10


@pytest.fixture(autouse=True, scope="module", params=[PART, 40 << 10], ids=["parts of a block", "blocks in a part"])
def small_parts(request: pytest.FixtureRequest) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(filereader, "_PART_NBYTES", request.param)
        patch.setattr(blockreader, "_JOB_NBYTES", 2 * BLOCK)
        patch.setattr(filereader, "_GAP_NBYTES", 1000)
        patch.setattr(blockreader, "_LEFT_OUT_NBYTES", 0)
        yield request.param


def sums(path: Path) -> FileSum:
    content = path.read_bytes()
    blocks = range(0, len(content), BLOCK)
    return FileSum(len(content), tuple(crc32(content[at : at + BLOCK]) for at in blocks), BLOCK)


def saved(folder: Path, seed: int = 0) -> tuple[Path, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    held = {
        "a": torch.randn(9001, generator=generator),
        "b": torch.randint(-100, 100, (333,), dtype=torch.int16, generator=generator),
        "c": torch.randn(20_000, generator=generator).to(torch.bfloat16),
        "d": torch.randn(3, dtype=torch.float64, generator=generator),
    }
    path = folder / "file.pt"
    torch.save(held, path)
    return path, held


@given(st.data(), st.booleans(), st.sampled_from([1, 3]))
@settings(max_examples=60)
def test_ranges_arrive(data: st.DataObject, verify: bool, workers: int) -> None:
    """Of any tensors, in any order, overlapping or not, also as another dtype."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path, held = saved(folder)
        mapped = load_file(path)
        ranges = Ranges(folder, {path.name: sums(path)}, verify=verify, workers=workers)
        wanted = []
        for _ in range(data.draw(st.integers(1, 6))):
            key = data.draw(st.sampled_from(sorted(held)))
            begin = data.draw(st.integers(0, held[key].numel()))
            end = data.draw(st.integers(begin, held[key].numel()))
            dtype = data.draw(st.sampled_from([held[key].dtype, torch.float64]))
            target = torch.full((end - begin,), 7, dtype=dtype)
            ranges.copy(target, mapped[key][begin:end])
            assert bool((target == 7).all()), "nothing is copied before it is asked for"
            wanted.append((target, held[key][begin:end]))
        total = ranges.nbytes
        told: list[int] = []
        ranges.run(told.append)
        for target, source in wanted:
            assert torch.equal(target, source.to(target.dtype))
        assert sum(told) == total == sum(source.nbytes for _, source in wanted)
        assert bool(ranges.checked) == (verify and total > 0)


def test_what_is_no_part_of_the_files_is_copied_at_once(tmp_path: Path) -> None:
    path, held = saved(tmp_path)
    other = tmp_path / "other"
    other.mkdir()
    saved(other, seed=1)
    ranges = Ranges(tmp_path, {path.name: sums(path)}, verify=True)
    for source in (torch.arange(5.0), load_file(other / "file.pt")["a"], held["a"]):
        target = torch.zeros_like(source)
        ranges.copy(target, source)
        assert torch.equal(target, source)
    assert not ranges.nbytes
    ranges.run(lambda count: pytest.fail("nothing was left to read"))


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("verify", [True, False])
def test_damage_is_found_where_it_is_read(tmp_path: Path, verify: bool, workers: int) -> None:
    path, held = saved(tmp_path)
    known = sums(path)
    content = bytearray(path.read_bytes())
    content[20_000] ^= 1  # in `a`
    path.write_bytes(content)
    mapped = load_file(path)
    ranges = Ranges(tmp_path, {path.name: known}, verify=verify, workers=workers)
    ranges.copy(torch.zeros(9001), mapped["a"])
    ranges.copy(torch.zeros(20_000, dtype=torch.bfloat16), mapped["c"])
    if not verify:
        ranges.run(lambda count: None)
        return
    with pytest.raises(CheckpointError, match=r"file\.pt is damaged: its bytes 16384 to 32768 are not those"):
        ranges.run(lambda count: None)
    elsewhere = Ranges(tmp_path, {path.name: known}, verify=True)
    target = torch.zeros(20_000 - 10_000, dtype=torch.bfloat16)
    elsewhere.copy(target, mapped["c"][10_000:])
    elsewhere.run(lambda count: None)
    assert torch.equal(target, held["c"][10_000:])
    assert 1 not in elsewhere.checked["file.pt"]


extents_of_a_file = st.lists(
    st.tuples(st.integers(0, 99_999), st.integers(0, 99_999)).map(sorted).map(tuple), max_size=8
)


@given(extents_of_a_file, st.integers(1, 100_001))
def test_what_is_read_covers_the_extents_page_by_page_and_nothing_twice(extents: list, nbytes: int) -> None:
    extents = [(low, min(high, nbytes)) for low, high in extents if low < min(high, nbytes)]
    spans = list(spans_of(extents, nbytes))
    assert all(0 < end - begin <= filereader._PART_NBYTES and begin % 4096 == 0 for begin, end in spans)
    assert all(end % 4096 == 0 or end == nbytes for _, end in spans)
    assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(spans))
    read = {at for begin, end in spans for at in range(begin, end)}
    wanted = {at for low, high in extents for at in range(low, high)}
    assert wanted <= read
    pages = {at // 4096 for at in wanted}
    assert all({page - 1, page, page + 1} & pages for page in {at // 4096 for at in read})


@given(st.sets(st.integers(0, 20)), st.sampled_from([4096, 8192, 60 << 10]), st.integers(1, 999))
def test_blocks_are_read_whole_once_and_several_at_a_time(blocks: set[int], size: int, tail: int) -> None:
    known = FileSum(20 * size + tail, (0,) * 21, size)
    parts = list(spans_of(of_blocks(blocks, known), known.nbytes))
    read = [at for begin, end in parts for at in range(begin, end)]
    assert read == [at for b in sorted(blocks) for at in range(b * size, min((b + 1) * size, known.nbytes))]
    assert len(parts) <= len(blocks) + known.nbytes // filereader._PART_NBYTES


@given(st.data(), st.sampled_from([1, 3]), st.booleans())
@settings(max_examples=60)
def test_ranks_that_read_parts_of_blocks_check_them_together(data: st.DataObject, workers: int, damaged: bool) -> None:
    """However a file is divided, all of it is checked by somebody, or known not to be."""
    with tempfile.TemporaryDirectory() as name:
        path, held = saved(Path(name))
        known, mapped = sums(path), load_file(path)
        if damaged:
            content = bytearray(path.read_bytes())
            hit = content.find(held["a"].numpy().tobytes()) + data.draw(st.integers(0, held["a"].nbytes - 1))
            content[hit] ^= 1
            path.write_bytes(content)
        cuts = sorted({0, 9001, *data.draw(st.lists(st.integers(0, 9001), max_size=4))})
        whole, right, pieces = torch.full((9001,), 7.0), set(), []
        for begin, end in itertools.pairwise(cuts):  # a rank each
            ranges = Ranges(path.parent, {path.name: known}, verify=True, pieces=True, workers=workers)
            middle = data.draw(st.integers(begin, end))
            ranges.copy(whole[middle:end], mapped["a"][middle:end])
            ranges.then([])
            ranges.copy(whole[begin:middle], mapped["a"][begin:middle])
            try:
                ranges.run(lambda count: None)
            except CheckpointError as error:
                assert damaged and f"its bytes {hit // BLOCK * BLOCK} to " in str(error)
                return
            right |= set(ranges.checked.get(path.name, []))
            pieces += ranges.pieces.get(path.name, [])
        assert torch.equal(whole, held["a"]) == (not damaged)
        joined, wrong = join(pieces, known)
        assert not joined & right
        first = path.read_bytes().find(whole.numpy().tobytes())
        inside = range(-(-first // BLOCK), (first + held["a"].nbytes) // BLOCK)
        assert joined | right | set(wrong) == set(inside)
        assert wrong == ([hit // BLOCK] if damaged and hit // BLOCK in inside else [])


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("left_out", [[], ["a"], ["b"], ["c"], ["a", "c"]])
def test_what_lies_between_is_summed_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int, left_out: list[str]
) -> None:
    path, held = saved(tmp_path)
    known, mapped = sums(path), load_file(path)
    monkeypatch.setattr(blockreader, "_LEFT_OUT_NBYTES", 2000)
    ranges = Ranges(tmp_path, {path.name: known}, verify=True, pieces=True, workers=workers)
    targets = {key: torch.zeros_like(value) for key, value in held.items() if key not in left_out}
    for key, target in targets.items():  # a phase each
        ranges.copy(target, mapped[key])
        ranges.then([])
    told: list[int] = []
    ranges.run(told.append)
    assert all(torch.equal(target, held[key]) for key, target in targets.items())
    assert sum(told) == sum(target.nbytes for target in targets.values()), "what nobody wants was counted"
    done, wrong = join(ranges.pieces[path.name], known)
    begins = {key: path.read_bytes().find(held[key].numpy().tobytes()) for key in ("a", "b")}
    begins["c"] = path.read_bytes().find(held["c"].view(torch.int16).numpy().tobytes())
    large = [(begins[key], begins[key] + held[key].nbytes) for key in left_out if held[key].nbytes > 2000]
    open_ones = {block for begin, end in large for block in range(begin // BLOCK, -(-end // BLOCK))}
    assert not wrong
    assert done | set(ranges.checked[path.name]) == set(range(len(known.crc32))) - open_ones


@given(extents_of_a_file, st.integers(1, 100_001), st.integers(0, 30_000))
def test_small_gaps(extents: list, nbytes: int, most: int) -> None:
    extents = merged((low, min(high, nbytes)) for low, high in extents if low < min(high, nbytes))
    gaps = small_gaps(extents, nbytes, most)
    assert all(0 < high - low <= most for low, high in gaps)
    every = merged([*extents, *gaps, *((low, high) for low, high in _between(extents, nbytes) if high - low > most)])
    assert every == ([(0, nbytes)] if extents or nbytes else [])
    assert sum(high - low for low, high in [*extents, *gaps]) <= nbytes


def _between(extents: list, nbytes: int) -> Iterator[tuple[int, int]]:
    at = 0
    for low, high in [*extents, (nbytes, nbytes)]:
        if at < low:
            yield at, low
        at = high


def test_pieces_that_several_have_and_pieces_that_nobody_has() -> None:
    content = os.urandom(3 * BLOCK)
    known = FileSum(len(content), tuple(crc32(content[at : at + BLOCK]) for at in range(0, len(content), BLOCK)), BLOCK)

    def piece(block: int, begin: int, end: int, change: int = 0) -> Piece:
        at = block * BLOCK
        return Piece(block, at + begin, at + end, crc32(content[at + begin : at + end]) ^ change)

    replicas = [piece(0, 0, 100), piece(0, 0, 100), piece(0, 0, 40), piece(0, 100, BLOCK)]
    gap = [piece(1, 0, 100), piece(1, 101, BLOCK)]
    assert join([*reversed(replicas), *gap, piece(2, 0, 8), piece(2, 8, BLOCK, 1)], known) == ({0}, [2])
    assert join([], known) == (set(), [])


@given(st.binary(max_size=300), st.binary(max_size=300), st.booleans())
def test_checksums_are_put_together(first: bytes, second: bytes, have_isal: bool) -> None:
    with pytest.MonkeyPatch.context() as patch:
        if not have_isal:
            patch.setattr(checksum, "_routines", lambda: zlib)
        assert crc32_combine(crc32(first), crc32(second), len(second)) == zlib.crc32(first + second)


def test_a_file_that_became_shorter_is_named(tmp_path: Path) -> None:
    path, _ = saved(tmp_path)
    known = sums(path)
    ranges = Ranges(tmp_path, {path.name: known}, verify=True)
    target = torch.zeros(9001)
    ranges.copy(target, load_file(path)["a"])
    os.truncate(path, 10_000)
    with pytest.raises(CheckpointError, match=r"file\.pt cannot be read: .*ends there.*Copy the file again"):
        ranges.run(lambda count: None)


def test_only_a_few_parts_are_read_ahead_and_rooms_come_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    path.write_bytes(os.urandom(20 * PART))
    content = path.read_bytes()
    spans = [(at, at + PART) for at in range(0, len(content), PART)]
    begun = []
    with FileReader() as reader:
        real = reader._io.read
        monkeypatch.setattr(reader._io, "read", lambda *a: (begun.append(a[2]), real(*a))[1])
        for index, (begin, end, data) in enumerate(reader.parts(path, spans)):
            assert data.numpy().tobytes() == content[begin:end]
            assert len(begun) <= index + 1 + filereader._AHEAD
            if index == 3:
                break  # whoever stops early
        found = [data.numpy().tobytes() for _, _, data in reader.parts(path, spans)]
        assert b"".join(found) == content
        failing = OSError(errno.EIO, "Input/output error")
        with monkeypatch.context() as patch:
            patch.setattr("os.preadv", lambda *a: (_ for _ in ()).throw(failing))
            with pytest.raises(CheckpointError, match=r"cannot be read.*Input/output error"):
                list(reader.parts(path, spans))
        assert len(reader._free) == filereader._AHEAD + 1
        assert b"".join(data.numpy().tobytes() for _, _, data in reader.parts(path, spans)) == content


def test_the_parts_of_the_next_file_are_read_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths, wanted = [tmp_path / name for name in "abcdefghijkl"], []
    for path, count in zip(paths, (3, 1, 7, *[1] * 9), strict=True):
        path.write_bytes(os.urandom(count * PART))
        wanted.append((path, [(at, at + PART) for at in range(0, count * PART, PART)]))
    begun: list[str] = []
    with FileReader() as reader:
        real = reader._io.read
        monkeypatch.setattr(reader._io, "read", lambda *a: (begun.append(Path(a[1].path).name), real(*a))[1])
        found = []
        for parts in reader.each(wanted):
            found.append(b"".join(part.data.numpy().tobytes() for part in parts))
            if len(found) == 1:
                assert begun[:4] == ["a", "a", "a", "b"], "the disk was idle between two files"
        assert found == [path.read_bytes() for path in paths]
        assert len(reader._files) <= filereader._AHEAD + 2 < len(paths), "files stay open"
        with pytest.raises(AssertionError, match="nothing is wanted of file 1"):
            for parts in reader.each([wanted[0], (paths[1], []), wanted[2]]):
                list(parts)
    assert not reader._files


def test_without_the_list_of_mappings_everything_is_copied_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Systems other than Linux."""
    path, held = saved(tmp_path)
    known, mapped = sums(path), load_file(path)
    monkeypatch.setattr(Path, "read_text", lambda self, **kw: (_ for _ in ()).throw(FileNotFoundError(str(self))))
    ranges = Ranges(tmp_path, {path.name: known}, verify=True)
    target = torch.zeros(9001)
    ranges.copy(target, mapped["a"])
    assert torch.equal(target, held["a"]) and not ranges.nbytes


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("verify", [True, False])
def test_phases_are_read_one_after_the_other_and_steps_are_taken_beside(
    tmp_path: Path, verify: bool, workers: int, small_parts: int
) -> None:
    path, held = saved(tmp_path)
    mapped = load_file(path)
    first, second = torch.zeros(9001), torch.zeros(20_000, dtype=torch.bfloat16)
    ranges = Ranges(tmp_path, {path.name: sums(path)}, verify=verify, workers=workers)
    ranges.copy(first, mapped["a"])
    steps = []

    def beside() -> Iterator[None]:
        assert torch.equal(first, held["a"])
        for step in range(40):  # more than there are parts
            steps.append((step, threading.current_thread() is threading.main_thread()))
            yield

    ranges.then(beside())
    ranges.copy(second, mapped["c"])
    seen_by_first_copy = []
    ranges.run(lambda count: seen_by_first_copy.append(len(steps)))
    assert seen_by_first_copy[0] == 0
    assert torch.equal(second, held["c"])
    assert steps == [(step, True) for step in range(40)]
    if workers == 1 and small_parts == PART:
        assert 0 < seen_by_first_copy[-1] < 40, "no steps were taken between parts"


def test_steps_are_taken_if_nothing_is_left_to_read(tmp_path: Path) -> None:
    ranges, steps = Ranges(tmp_path, {}, verify=True), iter(range(3))
    ranges.then(steps)
    ranges.run(lambda count: None)
    assert next(steps, None) is None


@pytest.mark.parametrize("workers", [1, 3])
def test_blocks_that_nobody_copies_are_checked_last(tmp_path: Path, workers: int) -> None:
    path, held = saved(tmp_path)
    other = tmp_path / "other.bin"
    other.write_bytes(os.urandom(5 * BLOCK + 100))
    known = sums(other)
    for damaged in (False, True):
        if damaged:
            content = bytearray(other.read_bytes())
            content[-1] ^= 1
            other.write_bytes(content)
        for blocks in ([0, 3], [5, 4]):
            ranges = Ranges(tmp_path, {path.name: sums(path)}, verify=True, workers=workers)
            target, told = torch.zeros(9001), list[int]()
            ranges.copy(target, load_file(path)["a"])
            ranges.check(other.name, known, blocks)
            total = ranges.nbytes + ranges.check_nbytes
            if damaged and 5 in blocks:
                with pytest.raises(CheckpointError, match=r"other\.bin is damaged: its bytes 81920 to 82020 are not"):
                    ranges.run(told.append)
                assert "other.bin" not in ranges.checked
                continue
            ranges.run(told.append)
            assert sum(told) == total == target.nbytes + sum(BLOCK if b < 5 else 100 for b in blocks)
            assert torch.equal(target, held["a"])
            assert ranges.checked["other.bin"] == sorted(blocks)
