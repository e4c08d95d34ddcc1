"""Asynchronous file I/O: any bytes at any place go and come back; every error is told, with the file and the bytes."""

from __future__ import annotations

import errno
import fcntl
import gc
import os
import resource
import tempfile
import threading
import weakref
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deepspeed._core.aio import DataFile, FileIO, aligned_empty, engine, io_settings
from deepspeed._core.aio.engine import cut
from deepspeed.errors import MissingFeatureError
from deepspeed.ops.aio import AsyncIOBuilder
from deepspeed.ops.aio import handle as handle_module
from deepspeed.runtime.config_sections.aio import AioConfig

PAGE = 4096
FEW = settings(max_examples=60, deadline=None)


@pytest.fixture(scope="module")
def io():
    with FileIO(PAGE, 4, 2) as made:
        yield made


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "file")


def random_bytes(nbytes: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (nbytes,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def at_address(data: torch.Tensor, shift: int) -> torch.Tensor:
    """A copy that begins ``shift`` bytes after a page."""
    made = aligned_empty(len(data) + shift)[shift:]
    return made.copy_(data)


def direct_or_skip(path: str) -> None:
    with DataFile(path, write=True) as file:
        if not file.direct:
            pytest.skip("the temp folder has no direct I/O")


# ------------------------------------------------------------------------------------------------- pieces


@FEW
@given(
    offset=st.integers(0, 5 * PAGE),
    nbytes=st.integers(0, 40 * PAGE),
    call=st.integers(1, 4),
    direct=st.booleans(),
)
def test_pieces_cover_a_request_and_only_its_ends_are_not_direct(offset, nbytes, call, direct):
    pieces = cut(offset, nbytes, PAGE, call * PAGE, direct=direct)
    assert [p.begin for p in pieces] == [0, *(p.end for p in pieces)][: len(pieces)]
    assert (pieces[-1].end if pieces else 0) == nbytes
    assert all(0 < p.end - p.begin <= call * PAGE for p in pieces)
    assert all((offset + p.begin) % PAGE == 0 == (p.end - p.begin) % PAGE for p in pieces if p.direct)
    if direct:
        assert sum(p.end - p.begin for p in pieces if not p.direct) < 2 * PAGE
        assert all(p.direct for p in pieces[1:-1])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("aio")


@FEW
@given(
    offset=st.one_of(st.integers(0, 2 * PAGE), st.sampled_from([0, PAGE, 7 * PAGE])),
    nbytes=st.one_of(st.integers(0, 20 * PAGE), st.sampled_from([0, 1, PAGE, 16 * PAGE])),
    shift=st.one_of(st.sampled_from([0, 64, 512]), st.integers(0, PAGE)),
    direct=st.booleans(),
)
def test_any_bytes_at_any_place_come_back_and_their_neighbours_stay(io, folder, offset, nbytes, shift, direct):
    path = folder / "round-trip"
    before = random_bytes(offset + nbytes + 100, seed=1)
    path.write_bytes(bytes(before.numpy()))
    data = random_bytes(nbytes)
    with DataFile(path, write=True, direct=direct) as file:
        io.write(at_address(data, shift), file, offset).wait()
        found = at_address(torch.zeros(nbytes, dtype=torch.uint8), shift)
        io.read(found, file, offset).wait()
    assert torch.equal(found, data)
    before[offset : offset + nbytes] = data
    assert path.read_bytes() == bytes(before.numpy())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.bool, torch.int64, torch.complex64])
def test_every_dtype_goes_as_its_bytes(io, path, dtype):
    data = torch.randn(3, 1000).to(dtype)
    io.write(data, path).wait()
    found = torch.zeros_like(data)
    io.read(found, path).wait()
    assert torch.equal(found, data)
    assert os.path.getsize(path) == data.numel() * data.element_size()


def test_scalars_parameters_and_nothing_at_all(io, path):
    weight = torch.nn.Parameter(torch.tensor(3.5))
    io.write(weight, path, 10).wait()
    found = torch.nn.Parameter(torch.tensor(0.0))
    io.read(found, path, 10).wait()
    assert found.item() == 3.5
    io.read(torch.empty(0), path, 1 << 40).wait()


def test_a_write_makes_the_file_as_long_as_needed_and_no_longer(io, path):
    io.write(torch.ones(10, dtype=torch.uint8), path, 5000).wait()
    assert os.path.getsize(path) == 5010
    io.write(torch.ones(10, dtype=torch.uint8), path).wait()
    assert os.path.getsize(path) == 5010


