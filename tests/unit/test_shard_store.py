"""Shards in a file: what is where, what is read ahead, and what memory that takes."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch

from deepspeed._core.params.store import BufferPool, FileShards
from deepspeed.errors import ConfigError


def make(folder: Path, count: int = 2, numel: int = 4096, keep: int = 0) -> FileShards:
    return FileShards(folder, buffer_count=count, buffer_numel=numel, keep_numel=keep)


def test_a_pool_never_holds_more_than_its_limit() -> None:
    pool = BufferPool(3 * 4096)
    first, second = pool.take(4096), pool.take(5000)
    assert first is not None and second is not None and second.numel() == 2 * 4096
    assert pool.take(1) is None and pool.nbytes == 3 * 4096
    pool.give(second)
    assert pool.take(8000) is second, "memory is used again"
    pool.give(first)
    assert pool.take(4097) is None, "what is free is given up only for what fits then"
    pool.give(second)
    large = pool.take(3 * 4096)
    assert large is not None and pool.nbytes == 3 * 4096
    pool.give(large)
    pool.clear()
    assert pool.nbytes == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_what_was_put_is_read(dtype: torch.dtype, tmp_path: Path) -> None:
    store = make(tmp_path)
    shards = [torch.arange(start, start + numel).to(dtype) for start, numel in ((0, 1), (5, 1000), (7, 2049))]
    regions = [store.put(shard) for shard in shards]
    regions[1].write(torch.full((3,), 9, dtype=dtype), 10)
    shards[1][10:13] = 9
    assert store.stage(regions[2], 1)
    for region, shard in zip(regions, shards, strict=True):
        assert torch.equal(region.read(torch.device("cpu")), shard)
        assert torch.equal(region.mapped(), shard)
    assert store.staged_hits == 1 and not store.staged_left
    assert not list(tmp_path.iterdir()), "the file has a name"


def test_a_file_that_was_cut_is_an_error(tmp_path: Path) -> None:
    store = make(tmp_path)
    region = store.put(torch.zeros(2000))
    store.file.truncate(100)
    for use in (region.mapped, lambda: region.read(torch.device("cpu"))):
        with pytest.raises(OSError, match=r"8000 bytes at offset 0 .* after 100 bytes"):
            use()


def test_a_write_makes_what_was_read_ahead_stale(tmp_path: Path) -> None:
    store = make(tmp_path)
    region = store.put(torch.zeros(100))
    assert store.stage(region, 1) and store.stage(region, 1) and not store.stage(region, 2)
    region.write(torch.ones(100))
    assert not store.staged_left and region.read(torch.device("cpu")).eq(1).all()


def test_reading_ahead_stops_at_the_buffers_and_forgets_what_is_past(tmp_path: Path) -> None:
    store = make(tmp_path, count=2, numel=2048)
    regions = [store.put(torch.full((2048,), float(i))) for i in range(4)]
    assert [store.stage(region, ticket) for ticket, region in enumerate(regions)] == [True, True, False, False]
    store.drop_staged(before=1)
    assert store.staged_left == 1 and store.stage(regions[2], 2)
    assert [float(region.read(torch.device("cpu"))[0]) for region in regions] == [0, 1, 2, 3]
    assert store.pool.nbytes <= store.pool.limit_nbytes == 2 * 2048 * 4


def test_space_of_shards_that_are_gone_is_used_again(tmp_path: Path) -> None:
    store = make(tmp_path)
    first, second = store.put(torch.zeros(2000)), store.put(torch.ones(2000))
    nbytes = store.stored_nbytes
    del first
    gc.collect()
    third = store.put(torch.full((2000,), 3.0))
    same = store.put(torch.full((1000,), 4.0, dtype=torch.bfloat16), third)
    assert same is third and store.stored_nbytes == nbytes
    assert second.read(torch.device("cpu")).eq(1).all() and same.read(torch.device("cpu")).eq(4).all()


def test_the_first_shards_stay_in_memory(tmp_path: Path) -> None:
    store = make(tmp_path, numel=50, keep=100)
    kept = store.admit(60, "a")
    assert kept is not None and store.admit(41, "b") is None and store.admit(40, "c") is not None
    with pytest.raises(ConfigError, match=r"buffer_size = 50 elements is too small for parameter d, .* at least 60"):
        store.admit(60, "d")
    del kept
    gc.collect()
    assert store.admit(60, "d") is not None
