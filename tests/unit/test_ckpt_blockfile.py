"""Files written front to back with checksums: any sizes, any file system, every kind of failure."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import tempfile
import threading
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepspeed._core.ckpt import blockfile
from deepspeed._core.ckpt.blockfile import BlockFile, FileSum, check_size
from deepspeed._core.ckpt.blockreader import check_blocks
from deepspeed.errors import CheckpointError
from deepspeed.runtime.config_sections.checkpoint import CheckpointWriterConfig

BLOCK = 1 << 14  # small blocks of two buffers each
BUFFER = 1 << 13


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blockfile, "BLOCK_NBYTES", BLOCK)


@pytest.fixture
def memory_folder() -> Iterator[Path]:
    """In memory, where direct writes may not be taken."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as folder:
        yield Path(folder)


def data(nbytes: int, seed: int = 0) -> bytes:
    return np.random.default_rng(seed).integers(0, 256, nbytes, dtype=np.uint8).tobytes()


def put(path: Path, content: bytes, chunks: list[int] | None = None, buffers: int = 2) -> FileSum:
    with BlockFile(path, buffer_nbytes=BUFFER, buffers=buffers) as file:
        begin = 0
        for chunk in chunks or []:
            piece = bytearray(content[begin : begin + chunk])
            assert file.write(piece) == len(piece)
            piece[:] = bytes(len(piece))  # may be reused
            begin += chunk
        file.write(content[begin:])
    known = file.sum
    return FileSum(known.nbytes, known.crc32, BLOCK)


def assert_whole(path: Path, content: bytes, known: FileSum) -> None:
    assert path.read_bytes() == content
    assert known.nbytes == len(content)
    assert known.crc32 == tuple(zlib.crc32(content[at : at + BLOCK]) for at in range(0, len(content), BLOCK))
    check_blocks(path, known)


def open_files() -> set[str]:
    return {
        os.readlink(f"/proc/self/fd/{fd}")
        for fd in os.listdir("/proc/self/fd")
        if os.path.exists(f"/proc/self/fd/{fd}")
    }


@pytest.mark.parametrize("nbytes", [0, 1, 4095, 4096, BUFFER, BUFFER + 1, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 77])
@pytest.mark.parametrize("buffers", [1, 2, 3])
@pytest.mark.parametrize("where", ["tmp_path", "memory_folder"])
def test_any_size(request: pytest.FixtureRequest, where: str, nbytes: int, buffers: int) -> None:
    folder: Path = request.getfixturevalue(where)
    content = data(nbytes)
    assert_whole(folder / "a", content, put(folder / "a", content, buffers=buffers))


@given(st.lists(st.integers(0, 3 * BUFFER), max_size=8), st.integers(0, 2 * BUFFER), st.integers(1, 2))
def test_any_pieces(chunks: list[int], rest: int, buffers: int) -> None:
    content = data(sum(chunks) + rest)
    with tempfile.TemporaryDirectory() as folder:
        assert_whole(Path(folder) / "a", content, put(Path(folder) / "a", content, chunks, buffers))


def test_arrays_and_views_are_bytes(tmp_path: Path) -> None:
    array = np.arange(5000, dtype=np.float32).reshape(50, 100)
    with BlockFile(tmp_path / "a", buffer_nbytes=BUFFER) as file:
        assert file.write(array) == array.nbytes
        assert file.write(array[:0]) == 0
        assert file.write(memoryview(b"abc")) == 3
    assert (tmp_path / "a").read_bytes() == array.tobytes() + b"abc"


def test_a_file_that_exists_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("mine")
    with pytest.raises(FileExistsError):
        BlockFile(tmp_path / "a", buffer_nbytes=BUFFER)
    with pytest.raises(FileNotFoundError):
        BlockFile(tmp_path / "nowhere" / "a", buffer_nbytes=BUFFER)
    assert (tmp_path / "a").read_text() == "mine"


