"""Weights that travel while moments are read: right, and taken back if the rest of the checkpoint cannot be loaded."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from deepspeed._core.ckpt import blockfile, manifest
from deepspeed.errors import CheckpointError
from deepspeed.runtime import early_weights
from tests.helpers import preload  # noqa: F401 - before ranks are forked
from tests.helpers.ckpt import assert_same, build, by_name, config, snapshot, train
from tests.helpers.dist import run_ranks


def sends(engine: Any) -> list[int]:
    """Counts the buckets whose weights are given to the others, or follow their masters, early, from now on."""
    sent = [0]
    for way in (early_weights._Sent, early_weights._Fetched):
        real = way.ready

        def counted(self: Any, bucket: Any, real: Callable[..., None] = real) -> None:
            sent[0] += 1
            real(self, bucket)

        way.ready = counted  # type: ignore[method-assign, assignment]
    return sent


def save(rank: int, world: int, folder: str) -> None:
    for stage in (1, 2, 3):
        engine = build(config(stage, "bf16"))
        train(engine, rank, 2, seed=1)
        engine.save_checkpoint(folder, tag=str(stage))


def load(rank: int, world: int, folder: str) -> None:
    for saved in "123":
        for stage in (1, 2, 3):
            used = build(config(stage, "bf16"), seed=3)
            train(used, rank, 1, seed=2)  # has states to lose, so reads twice and sends nothing early
            fresh = build(config(stage, "bf16"), seed=4)
            sent = sends(used)
            used.load_checkpoint(folder, tag=saved)
            assert sent == [0]
            fresh.load_checkpoint(folder, tag=saved)
            assert sent == [len(fresh._flat.buckets)]
            assert sent[0] > 2
            assert_same(by_name(fresh), by_name(used), f"stage {saved} into {stage}")
            assert train(fresh, rank, 2, seed=5, dropout_seed=rank) == train(used, rank, 2, seed=5, dropout_seed=rank)
            assert_same(snapshot(fresh), snapshot(used), f"stage {saved} into {stage}, then trained")


@pytest.mark.parametrize(("saved_by", "loaded_by"), [(2, 2), (3, 2), (2, 3), (2, 1)])
def test_same_as_without(tmp_path: Path, saved_by: int, loaded_by: int) -> None:
    run_ranks(save, saved_by, str(tmp_path))
    run_ranks(load, loaded_by, str(tmp_path))


def not_early(rank: int, world: int, folder: str) -> None:
    engine = build(config(2, "bf16"))
    train(engine, rank, 1, seed=1)
    engine.save_checkpoint(folder, tag="t")
    weights_count = config(2, "bf16")
    weights_count["zero_optimization"]["load_from_fp32_weights"] = False
    cases: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
        ("fp32: masters are the weights", config(2), {}),
        ("stage 0: no states to send", config(0, "bf16"), {}),
        ("the weights of the model file count", weights_count, {}),
        ("the caller loads the module", config(2, "bf16"), {"custom_load_fn": lambda src, dst: dst.load_state_dict(src)}),
        ("no optimizer state is wanted", config(2, "bf16"), {"load_optimizer_states": False}),
    ]
    for what, settings, options in cases:
        fresh = build(settings, seed=3)
        sent = sends(fresh)
        fresh.load_checkpoint(folder, tag="t", **options)
        assert sent == [0], what
        assert fresh.global_steps == 1


def test_only_where_weights_follow_from_masters(tmp_path: Path) -> None:
    run_ranks(not_early, 2, str(tmp_path))


class _Misfit(torch.optim.lr_scheduler.LambdaLR):
    """Refuses every state, but on one rank only."""

    def __init__(self, optimizer: torch.optim.Optimizer, refuses: bool) -> None:
        super().__init__(optimizer, lambda step: 1.0)
        self.refuses = refuses

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self.refuses:
            raise ValueError("this schedule has no such state")


def _flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 4
    path.write_bytes(content)


def taken_back(rank: int, world: int, root: str, stage: int) -> None:
    blockfile.BLOCK_NBYTES = manifest.BLOCK_NBYTES = 512  # so that masters and moments are not in the same block
    good = Path(root, "good")
    engine = build(config(stage, "bf16"))
    train(engine, rank, 2, seed=1)
    engine.save_checkpoint(str(good), tag="t")
    where = {name: good.joinpath("t", name).read_bytes() for name in (f"bf16_zero_pp_rank_{r}_mp_rank_00_optim_states.pt" for r in range(world))}
    model = "mp_rank_00_model_states.pt"
    moments = {n: _place_of(good / "t" / n, "exp_avg_sq") for n in where}
    masters = {n: _place_of(good / "t" / n, None) for n in where}
    last, first = sorted(where)[-1], sorted(where)[0]
    cases = {
        "moments of the last rank": (last, moments[last]),
        "masters of the first rank": (first, masters[first]),
        "masters of the last rank": (last, masters[last]),
        "weights that nobody reads": (model, good.joinpath("t", model).read_bytes().find(b"PK\x01\x02") // 2),
    }
    fresh, untouched = build(config(stage, "bf16"), seed=7), build(config(stage, "bf16"), seed=7)
    before, sent = snapshot(fresh), sends(fresh)
    for number, (what, (name, at)) in enumerate(cases.items()):
        folder = Path(root, str(number))
        if rank == 0:
            shutil.copytree(good, folder)
            _flip(folder / "t" / name, at)
        torch.distributed.barrier()
        sent[0] = 0
        with pytest.raises(CheckpointError, match=f"{name} is damaged"):
            fresh.load_checkpoint(str(folder), tag="t")
        assert sent[0] or "masters" in what, "damage was found before anything was sent"
        assert_same(snapshot(fresh), before, what)
    settings = config(stage, "bf16")
    del settings["scheduler"]
    for refuses in ({0}, {world - 1}):
        picky, twin = (
            build(settings, seed=7, lr_scheduler=lambda optimizer: _Misfit(optimizer, rank in refuses)) for _ in range(2)
        )
        with pytest.raises((ValueError, CheckpointError), match="no such state"):
            picky.load_checkpoint(str(good), tag="t")
        assert_same(snapshot(picky), snapshot(twin), "the schedule could not be loaded")
    assert train(fresh, rank, 2, seed=5, dropout_seed=rank) == train(untouched, rank, 2, seed=5, dropout_seed=rank)
    assert_same(snapshot(fresh), snapshot(untouched), "goes on as the engine that never tried")
    fresh = build(config(stage, "bf16"), seed=8)
    fresh.load_checkpoint(str(good), tag="t")
    assert_same(by_name(fresh), by_name(engine))


def _place_of(path: Path, key: str | None) -> int:
    """A byte in the middle of a saved state (None: of the masters)."""
    saved = torch.load(path, mmap=True, weights_only=False)["optimizer_state_dict"]
    masters = saved["single_partition_of_fp32_groups"]
    wanted = masters[0] if key is None else saved["base_optimizer_state"]["state"][0][key]
    value = wanted.detach().clone().view(torch.uint8).numpy().tobytes()
    assert len(value) > 64
    at = path.read_bytes().find(value)
    assert at > 0
    return at + len(value) // 2


@pytest.mark.parametrize(("stage", "world"), [(1, 2), (2, 2), (2, 3)])
def test_taken_back_if_the_rest_fails(tmp_path: Path, stage: int, world: int) -> None:
    run_ranks(taken_back, world, str(tmp_path), stage)
