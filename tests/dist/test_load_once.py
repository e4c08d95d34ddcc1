"""A fresh engine's load reads each byte on one rank only, and all of them are checked."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest

from deepspeed._core.ckpt import blockfile, blockreader, manifest
from deepspeed._core.ckpt.filereader import FileReader
from deepspeed._core.ckpt.pieces import merged, of_blocks
from deepspeed.runtime import engine_loading
from tests.helpers import preload  # noqa: F401 - before ranks are forked
from tests.helpers.ckpt import build, config, train
from tests.helpers.dist import run_ranks

BLOCK = 8192


def save(rank: int, world: int, folder: str, stage: int) -> None:
    blockfile.BLOCK_NBYTES = manifest.BLOCK_NBYTES = BLOCK
    engine = build(config(stage, "bf16"))
    train(engine, rank, 2, seed=1)
    engine.save_checkpoint(folder, tag="t")


def load(rank: int, world: int, folder: str, stage: int, left_out: int) -> dict[str, Any]:
    """What this rank has summed, as extents by file, and what it has read by then and after that."""
    blockreader._LEFT_OUT_NBYTES = left_out
    engine = build(config(stage, "bf16"), seed=3)
    before = {bucket.index: bucket.master.data_ptr() for bucket in engine._flat.buckets}
    summed: dict[str, list[tuple[int, int]]] = {}
    read = [0, 0]
    rest = [False]
    stream, check_rest = FileReader._stream, engine_loading.check_rest

    def counted(self: FileReader, wanted: Any) -> Any:
        for index, part in stream(self, wanted):
            read[rest[0]] += part.end - part.begin
            yield index, part

    def noted(choice: Any, ranges: Any, problem: Any) -> None:
        for name, blocks in ranges.checked.items():
            summed.setdefault(name, []).extend(of_blocks(blocks, choice.manifest.files[name]))
        for name, pieces in ranges.pieces.items():
            summed.setdefault(name, []).extend((piece.begin, piece.end) for piece in pieces)
        rest[0] = True
        check_rest(choice, ranges, problem)

    FileReader._stream, engine_loading.check_rest = counted, noted  # type: ignore[method-assign]
    engine.load_checkpoint(folder, tag="t")
    for bucket in engine._flat.buckets:
        [tile] = engine._flat.states.tiles(bucket)
        assert tile.param is bucket.master, "the optimizer's key is another tensor"
        assert (bucket.master.data_ptr() == before[bucket.index]) == (not bucket.shard_numel), "masters were copied"
    return {"summed": summed, "read": read}


@pytest.mark.parametrize(("saved_by", "loaded_by", "stage"), [(2, 2, 2), (3, 2, 1), (2, 3, 3), (2, 1, 2)])
def test_every_byte_is_read_by_one_rank(tmp_path: Path, saved_by: int, loaded_by: int, stage: int) -> None:
    run_ranks(save, saved_by, str(tmp_path), stage)
    found = run_ranks(load, loaded_by, str(tmp_path), stage, 0)
    files = manifest.read_manifest(tmp_path / "t").files
    nbytes = sum(known.nbytes for known in files.values())
    missing = 0
    for name, known in files.items():
        extents = sorted(extent for rank in found for extent in rank["summed"].get(name, ()))
        assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(extents)), f"{name}: summed twice"
        missing += known.nbytes - sum(end - begin for begin, end in extents)
    assert 0 < missing < nbytes / 4, "between the tensors of a file lies what describes them"
    borders = sum(len(extents) for rank in found for extents in rank["summed"].values())
    assert sum(rank["read"][0] for rank in found) <= nbytes - missing + 2 * 4096 * borders
    # What is left is read by whole blocks.
    assert missing <= sum(rank["read"][1] for rank in found) <= nbytes / 2


@pytest.mark.parametrize(("saved_by", "loaded_by", "stage"), [(2, 2, 2), (3, 3, 3), (2, 1, 2)])
def test_ranks_that_read_whole_files_leave_nothing(tmp_path: Path, saved_by: int, loaded_by: int, stage: int) -> None:
    run_ranks(save, saved_by, str(tmp_path), stage)
    found = run_ranks(load, loaded_by, str(tmp_path), stage, 64 << 10)
    assert [rank["read"][1] for rank in found] == [0] * loaded_by
    for name, known in manifest.read_manifest(tmp_path / "t").files.items():
        assert merged(extent for rank in found for extent in rank["summed"].get(name, ())) == [(0, known.nbytes)]
