"""Checkpoints on storage of each node: the ranks of these tests have a folder each, as if each were a node."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from deepspeed.errors import CheckpointError
from tests.helpers import preload  # noqa: F401 - before ranks are forked
from tests.helpers.ckpt import assert_same, build, config, snapshot, train
from tests.helpers.dist import run_ranks


def local(stage: int, **more: Any) -> dict[str, Any]:
    return config(stage, checkpoint={"use_node_local_storage": True, **more})


def round_trip(rank: int, world: int, root: str, stage: int) -> None:
    os.environ["LOCAL_WORLD_SIZE"] = "1"
    folder = f"{root}/node{rank}"
    engine = build(local(stage))
    train(engine, rank, 2, seed=1)
    engine.save_checkpoint(folder, client_state={"epoch": 2})
    saved = snapshot(engine)
    files = sorted(path.name for path in Path(folder, "global_step2").iterdir())
    own = [name for name in files if name.endswith("optim_states.pt")]
    assert own == ([f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"] if stage else [])
    assert any("model_states" in name for name in files) and "manifest.json" in files
    assert Path(folder, "latest").read_text() == "global_step2"
    train(engine, rank, 1, seed=2)
    path, client_state = engine.load_checkpoint(folder)
    assert path is not None and Path(path).parent == Path(folder, "global_step2") and client_state == {"epoch": 2}
    assert_same(snapshot(engine), saved)
    assert sorted(p.name for p in Path(folder).iterdir()) == ["global_step2", "latest", "zero_to_fp32.py"]
    assert sorted(p.name for p in Path(folder, "global_step2").iterdir()) == files


@pytest.mark.parametrize(("stage", "world"), [(0, 2), (1, 3), (2, 2)])
def test_each_node_keeps_the_files_of_its_ranks(tmp_path: Path, stage: int, world: int) -> None:
    run_ranks(round_trip, world, str(tmp_path), stage)


def elsewhere(rank: int, world: int, root: str) -> None:
    """Another stage than the one that saved, and a file that one node has lost."""
    os.environ["LOCAL_WORLD_SIZE"] = "1"
    folder = f"{root}/node{rank}"
    engine = build(local(2))
    train(engine, rank, 2, seed=1)
    engine.save_checkpoint(folder)
    other = build(local(0), seed=5)
    other.load_checkpoint(folder)
    for (name, mine), theirs in zip(other.module.named_parameters(), engine.module.parameters(), strict=True):
        assert torch.equal(mine, theirs), name
    before = snapshot(engine)
    if rank == 1:
        (Path(folder) / "global_step2" / "zero_pp_rank_1_mp_rank_00_optim_states.pt").unlink()
    torch.distributed.barrier()
    with pytest.raises(CheckpointError, match="rank_1_mp_rank_00_optim_states.pt is missing"):
        engine.load_checkpoint(folder)
    assert_same(snapshot(engine), before)


def test_other_stages_and_lost_files(tmp_path: Path) -> None:
    run_ranks(elsewhere, 2, str(tmp_path))


def unseen(rank: int, world: int, root: str) -> None:
    engine = build(config(1))
    with pytest.raises(CheckpointError, match="use_node_local_storage"):
        engine.save_checkpoint(f"{root}/node{rank}")
    assert not any(Path(f"{root}/node{rank}").glob("*"))


def test_storage_that_is_not_shared_is_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deepspeed._core.ckpt.staging._PATIENCE_S", 0.2)
    run_ranks(unseen, 2, str(tmp_path))
