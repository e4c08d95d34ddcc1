"""Universal folders in an engine: bit-equal to loading the native folder, at any stage and world size."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import deepspeed
from deepspeed import comm
from deepspeed.checkpoint.ds_to_universal import convert
from deepspeed.errors import CheckpointError
from deepspeed.utils.logging import logger
from tests.dist.test_reference_fixtures import assert_losses, assert_same, full_weights
from tests.dist.test_reference_fixtures import train as train_fixture
from tests.helpers import ckpt, preload  # noqa: F401 - before ranks are forked
from tests.helpers.dist import run_ranks
from tests.helpers.fixture_model import FIXTURES, FixtureModel, facts, rank_batches

UNIVERSAL = {"checkpoint": {"load_universal": True}}


def settings(stage: int, dtype: str, **extra: Any) -> dict[str, Any]:
    made = ckpt.config(stage, dtype, **extra)
    if stage == 3:
        made["zero_optimization"]["stage3_param_persistence_threshold"] = 12
    return made


# -- our own checkpoints -----------------------------------------------------------------------------------------------


def save(rank: int, world: int, root: str, stage: int, dtype: str) -> None:
    engine = ckpt.build(settings(stage, dtype), seed=5)
    ckpt.train(engine, rank, 3, seed=1)
    engine.save_checkpoint(root, tag="one", client_state={"epoch": 7, "nested": {"a": [1, 2.5]}})
    if rank == 0:
        convert(f"{root}/one", f"{root}/one_universal")
    comm.barrier()


def load_both(rank: int, world: int, root: str, targets: list[tuple[int, str]]) -> None:
    for stage, dtype in targets:
        plain = ckpt.build(settings(stage, dtype), seed=1)
        plain.load_checkpoint(root, tag="one")
        wanted = ckpt.snapshot(plain)
        losses = ckpt.train(plain, rank, 2, seed=2, dropout_seed=rank)
        engine = ckpt.build(settings(stage, dtype, **UNIVERSAL), seed=2)
        path, client = engine.load_checkpoint(root)
        assert path is not None and path.endswith("one_universal/mp_rank_00_model_states.pt")
        assert client == {"epoch": 7, "nested": {"a": [1, 2.5]}}
        assert engine.loaded_checkpoint_tag == "one_universal" and engine.global_steps == 3
        ckpt.assert_same(ckpt.snapshot(engine), wanted, f"stage {stage}, {world} ranks, {dtype}")
        assert ckpt.train(engine, rank, 2, seed=2, dropout_seed=rank) == losses


def everywhere(root: Path, stage: int, world: int, dtype: str, targets: dict[int, tuple[int, ...]]) -> None:
    run_ranks(save, world, str(root), stage, dtype)
    assert (root / "latest_universal").read_text() == "one_universal"
    for other, stages in targets.items():
        run_ranks(load_both, other, str(root), [(s, dtype) for s in stages])


@pytest.mark.parametrize(
    ("stage", "world", "dtype", "targets"),
    [
        (0, 1, "fp32", {2: (2,)}),
        (1, 2, "bf16", {2: (3,), 3: (0,)}),
        (2, 2, "fp16", {1: (1,)}),
        (3, 2, "bf16", {3: (3, 1)}),
    ],
)
def test_bit_equal_to_the_native_folder(
    stage: int, world: int, dtype: str, targets: dict[int, tuple[int, ...]], tmp_path: Path
) -> None:
    """Frozen, tied, reused and empty parameters, a scalar, a buffer, two groups, a scheduler."""
    everywhere(tmp_path, stage, world, dtype, targets)


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "world"), [(0, 2), (1, 3), (2, 3), (3, 3)])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_bit_equal_everywhere(stage: int, world: int, dtype: str, tmp_path: Path) -> None:
    everywhere(tmp_path, stage, world, dtype, {1: (3, 1), 2: (0, 1, 2, 3), 3: (3, 2)})


def save_again(rank: int, world: int, root: str) -> None:
    engine = ckpt.build(settings(3, "bf16", **UNIVERSAL), seed=1)
    engine.load_checkpoint(root)
    engine.save_checkpoint(root, tag="two")
    if rank == 0:
        convert(f"{root}/two", f"{root}/two_universal")
    comm.barrier()
    other = ckpt.build(settings(1, "bf16", **UNIVERSAL), seed=2)
    path, _ = other.load_checkpoint(root)
    assert path is not None and "two_universal" in path
    snap = ckpt.snapshot(other)
    other.load_checkpoint(root, tag="one_universal")
    ckpt.assert_same(snap, ckpt.snapshot(other))


def test_converted_loaded_saved_converted(tmp_path: Path) -> None:
    run_ranks(save, 2, str(tmp_path), 1, "bf16")
    run_ranks(save_again, 3, str(tmp_path))


# -- folders that the reference converted --------------------------------------------------------------------------------


def build(name: str, stage: int, **extra: Any) -> Any:
    config = {**facts(name)["config"], **extra}
    config["zero_optimization"] = {"stage": stage}
    model = FixtureModel(0)
    trained = [p for p in model.parameters() if p.requires_grad]
    return deepspeed.initialize(model=model, model_parameters=trained, config=config)[0]


def load_reference(rank: int, world: int, name: str) -> None:
    for stage in (0, 1, 2, 3):
        engine = build(name, stage, **UNIVERSAL)
        path, client = engine.load_checkpoint(str(FIXTURES / name))
        assert path is not None and Path(path).parent.name == "universal"
        assert client is not None and client["epoch"] == 2 and client["note"] == "fixture"
        assert (engine.global_steps, engine.get_lr()) == (3, [0.005])
        assert_same(engine, name)
        losses, _ = train_fixture(engine, rank_batches(name, rank % 2)["after"])
        if world == 2:
            assert_losses(losses, facts(name)["losses_after"][rank], name)


@pytest.mark.parametrize(("name", "world"), [("z1_bf16", 2), ("z3_bf16", 1), ("z3_bf16", 3)])
def test_folders_of_the_reference(name: str, world: int) -> None:
    run_ranks(load_reference, world, name)


# -- which folder ------------------------------------------------------------------------------------------------------


def warnings_of(engine: Any, root: Path, tag: str | None = None) -> tuple[str, list[str]]:
    said: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logger.addHandler(handler)
    try:
        path, _ = engine.load_checkpoint(str(root), tag=tag)
    finally:
        logger.removeHandler(handler)
    return str(path), said


def choose(rank: int, world: int, root: Path) -> None:
    plain, keyed = build("z1_bf16", 1), build("z1_bf16", 2, **UNIVERSAL)
    assert "/step3/" in warnings_of(plain, root)[0]
    # Recognised without the key, when it is named.
    path, said = warnings_of(plain, root, "universal")
    assert "/universal/" in path and not said
    assert_same(plain, "z1_bf16")
    path, said = warnings_of(keyed, root)
    assert "/universal/" in path and not said
    # A native folder with the key: loaded, and said once.
    for count in (1, 0):
        path, said = warnings_of(keyed, root, "step3")
        assert "/step3/" in path and sum("native folder" in text for text in said) == count
    assert_same(keyed, "z1_bf16")
    (root / "latest_universal").unlink()
    assert "/step3/" in warnings_of(keyed, root)[0]


def test_which_folder_is_loaded(tmp_path: Path) -> None:
    root = tmp_path / "ckpt"
    shutil.copytree(FIXTURES / "z1_bf16" / "ckpt", root)
    shutil.copytree(FIXTURES / "z1_bf16" / "universal", root / "universal")
    (root / "latest_universal").write_text("universal")
    run_ranks(choose, 1, root)


def refuse(rank: int, world: int, root: Path) -> None:
    engine = build("z1_bf16", 3, **UNIVERSAL)
    before = full_weights(engine)
    with pytest.raises(CheckpointError, match=r"norm\.bias/exp_avg\.pt"):
        engine.load_checkpoint(str(root))
    (root / "universal" / "zero" / "norm.bias" / "exp_avg.pt").touch()
    comm.barrier()
    with pytest.raises(CheckpointError, match=r"norm\.bias/exp_avg\.pt.*truncated"):
        engine.load_checkpoint(str(root))
    assert all(torch.equal(value, before[name]) for name, value in full_weights(engine).items())
    engine.load_checkpoint(str(root), load_optimizer_states=False)


def test_a_damaged_folder_is_refused_on_all_ranks(tmp_path: Path) -> None:
    shutil.copytree(FIXTURES / "z1_bf16" / "universal", tmp_path / "universal")
    (tmp_path / "latest_universal").write_text("universal")
    (tmp_path / "universal" / "zero" / "norm.bias" / "exp_avg.pt").unlink()
    run_ranks(refuse, 2, tmp_path)