@pytest.mark.parametrize("buffer", [BLOCK, 3 * BLOCK, 3 * BUFFER, 3 * 4096])
@pytest.mark.parametrize("nbytes", [1, BLOCK, 3 * BLOCK, 7 * BLOCK + 9])
def test_buffers_may_be_larger_than_blocks_or_across_their_borders(tmp_path: Path, buffer: int, nbytes: int) -> None:
    path, content = tmp_path / "a", data(nbytes)
    with BlockFile(path, buffer_nbytes=buffer) as file:
        file.write(content)
    assert_whole(path, content, FileSum(file.sum.nbytes, file.sum.crc32, BLOCK))


def test_the_documented_buffer_size_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # with blocks of their real size
    with BlockFile(tmp_path / "a", buffer_nbytes=CheckpointWriterConfig().io_buffer_size) as file:
        file.write(b"abc")
    assert file.sum == FileSum(3, (zlib.crc32(b"abc"),))


@pytest.mark.parametrize("options", [{"buffer_nbytes": 1000}, {"buffer_nbytes": 0}, {"buffers": 0}])
def test_buffers_that_no_disk_takes_are_refused(tmp_path: Path, options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="multiple of 4096"):
        BlockFile(tmp_path / "a", **options)
    assert not os.listdir(tmp_path)


def failing_pwrite(
    monkeypatch: pytest.MonkeyPatch, after: int, code: int, short: int = 0, times: int = 1000
) -> list[int]:
    """``os.pwrite`` that raises from call ``after`` on, or writes ``short`` bytes."""
    calls: list[int] = []
    real = os.pwrite

    def pwrite(file: int, view: memoryview, offset: int) -> int:
        calls.append(len(view))
        if after < len(calls) <= after + times:
            if short:
                return real(file, memoryview(bytes(view[:short])), offset)
            raise OSError(code, os.strerror(code))
        return real(file, view, offset)

    monkeypatch.setattr(blockfile.os, "pwrite", pwrite)
    return calls


@pytest.mark.parametrize("after", [0, 1, 4])
def test_a_full_disk_is_raised_and_nothing_is_left_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    failing_pwrite(monkeypatch, after, errno.ENOSPC)
    threads, files = threading.active_count(), open_files()
    with pytest.raises(OSError, match="No space left"):
        put(tmp_path / "a", data(3 * BLOCK), [BUFFER] * 6)
    assert threading.active_count() == threads
    assert open_files() == files


def test_a_full_disk_that_shows_at_the_end_is_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("fsync", "ftruncate", "close"):
        with monkeypatch.context() as patch:

            def full(*_: object) -> None:
                raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

            patch.setattr(blockfile.os, name, full)
            with pytest.raises(OSError, match="quota"):
                put(tmp_path / name, data(100))


def test_a_really_full_disk(memory_folder: Path) -> None:
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full")
    with pytest.raises(OSError, match="No space left"):
        file = BlockFile(memory_folder / "a", buffer_nbytes=BUFFER)
        full = os.open("/dev/full", os.O_WRONLY)
        os.dup2(full, file._file)
        os.close(full)
        with file:
            file.write(data(2 * BLOCK))


def test_an_error_of_the_caller_ends_it_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blockfile.os, "fsync", lambda _: pytest.fail("the file is not worth it"))
    threads, files = threading.active_count(), open_files()
    with pytest.raises(KeyError), BlockFile(tmp_path / "a", buffer_nbytes=BUFFER) as file:
        file.write(data(100))
        raise KeyError
    assert (threading.active_count(), open_files()) == (threads, files)


@pytest.mark.parametrize("after", [0, 2])
def test_direct_writes_that_are_refused_go_through_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    failing_pwrite(monkeypatch, after, errno.EINVAL, times=1)
    content = data(2 * BLOCK + 5)
    with BlockFile(tmp_path / "a", buffer_nbytes=BUFFER) as file:
        if not file._direct:
            pytest.skip("this file system takes no direct writes")
        file.write(content)
    assert not file._direct
    known = FileSum(file.sum.nbytes, file.sum.crc32, BLOCK)
    assert_whole(tmp_path / "a", content, known)


