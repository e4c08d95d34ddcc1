"""Stores without ranks: how shards are cut and laid out, and what passes through the buffers of a file, in which order."""

from __future__ import annotations

import errno
import itertools
import os
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from deepspeed._core.aio import DataFile
from deepspeed._core.aio.memory import PAGE_NBYTES
from deepspeed._core.store import FileStore, OffloadPolicy, ShardStates
from deepspeed._core.store.files import _Walk
from deepspeed._core.store.runfile import open_run_file, remove_dead_folders
from deepspeed._core.store.tiles import MASTER, absent, cut, make_region

DTYPES = {"exp_avg": torch.float32, "exp_avg_sq": torch.float32}


@given(st.integers(0, 20_000), st.integers(1, 5000))
def test_tiles_cover_the_shard_and_begin_where_vector_loops_do(numel: int, limit: int) -> None:
    tiles = cut(numel, limit)
    assert [begin for begin, _ in tiles] == list(itertools.accumulate([0, *(n for _, n in tiles[:-1])]))
    assert sum(n for _, n in tiles) == numel
    assert all(begin % 64 == 0 for begin, _ in tiles)
    assert all(n < limit + 1024 for _, n in tiles) and (limit >= 1024 or all(n < limit + 64 for _, n in tiles))


def test_no_tile_of_a_large_shard_is_a_small_rest() -> None:
    """Kernels take another loop for less than 2^20 elements."""
    for numel in (3 << 20, (3 << 20) + 1, (6 << 20) + 7, (4 << 20) - 5, 10_000_019):
        assert min(n for _, n in cut(numel, 3 << 20)) >= 1 << 20


