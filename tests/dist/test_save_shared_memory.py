"""Saves in which ranks read each other's shards: the same files as when they send them."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest

from deepspeed._core.ckpt import groups, neighbours
from deepspeed._core.ckpt.neighbours import Neighbours
from deepspeed.errors import CheckpointError
from tests.helpers import preload  # noqa: F401 - before ranks are forked
from tests.helpers.ckpt import build, config, train
from tests.helpers.dist import run_ranks
from tests.unit.test_ckpt_neighbours import pytestmark  # noqa: F401 - skipped where the system forbids it


def counted() -> dict[str, int]:
    """How often ranks send and read from now on."""
    found = {"sent": 0, "read": 0}
    exchange, read = groups.exchange, Neighbours.read

    def sending(*args: Any) -> Any:
        found["sent"] += 1
        return exchange(*args)

    def reading(self: Neighbours, *args: Any) -> None:
        found["read"] += 1
        read(self, *args)

    groups.exchange, Neighbours.read = sending, reading  # type: ignore[method-assign]
    return found


def both_ways(rank: int, world: int, root: str, stage: int, dtype: str) -> None:
    found = counted()
    engine = build(config(stage, dtype))
    for when in ("before the first step", "after two"):
        engine.save_checkpoint(f"{root}/{when}/read", tag="t")
        assert found["read"] and not found["sent"], found
        engine._saver._neighbours = (None,)
        found["read"] = 0
        engine.save_checkpoint(f"{root}/{when}/sent", tag="t")
        assert found["sent"] and not found["read"], found
        engine._saver._neighbours = None
        found["sent"] = 0
        train(engine, rank, 2, seed=1)


@pytest.mark.parametrize(("stage", "dtype", "world"), [(1, "fp32", 2), (2, "bf16", 3), (2, "fp16", 2)])
def test_same_files(tmp_path: Path, stage: int, dtype: str, world: int) -> None:
    run_ranks(both_ways, world, str(tmp_path), stage, dtype)
    for when in ("before the first step", "after two"):
        files = sorted(path.name for path in (tmp_path / when / "read" / "t").glob("*.pt"))
        assert len(files) == 1 + world
        for name in files:
            one, two = ((tmp_path / when / how / "t" / name).read_bytes() for how in ("read", "sent"))
            assert one == two, f"{name} {when}"


def not_shared(rank: int, world: int, root: str) -> None:
    found = counted()
    able = neighbours._can_read
    neighbours._can_read = lambda *peer: rank != 1 and able(*peer)  # type: ignore[assignment]
    engine = build(config(2, "bf16"))
    train(engine, rank, 1, seed=1)
    engine.save_checkpoint(root, tag="one rank may not")
    assert found["sent"] and not found["read"], found
    neighbours._can_read = able
    found["sent"] = 0
    later = build(config(2, "bf16", checkpoint={"async_save": True}))
    train(later, rank, 1, seed=1)
    later.save_checkpoint(root, tag="in the background")
    train(later, rank, 1, seed=1)  # changes what is being saved
    later.destroy()
    assert found["sent"] and not found["read"], found


def test_otherwise_they_send(tmp_path: Path) -> None:
    run_ranks(not_shared, 3, str(tmp_path))


def unreadable(rank: int, world: int, root: str) -> None:
    engine = build(config(2, "bf16"))
    train(engine, rank, 1, seed=1)
    engine.save_checkpoint(root, tag="good")
    if rank == 1:
        Neighbours.read = lambda self, *args: (_ for _ in ()).throw(OSError(errno.EFAULT, "gone"))  # type: ignore[method-assign]
    with pytest.raises((OSError, CheckpointError), match="gone"):
        engine.save_checkpoint(root, tag="bad")
    assert not Path(root, "bad").exists()
    assert Path(root, "latest").read_text() == "good"
    assert engine.load_checkpoint(root)[0] is not None


def test_memory_that_cannot_be_read_fails_the_save_on_all_ranks(tmp_path: Path) -> None:
    run_ranks(unreadable, 2, str(tmp_path))
