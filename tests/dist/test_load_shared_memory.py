"""Loads in which ranks fetch weights from each other's memory: the same as when they send them."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest

from deepspeed._core.ckpt.neighbours import Neighbours
from deepspeed.errors import CheckpointError
from deepspeed.runtime import early_weights
from tests.helpers import preload  # noqa: F401 - before ranks are forked
from tests.helpers.ckpt import assert_same, build, by_name, config, snapshot, train
from tests.helpers.dist import run_ranks
from tests.unit.test_ckpt_neighbours import pytestmark  # noqa: F401 - skipped where the system forbids it


def save(rank: int, world: int, root: str) -> None:
    engine = build(config(2, "bf16"))
    train(engine, rank, 2, seed=1)
    engine.save_checkpoint(root, tag="t")


def counted() -> list[int]:
    """How often this rank reads another's memory from now on."""
    count, read = [0], Neighbours.read

    def reading(self: Neighbours, *args: Any) -> None:
        count[0] += 1
        read(self, *args)

    Neighbours.read = reading  # type: ignore[method-assign]
    return count


def both_ways(rank: int, world: int, root: str, stage: int) -> None:
    early_weights._STEP_NUMEL = 50  # several steps a bucket
    count = counted()
    fetched, sent = build(config(stage, "bf16"), seed=3), build(config(stage, "bf16"), seed=4)
    fetched.load_checkpoint(root, tag="t")
    assert count[0] > len(fetched._flat.buckets) * (world - 1)
    count[0] = 0
    sent._saver._neighbours = (None,)
    sent.load_checkpoint(root, tag="t")
    assert not count[0]
    assert_same(by_name(fetched), by_name(sent), "fetched or sent")
    assert train(fetched, rank, 2, seed=5, dropout_seed=rank) == train(sent, rank, 2, seed=5, dropout_seed=rank)
    assert_same(snapshot(fetched), snapshot(sent), "then trained")


@pytest.mark.parametrize(("stage", "world"), [(1, 2), (2, 2), (2, 3)])
def test_same_weights(tmp_path: Path, stage: int, world: int) -> None:
    run_ranks(save, 2, str(tmp_path))
    run_ranks(both_ways, world, str(tmp_path), stage)


def unreadable(rank: int, world: int, root: str, late: bool) -> None:
    if late:  # nothing is fetched before everything is read
        early_weights._Fetched.steps = lambda self: iter(())  # type: ignore[method-assign]
    fresh, untouched = (build(config(2, "bf16"), seed=3) for _ in range(2))
    fresh._saver.neighbours(early_weights.dist.get_world_group())
    before, read = snapshot(fresh), Neighbours.read
    if rank == 1:
        Neighbours.read = lambda self, *args: (_ for _ in ()).throw(OSError(errno.EFAULT, "gone"))  # type: ignore[method-assign]
    with pytest.raises((OSError, CheckpointError), match="gone"):
        fresh.load_checkpoint(root, tag="t")
    Neighbours.read = read  # type: ignore[method-assign]
    assert_same(snapshot(fresh), before, "weights are taken back")
    assert train(fresh, rank, 1, seed=5, dropout_seed=rank) == train(untouched, rank, 1, seed=5, dropout_seed=rank)
    again = build(config(2, "bf16"), seed=3)
    assert again.load_checkpoint(root, tag="t")[0] is not None


@pytest.mark.parametrize("late", [False, True])
def test_memory_that_cannot_be_read_fails_the_load_on_all_ranks(tmp_path: Path, late: bool) -> None:
    run_ranks(save, 2, str(tmp_path))
    run_ranks(unreadable, 2, str(tmp_path), late)