@given(st.integers(0, 5000), st.integers(0, 4), st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
def test_fields_of_a_region_do_not_overlap(numel: int, count: int, dtype: torch.dtype) -> None:
    region = make_region(8192, numel, {str(i): dtype for i in range(count)})
    assert region.nbytes % PAGE_NBYTES == 0
    end = 0
    for field in region.fields:
        assert field.begin >= end and field.begin % 64 == 0
        end = field.begin + numel * dtype.itemsize
    assert end <= region.nbytes < end + PAGE_NBYTES + 1
    buffer = torch.zeros(max(region.nbytes, 1), dtype=torch.uint8)
    for i, field in enumerate(region.fields):
        field.view(buffer, numel).fill_(i + 1)
    assert all(bool((field.view(buffer, numel) == i + 1).all()) for i, field in enumerate(region.fields))


def test_what_is_absent_reads_as_nan_and_takes_no_values() -> None:
    tensor = absent(5, torch.float32)
    assert tensor.shape == (5,) and tensor.isnan().all() and tensor.untyped_storage().nbytes() == 4
    with pytest.raises(RuntimeError):
        tensor.copy_(torch.zeros(5))
    assert absent(0, torch.float32).shape == (0,)


class Log:
    """Reads and writes of a store in the order in which they were begun, and computations between them."""

    def __init__(self, store: FileStore, monkeypatch: pytest.MonkeyPatch) -> None:
        self.events: list[str] = []
        read, write = store._read, store._write
        monkeypatch.setattr(store, "_read", lambda out, offset: self._note("read", read, out, offset))
        monkeypatch.setattr(store, "_write", lambda values, offset: self._note("write", write, values, offset))
        wait = _Walk._wait_oldest
        monkeypatch.setattr(_Walk, "_wait_oldest", lambda walk: (self.events.append("wait"), wait(walk))[1])

    def _note(self, what: str, call: Any, tensor: torch.Tensor, offset: int) -> Any:
        self.events.append(f"{what} {offset // PAGE_NBYTES}")
        return call(tensor, offset)


def bucket_of(numel: int, index: int = 0) -> Any:
    master = torch.arange(numel, dtype=torch.float32)
    return SimpleNamespace(
        index=index, shard_numel=numel, master=master, full_precision=False, device=torch.device("cpu"), slots=[]
    )


def store_of(folder: Path, states: dict, **policy: Any) -> FileStore:
    policy = {"device": "nvme", "folder": folder, "tile_numel": 64, **policy}
    return FileStore(open_run_file(folder, "data", "the key"), OffloadPolicy(**policy), lambda: states, "the key")


def pass_through(store: FileStore, tiles: list, states: dict, log: Log | None = None) -> None:
    with store.walk(tiles) as walk:
        for number, tile in enumerate(tiles):
            with walk.open(tile):
                if log is not None:
                    log.events.append(f"compute {number}")
                state = states[tile.param]
                if not state:
                    state.update({key: torch.zeros(tile.numel) for key in DTYPES})
                tile.param.add_(1)
                state["exp_avg"].add_(2)
                state["exp_avg_sq"] = state["exp_avg_sq"] + 3  # optimizers may make a new tensor


WAYS = [
    (1, False, False, ["read 0", "compute 0", "write 0", "wait", "read 1", "compute 1", "write 1", "wait"]),
    (2, True, False, ["read 0", "read 1", "compute 0", "write 0", "wait", "compute 1", "write 1", "wait"]),
    (2, False, True, ["read 0", "compute 0", "write 0", "read 1", "compute 1", "write 1"]),
    (3, True, True, ["read 0", "read 1", "compute 0", "write 0", "compute 1", "write 1"]),
    (1, True, True, ["read 0", "compute 0", "write 0", "wait", "read 1", "compute 1", "write 1"]),
]


@pytest.mark.parametrize(("slots", "ahead", "behind", "expected"), WAYS)
def test_tiles_pass_through_the_buffers(
    slots: int, ahead: bool, behind: bool, expected: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    states: dict = defaultdict(dict)
    store = store_of(tmp_path, states, slots=slots, read_ahead=ahead, write_behind=behind)
    tiles = store.adopt(bucket_of(256), DTYPES)
    assert len(tiles) == 4 and store.nbytes == 4 * PAGE_NBYTES and store.buffer_nbytes == slots * PAGE_NBYTES
    for _ in range(3):
        pass_through(store, tiles, states)
        for tile in tiles:
            assert tile.param.isnan().all() and all(v.isnan().all() for v in states[tile.param].values())
    log = Log(store, monkeypatch)
    pass_through(store, tiles[:2], states, log)
    assert log.events == expected
    shards = ShardStates(lambda: states, store, lambda bucket: True, lambda bucket: DTYPES)
    for number, tile in enumerate(tiles):
        steps = 4 if number < 2 else 3
        assert torch.equal(store.read(tile, MASTER, 0, 64), torch.arange(tile.begin, tile.end) + float(steps))
        assert store.read(tile, "exp_avg", 3, 9).tolist() == [2.0 * steps] * 6
        assert store.read(tile, "exp_avg_sq", 63, 64).tolist() == [3.0 * steps]
    assert shards.files is store
    store.close()


def test_a_shard_across_tiles_is_read_and_written(tmp_path: Path) -> None:
    states: dict = defaultdict(dict)
    shards = ShardStates(lambda: states, store_of(tmp_path, states), lambda b: True, lambda b: DTYPES)
    bucket = bucket_of(200)
    shards.adopt(bucket)
    assert bucket.master.isnan().all() and not shards.in_memory(bucket) and shards.names(bucket) == []
    assert torch.equal(shards.read(bucket, None, 0, 200), torch.arange(200.0))
    shards.write(bucket, None, 60, torch.zeros(80, dtype=torch.bfloat16))
    wanted = torch.arange(200.0)
    wanted[60:140] = 0
    assert torch.equal(shards.read(bucket, None, 50, 150), wanted[50:150])
    out = torch.empty(200, dtype=torch.bfloat16)
    shards.copy_master(bucket, out)
    assert torch.equal(out, wanted.bfloat16())
    assert shards.read(bucket, None, 7, 7).numel() == 0
    parts = shards.parts(bucket, None)
    seen: list[torch.Tensor] = []
    parts[1].read(0, 64, lambda t: seen.append(t.clone()))
    assert torch.equal(seen[0], wanted[64:128])
    parts[1].freeze()
    shards.write(bucket, None, 64, torch.ones(64))
    parts[1].read(0, 64, lambda t: seen.append(t.clone()))
    assert torch.equal(seen[1], wanted[64:128])
    shards.close()


def test_state_for_which_there_is_no_room_is_refused(tmp_path: Path) -> None:
    states: dict = defaultdict(dict)
    store = store_of(tmp_path, states)
    tiles = store.adopt(bucket_of(64), DTYPES)
    with pytest.raises(RuntimeError, match="'other'"), store.walk(tiles) as walk, walk.open(tiles[0]):
        states[tiles[0].param]["other"] = torch.zeros(64)
    store.close()


def test_a_filesystem_that_cannot_reserve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DataFile, "reserve", lambda *args: False)
    for fast, written in ((False, 3 * 256), (True, 256)):
        states: dict = defaultdict(dict)
        store = store_of(tmp_path, states, fast_init=fast)
        tiles = store.adopt(bucket_of(64), DTYPES)
        store.check()
        assert store.count.written_nbytes == written and store._file.nbytes == store.nbytes
        pass_through(store, tiles, states)
        assert store.read(tiles[0], "exp_avg", 0, 2).tolist() == [2.0, 2.0]
        store.close()


def test_a_failed_write_is_raised_when_the_pass_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    states: dict = defaultdict(dict)
    store = store_of(tmp_path, states, slots=3, read_ahead=True, write_behind=True)
    tiles = store.adopt(bucket_of(256), DTYPES)
    pass_through(store, tiles, states)

    def fail(*args: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwritev", fail)
    with pytest.raises(OSError, match=r"write of 4096 bytes at offset") as caught:
        pass_through(store, tiles, states)
    assert caught.value.errno == errno.ENOSPC and str(tmp_path) in str(caught.value)
    monkeypatch.undo()
    store.close()


def test_what_killed_processes_left_is_removed(tmp_path: Path) -> None:
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    file = open_run_file(tmp_path, "data", "the key")
    assert not list(tmp_path.iterdir())
    mine = Path(file.path).parent.name
    file.close()
    dead = tmp_path / mine.replace(str(os.getpid()), str(pid))
    for folder in (dead, tmp_path / mine, tmp_path / "deepspeed-elsewhere-7-01234567", tmp_path / "user"):
        folder.mkdir()
        (folder / "data").touch()
    remove_dead_folders(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([mine, "deepspeed-elsewhere-7-01234567", "user"])