@pytest.mark.parametrize("code", [errno.EINVAL, errno.EOPNOTSUPP])
def test_direct_files_that_are_refused_are_opened_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    """Also where the file is made all the same."""
    direct, real = getattr(os, "O_DIRECT", 0), os.open

    def refusing(path: str, flags: int, mode: int = 0o777) -> int:
        if direct and flags & direct:
            os.close(real(path, flags & ~direct, mode))
            raise OSError(code, os.strerror(code))
        return real(path, flags, mode)

    with monkeypatch.context() as patch:
        patch.setattr(blockfile.os, "open", refusing)
        content = data(BLOCK + 3)
        known = put(tmp_path / "a", content)
    assert_whole(tmp_path / "a", content, known)


@pytest.mark.parametrize("short", [1, 511, 4096])
def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, short: int) -> None:
    """At offsets that are no longer aligned, too."""
    failing_pwrite(monkeypatch, 1, 0, short=short, times=1)
    content = data(2 * BLOCK + 100)
    assert_whole(tmp_path / "a", content, put(tmp_path / "a", content))


@pytest.mark.parametrize("cut", [0, 1, BLOCK, 2 * BLOCK + 9])
def test_truncated_files_are_named(tmp_path: Path, cut: int) -> None:
    path, content = tmp_path / "model.pt", data(2 * BLOCK + 10)
    known = put(path, content)
    os.truncate(path, cut)
    for check in (check_size, check_blocks):
        with pytest.raises(CheckpointError, match=rf"model\.pt has {cut} bytes, but {len(content)} were written"):
            check(path, known)


@given(st.integers(0, 2 * BLOCK + 9), st.integers(0, 7))
def test_every_flipped_bit_is_found_with_its_place(at: int, bit: int) -> None:
    content = data(2 * BLOCK + 10)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.pt"
        known = put(path, content)
        path.write_bytes(content[:at] + bytes([content[at] ^ 1 << bit]) + content[at + 1 :])
        begin = at // BLOCK * BLOCK
        where = rf"model\.pt is damaged: its bytes {begin} to {min(begin + BLOCK, len(content))} "
        with pytest.raises(CheckpointError, match=where):
            check_blocks(path, known)
        with pytest.raises(CheckpointError, match=where):
            check_blocks(path, known, range(at // BLOCK, at // BLOCK + 1))
        others = [block for block in range(3) if block != at // BLOCK]
        for block in others:
            check_blocks(path, known, range(block, block + 1))


def test_files_that_are_missing_or_cannot_be_read_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.pt"
    known = put(path, b"abc")
    with monkeypatch.context() as patch:
        patch.setattr("os.preadv", lambda *_: (_ for _ in ()).throw(OSError(errno.EIO, "Input/output error")))
        with pytest.raises(CheckpointError, match=r"model\.pt cannot be read.*Input/output"):
            check_blocks(path, known)
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"model\.pt cannot be read"):
        check_size(tmp_path / "file" / "model.pt", known)
    path.unlink()
    with pytest.raises(CheckpointError, match=r"model\.pt is missing"):
        check_size(path, known)


def test_a_thread_still_writes_while_the_interpreter_waits_for_it(tmp_path: Path) -> None:
    """As a save in the background does when the script has come to its end."""
    script = """
import sys, threading, time
from deepspeed._core.ckpt.blockfile import BlockFile

def save():
    threading.main_thread().join()  # that is over as soon as the interpreter begins to wait
    with BlockFile(sys.argv[1]) as file:
        file.write(bytes(20_000_000))

threading.Thread(target=save).start()
"""
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "a")], check=True, timeout=60)
    assert (tmp_path / "a").stat().st_size == 20_000_000