def test_short_calls_are_continued(io, path, monkeypatch):
    data = random_bytes(9 * PAGE + 5)
    for name in ("preadv", "pwritev"):
        whole = getattr(os, name)
        monkeypatch.setattr(os, name, lambda fd, views, at, whole=whole: whole(fd, [views[0][:512]], at))
    io.write(at_address(data, 0), path, 3).wait()
    found = torch.zeros_like(data)
    io.read(found, path, 3).wait()
    assert torch.equal(found, data)


def test_a_filesystem_that_refuses_direct_calls_gets_buffered_ones(io, path, monkeypatch):
    direct_or_skip(path)
    whole, refused = os.pwritev, []

    def refuse(descriptor, views, at):
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT:
            refused.append(at)
            raise OSError(errno.EINVAL, "Invalid argument")
        return whole(descriptor, views, at)

    monkeypatch.setattr(os, "pwritev", refuse)
    data = random_bytes(8 * PAGE)
    with DataFile(path, write=True) as file:
        io.write(at_address(data, 0), file).wait()
        assert refused and not file.direct
    assert Path(path).read_bytes() == bytes(data.numpy())


def test_memory_filesystems_are_buffered(io):
    if not os.path.isdir("/dev/shm"):
        pytest.skip("no /dev/shm")
    with tempfile.TemporaryDirectory(dir="/dev/shm") as shm, DataFile(f"{shm}/file", write=True) as file:
        assert not file.direct
        data = random_bytes(5000)
        io.write(data, file, 7).wait()
        found = torch.zeros_like(data)
        io.read(found, file, 7).wait()
        assert torch.equal(found, data)


# ------------------------------------------------------------------------------------------------- cost


def test_aligned_memory_is_not_copied_and_other_memory_only_by_the_call(path, monkeypatch):
    direct_or_skip(path)
    made = []
    monkeypatch.setattr(
        engine, "aligned_empty", lambda nbytes, **kw: made.append(nbytes) or aligned_empty(nbytes, **kw)
    )
    data = random_bytes(64 * PAGE + 9)
    with FileIO(2 * PAGE, 4, 2) as io:
        io.write(at_address(data, 0), path).wait()
        io.read(at_address(data, 1000), path, 0)
        io.read(at_address(data, 1000)[:-1000], path, 1000)  # address and offset suit each other
        made_before_waiting = len(made)
        io.wait()
        assert made_before_waiting <= len(made) <= io.threads
        assert set(made) == {io.call_nbytes} and io.call_nbytes == 4 * PAGE
    made.clear()
    with FileIO(2 * PAGE, 4, 2) as io:
        io.write(at_address(data, 0), path).wait()
        io.write(at_address(data, 512), path, 512).wait()
    assert not made


def test_no_more_is_in_flight_than_allowed(path, monkeypatch):
    whole, lock, now, most = os.pwritev, threading.Lock(), [], []

    def counted(descriptor, views, at):
        with lock:
            now.append(len(views[0]))
            most.append((len(now), sum(now)))
        try:
            return whole(descriptor, views, at)
        finally:
            with lock:
                now.remove(len(views[0]))

    monkeypatch.setattr(os, "pwritev", counted)
    with FileIO(PAGE, 6, 3) as io:
        for i in range(8):
            io.write(aligned_empty(20 * PAGE), path, i * 20 * PAGE)
        io.wait()
    assert max(calls for calls, _ in most) <= 3
    assert max(nbytes for _, nbytes in most) <= 6 * PAGE


def test_descriptors_and_tensors_do_not_stay(path, monkeypatch):
    kept = []

    class Seen(engine._Bytes):
        def __init__(self, tensor):
            super().__init__(tensor)
            kept.append(weakref.ref(self))

    monkeypatch.setattr(engine, "_Bytes", Seen)
    before = os.listdir("/proc/self/fd")
    data = aligned_empty(3 * PAGE)
    with FileIO(PAGE, 2, 2) as io:
        good = io.write(data, path)
        good.wait()
        bad = io.read(aligned_empty(4 * PAGE), path)
        with pytest.raises(OSError):
            bad.wait()
        with pytest.raises(FileNotFoundError):
            io.read(data, path + "x")
        assert os.listdir("/proc/self/fd") == before
    assert len(kept) == 2 and [ref() for ref in kept] == [None, None]


def test_threads_end_with_the_object(path):
    before = threading.active_count()
    handle = AsyncIOBuilder().load().aio_handle(PAGE, 4)
    handle.async_pwrite(torch.zeros(8 * PAGE), path)
    assert handle.wait() == 1 and threading.active_count() > before
    workers = [thread for thread in threading.enumerate() if thread.name.startswith("deepspeed-aio")]
    del handle
    gc.collect()
    for _ in range(100):
        if threading.active_count() == before:
            break
        for worker in workers:
            worker.join(0.01)
    assert threading.active_count() == before


def test_aligned_memory():
    for numel, dtype in ((1, torch.uint8), (1000, torch.bfloat16), (3 << 20, torch.float32)):
        made = aligned_empty(numel, dtype)
        assert made.shape == (numel,) and made.dtype == dtype and made.data_ptr() % PAGE == 0
        assert made.untyped_storage().nbytes() == numel * dtype.itemsize
        assert not made.any()
    assert aligned_empty(0).numel() == 0
    with pytest.raises(ValueError, match="-1"):
        aligned_empty(-1)


# ------------------------------------------------------------------------------------------------- together


def test_neighbours_written_at_the_same_time_do_not_lose_each_others_bytes(io, path):
    data = random_bytes(40 * 1000)
    barrier = threading.Barrier(4)

    def write(rank):
        barrier.wait()
        for i in range(rank, 40, 4):
            io.write(data[i * 1000 : (i + 1) * 1000], path, i * 1000)

    threads = [threading.Thread(target=write, args=(rank,)) for rank in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    io.wait()
    assert Path(path).read_bytes() == bytes(data.numpy())


def test_a_long_queue_of_reads_and_writes(io, path):
    data = random_bytes(300 * PAGE)
    found = torch.zeros_like(data)
    with DataFile(path, write=True) as file:
        file.truncate(len(data))
        for i in range(300):
            io.write(data[i * PAGE : (i + 1) * PAGE], file, i * PAGE)
        io.wait()
        transfers = [io.read(found[i * PAGE : (i + 1) * PAGE], file, i * PAGE) for i in range(300)]
        for transfer in reversed(transfers):
            transfer.wait()
            assert transfer.done()
    assert torch.equal(found, data)


def test_an_unlinked_file_works_and_leaves_nothing(io, path):
    data = random_bytes(3 * PAGE)
    with DataFile(path, write=True) as file:
        file.unlink()
        io.write(data, file).wait()
        found = torch.zeros_like(data)
        io.read(found, file).wait()
        assert torch.equal(found, data)
        file.sync()
    assert not os.path.exists(path)


# ------------------------------------------------------------------------------------------------- errors


def test_a_file_that_is_missing_and_a_folder_that_takes_none(io, tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        io.read(torch.zeros(8), tmp_path / "missing")
    assert caught.value.filename == str(tmp_path / "missing")
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o500)
    if os.geteuid() == 0:
        closed = Path("/sys/kernel")  # root may write everywhere else
        if not closed.is_dir():
            pytest.skip("root, and no /sys")
    with pytest.raises(OSError) as caught:
        io.write(torch.zeros(8), closed / "file")
    assert caught.value.errno in (errno.EACCES, errno.EPERM, errno.EROFS)
    assert str(closed / "file") in str(caught.value)


@pytest.mark.parametrize("direct", [True, False])
def test_a_file_that_ends_early_says_where(io, path, direct):
    Path(path).write_bytes(bytes(5000))
    with DataFile(path, direct=direct) as file:
        transfer = io.read(aligned_empty(3 * PAGE), file, 100)
        for _ in range(2):
            with pytest.raises(OSError, match=f"read of {3 * PAGE} bytes at offset 100 stopped at") as caught:
                transfer.wait()
            assert caught.value.errno == errno.ENODATA
            assert "after 5000 bytes" in str(caught.value) and caught.value.filename == path
    io.wait()  # it was told


@contextmanager
def files_up_to(nbytes: int):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("direct", [True, False])
def test_a_file_that_may_not_grow_is_told_by_the_wait_and_work_goes_on(io, path, direct):
    with DataFile(path, write=True, direct=direct) as file, files_up_to(64 * PAGE):
        bad = io.write(aligned_empty(128 * PAGE), file, PAGE)
        good = io.write(aligned_empty(PAGE), file)
        with pytest.raises(OSError, match=f"write of {128 * PAGE} bytes at offset {PAGE} stopped at offset") as caught:
            bad.wait()
        assert caught.value.errno == errno.EFBIG and caught.value.filename == path
        good.wait()
        io.wait()


def test_space_is_reserved_before_a_long_write_to_a_path(io, path):
    with files_up_to(64 * PAGE), pytest.raises(OSError, match="cannot reserve 2097152 bytes at offset 12") as caught:
        io.write(aligned_empty(2 << 20), path, 12)
    assert caught.value.errno == errno.EFBIG and caught.value.filename == path
    with DataFile(path, write=True) as file:
        if file.reserve(3 * PAGE, PAGE):
            assert file.nbytes == 4 * PAGE
        assert not file.reserve(0)


def test_a_write_that_moves_nothing_is_an_error(io, path, monkeypatch):
    monkeypatch.setattr(os, "pwritev", lambda *_: 0)
    with pytest.raises(OSError, match="takes no more bytes"):
        io.write(torch.zeros(8), path).wait()


def test_errors_that_nobody_asked_for_are_raised_by_the_wait_for_all(path, monkeypatch):
    logged = []
    monkeypatch.setattr(engine.logger, "error", logged.append)
    Path(path).write_bytes(bytes(10))
    io = FileIO(PAGE, 2, 2)
    io.read(torch.zeros(100), path, 1)
    io.read(torch.zeros(100), path, 2)
    with pytest.raises(OSError, match="stopped at offset 10"):
        io.wait()
    assert len(logged) == 1 and "one more" in logged[0]
    io.wait()
    io.read(torch.zeros(100), path, 3)
    with pytest.raises(OSError, match="at offset 3"):
        io.close()
    with pytest.raises(RuntimeError, match="closed"):
        io.read(torch.zeros(1), path)
    with pytest.raises(ZeroDivisionError), FileIO(PAGE, 1, 1) as other:
        other.read(torch.zeros(100), path)
        raise ZeroDivisionError  # not hidden by the file's error, which is logged
    assert "stopped at" in logged[-1]


def test_an_error_that_nobody_waited_for_is_logged(path, monkeypatch):
    logged = []
    monkeypatch.setattr(engine.logger, "error", logged.append)
    Path(path).write_bytes(bytes(10))
    io = FileIO(PAGE, 1, 1)
    io.read(torch.zeros(100), path)._done.wait()
    del io
    gc.collect()
    assert len(logged) == 1 and "nobody waited" in logged[0] and path in logged[0]


def test_what_cannot_be_asked_for(io, path, monkeypatch):
    with pytest.raises(ValueError, match=r"contiguous.*strides \(1, 3\)"):
        io.write(torch.zeros(4, 3).T, path)
    with pytest.raises(ValueError, match="offset must be >= 0 bytes, but is -1"):
        io.read(torch.zeros(4), path, -1)
    assert not os.path.exists(path)
    Path(path).write_bytes(bytes(10))
    with DataFile(path) as file, pytest.raises(ValueError, match=f"{path} was opened for reading"):
        io.write(torch.zeros(1), file)
    with pytest.raises(ValueError, match=f"{path} is closed"):
        io.read(torch.zeros(1), file)
    for name in ("block_nbytes", "depth", "threads"):
        with pytest.raises(ValueError, match=f"{name} must be at least 1, but is 0"):
            FileIO(**{name: 0})
    monkeypatch.setattr(os, "getpid", lambda: -1)
    with pytest.raises(ValueError, match="make one in this process"):
        io.write(torch.zeros(4), path)


# ------------------------------------------------------------------------------------------------- settings


def test_the_config_section_becomes_settings():
    assert io_settings(1 << 20, 8, False, 1) == (1 << 20, 8, 4)
    assert io_settings(1 << 20, 32, False, 8) == (1 << 20, 32, 8)
    assert io_settings(1 << 20, 2, False, 8) == (1 << 20, 2, 2)
    assert io_settings(4096, 16, True, 1) == (4096, 16, 16)
    section = AioConfig(block_size=8192, queue_depth=16, intra_op_parallelism=8, single_submit="false")
    with FileIO.from_config(section) as io:
        assert (io.threads, io.call_nbytes) == (8, 16384)
    with FileIO.from_config(AioConfig(block_size=10_000, single_submit=True)) as io:
        assert io.call_nbytes == 12288
    with FileIO(1 << 20, 1 << 20, 1) as io:
        assert io.call_nbytes == 16 << 20
    with pytest.raises(MissingFeatureError, match=r"aio\.use_gds"):
        FileIO.from_config(AioConfig(use_gds=True))


# ------------------------------------------------------------------------------------------------- the documented operator


@pytest.fixture
def handle():
    return AsyncIOBuilder().load().aio_handle(PAGE, 4, False, True, 2)


def test_builder():
    from deepspeed.ops import __compatible_ops__, op_builder

    assert op_builder.AsyncIOBuilder is AsyncIOBuilder
    assert __compatible_ops__[AsyncIOBuilder.NAME] is AsyncIOBuilder().is_compatible() is True


def test_builder_refuses_where_the_system_cannot(monkeypatch):
    monkeypatch.delattr(os, "preadv")
    assert not AsyncIOBuilder().is_compatible()
    with pytest.raises(MissingFeatureError, match="async_io"):
        AsyncIOBuilder().load()


def test_handle_keeps_its_settings_and_defaults(handle):
    def values(h):
        names = ("block_size", "queue_depth", "single_submit", "overlap_events", "intra_op_parallelism")
        return [getattr(h, f"get_{name}")() for name in names]

    assert values(handle) == [PAGE, 4, False, True, 2]
    assert values(AsyncIOBuilder().load().aio_handle()) == [1 << 20, 128, False, False, 1]
    with pytest.raises(ValueError, match="queue_depth must be at least 1"):
        AsyncIOBuilder().load().aio_handle(queue_depth=0)


@pytest.mark.parametrize("offset", [0, 1000])
def test_handle_moves_files_blocking_or_not(handle, path, offset):
    data = random_bytes(5 * PAGE + 1)
    empty = torch.zeros_like(data)
    for write, read in (
        (handle.sync_pwrite, handle.sync_pread),
        (handle.async_pwrite, handle.async_pread),
        (lambda t, p, file_offset: handle.write(t, p, True, file_offset), handle.sync_pread),
        (handle.async_pwrite, lambda t, p, file_offset: handle.read(t, p, True, file_offset)),
        (
            lambda t, p, file_offset: handle.pwrite(t, p, False, True, file_offset),
            lambda t, p, file_offset: handle.pread(t, p, False, False, file_offset),
        ),
    ):
        found = empty.clone()
        done = write(data, path, file_offset=offset)
        assert done + handle.wait() == 1
        done = read(found, path, file_offset=offset)
        assert done + handle.wait() == 1
        assert torch.equal(found, data)
        os.unlink(path)
    assert handle.wait() == 0


def test_handle_waits_for_all_and_counts(handle, tmp_path):
    data = random_bytes(2 * PAGE)
    for i in range(50):
        handle.async_pwrite(data, tmp_path / str(i))
    assert handle.wait() == 50
    assert all((tmp_path / str(i)).read_bytes() == bytes(data.numpy()) for i in range(50))


def test_handle_tells_every_error_and_goes_on(handle, path):
    Path(path).write_bytes(bytes(100))
    handle.async_pread(torch.zeros(100, dtype=torch.uint8), path)
    handle.async_pread(torch.zeros(101, dtype=torch.uint8), path)
    handle.async_pread(torch.zeros(102, dtype=torch.uint8), path)
    with pytest.raises(OSError, match=r"read of 101 .*1 more of 3 requests failed.*read of 102 ") as caught:
        handle.wait()
    assert caught.value.filename == path
    assert handle.wait() == 0
    assert handle.sync_pread(torch.zeros(100, dtype=torch.uint8), path) == 1


def test_validation_finds_a_wrong_byte(handle, path):
    handle.pwrite(random_bytes(PAGE), path, True, True)
    handle._pending[0].transfer.wait()
    with open(path, "r+b") as file:
        file.seek(77)
        wrong = bytes([file.read(1)[0] ^ 1])
        file.seek(77)
        file.write(wrong)
    with pytest.raises(OSError, match="differs from the buffer at byte 77 of 4096"):
        handle.wait()


def test_locked_tensors(handle, monkeypatch, capsys):
    tensor = handle.new_cpu_locked_tensor(1000, torch.empty(0, dtype=torch.bfloat16))
    assert tensor.shape == (1000,) and tensor.dtype == torch.bfloat16 and tensor.data_ptr() % PAGE == 0
    assert handle.free_cpu_locked_tensor(tensor) is True
    assert handle.free_cpu_locked_tensor(tensor) is False
    assert handle.free_cpu_locked_tensor(torch.zeros(3)) is False

    def full(_):
        raise OSError(errno.ENOMEM, "cannot lock 4000 bytes (test)")

    monkeypatch.setattr(handle_module, "lock_pages", full)
    assert handle.new_cpu_locked_tensor(1000, torch.empty(0)).sum() == 0
    assert "cannot lock 4000 bytes" in capsys.readouterr().err


@pytest.mark.gpu
def test_device_tensors_go_through_host_memory(handle, path):
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    data = torch.randn(300_001, device="cuda")
    handle.async_pwrite(data, path, file_offset=3)
    assert handle.wait() == 1
    with torch.cuda.stream(torch.cuda.Stream()):
        found = torch.zeros_like(data)
        handle.async_pread(found, path, file_offset=3)
        assert handle.wait() == 1
        assert torch.equal(found, data)
    locked = handle.new_cpu_locked_tensor(1 << 20, data)
    assert locked.is_pinned() and handle.free_cpu_locked_tensor(locked)
