"""What a save leaves on disk: names, keys, plain types, exports; and nothing where it fails."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from deepspeed._core.ckpt.io import load_file
from deepspeed.errors import CheckpointError
from deepspeed.utils import safe_get_full_fp32_param
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint, load_state_dict_from_zero_checkpoint
from tests.helpers import preload  # noqa: F401 - before ranks are forked
from tests.helpers.ckpt import Noisy, assert_same, build, config, snapshot, train
from tests.helpers.dist import run_ranks

STAGES = (0, 1, 2)


# -- client state ------------------------------------------------------------------------------------------------------


class Custom:
    pass


def client_state(rank: int, world: int, folder: str) -> None:
    engine = build(config(2))
    with pytest.raises(ValueError, match=r"\['lr_scheduler', 'module'\]; rename"):
        engine.save_checkpoint(folder, client_state={"module": 1, "lr_scheduler": 2, "fine": 3})
    assert not os.listdir(folder)
    with pytest.raises(ValueError, match=r"('thing' holds .*Custom)|(rank 0 failed.*'thing' holds .*Custom)"):
        engine.save_checkpoint(f"{folder}/x", client_state={"thing": Custom(), "fine": 1})
    with pytest.raises(ValueError, match=r"'call' holds what cannot be pickled"):
        engine.save_checkpoint(folder, client_state={"fine": 1, "call": lambda: None})
    torch.distributed.barrier()
    assert [p for p in Path(folder).rglob("*") if p.is_file() or p.name.startswith("global")] == []
    state = {"rng_states": [1], "np": np.float64(2.5), "array": np.arange(3), "set": {1}, 7: "int key"}
    engine.save_checkpoint(folder, client_state=state)
    _, got = engine.load_checkpoint(folder)
    assert got["rng_states"] == [1] and got["np"] == 2.5 and got["array"].tolist() == [0, 1, 2] and got[7] == "int key"
    _, again = engine.load_checkpoint(folder)
    engine.save_checkpoint(folder, client_state=again)  # what came back can be given again


def test_client_state(tmp_path: Path) -> None:
    run_ranks(client_state, 2, str(tmp_path))


# -- files -------------------------------------------------------------------------------------------------------------

MODEL_KEYS = set(
    """module buffer_names optimizer param_shapes frozen_param_shapes shared_params frozen_param_fragments lr_scheduler
    data_sampler random_ltd sparse_tensor_module_names skipped_steps global_steps global_samples dp_world_size
    mp_world_size checkpoint_parallel_dimensions ds_config ds_version""".split()  # noqa: SIM905
)
OPTIM_KEYS = set(
    """loss_scaler dynamic_loss_scale overflow clip_grad base_optimizer_state single_partition_of_fp32_groups zero_stage
    group_paddings partition_count param_slice_mappings ds_version""".split()  # noqa: SIM905
)


def layout(rank: int, world: int, folder: str, stage: int, dtype: str) -> None:
    settings = config(stage, dtype)
    if dtype == "fp16":
        settings["fp16"]["initial_scale_power"] = 4  # no step is skipped
    engine = build(settings)
    train(engine, rank, 2, seed=1)
    engine.save_checkpoint(folder, client_state={"epoch": 2})
    fp32 = {n: safe_get_full_fp32_param(p) for n, p in engine.module.named_parameters() if p.requires_grad}
    tag = Path(folder, "global_step2")
    prefix = "bf16_" if dtype == "bf16" else ""
    optim = [f"{prefix}zero_pp_rank_{r}_mp_rank_00_optim_states.pt" for r in range(world)] if stage else []
    assert sorted(os.listdir(tag)) == sorted([*optim, "manifest.json", "mp_rank_00_model_states.pt"])
    assert sorted(os.listdir(folder)) == ["global_step2", "latest", "zero_to_fp32.py"]
    assert os.access(Path(folder, "zero_to_fp32.py"), os.X_OK)

    model = torch.load(tag / "mp_rank_00_model_states.pt", weights_only=True)  # no list of allowed classes
    assert set(model) == {*MODEL_KEYS, "ds_format", "ds_rng_states", "epoch"}
    assert model["dp_world_size"] == world and model["global_steps"] == 2 and model["global_samples"] == 16 * world
    assert model["shared_params"] == {"tied_back.weight": "inp.weight"}
    assert [n for g in model["param_shapes"] for n in g] == [n for g in groups_of(engine) for n in g]
    assert model["ds_config"]["zero_optimization"]["stage"] == stage
    assert (model["optimizer"] is None) == (stage > 0)
    size = sum(t.numel() * t.element_size() for t in engine.module.state_dict().values())
    if stage:
        assert (tag / "mp_rank_00_model_states.pt").stat().st_size < size + 60_000, "no buffer behind a view is in it"
    total = {}
    for name in optim:
        file = load_file(tag / name, mmap=False)
        assert set(file) == {"optimizer_state_dict", "ds_config", "ds_format", "ds_version"}
        state = file["optimizer_state_dict"]
        assert set(state) == OPTIM_KEYS and state["zero_stage"] == stage and state["partition_count"] == [world] * 2
        for index, flat in enumerate(state["single_partition_of_fp32_groups"]):
            moments = state["base_optimizer_state"]["state"][index]
            assert set(moments) == {"step", "exp_avg", "exp_avg_sq"}
            assert moments["exp_avg"].numel() == flat.numel() + state["group_paddings"][index]
            total[index] = torch.cat([total.get(index, torch.zeros(0)), flat])
    for index, names in enumerate(groups_of(engine)):
        if stage:
            assert torch.equal(total[index], torch.cat([fp32[n].reshape(-1) for n in names]))


def groups_of(engine: Any) -> list[list[str]]:
    """Names of the parameters in each optimizer group, in the order of the model."""
    trained = [(n, p) for n, p in engine.module.named_parameters() if p.requires_grad]
    return [[n for n, p in trained if p.dim() > 1], [n for n, p in trained if p.dim() <= 1]]


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("stage", STAGES)
def test_file_layout(tmp_path: Path, stage: int, dtype: str) -> None:
    run_ranks(layout, 3 if stage == 2 else 2, str(tmp_path), stage, dtype)


def export(rank: int, world: int, folder: str, stage: int, dtype: str) -> dict[str, torch.Tensor]:
    engine = build(config(stage, dtype))
    train(engine, rank, 2, seed=1)
    engine.save_checkpoint(folder)
    return {
        name: (safe_get_full_fp32_param(param) if param.requires_grad else param.detach()).clone()
        for name, param in engine.module.named_parameters(remove_duplicate=False)
    }


@pytest.mark.parametrize(("stage", "dtype", "world"), [(0, "bf16", 2), (0, "fp32", 1), (1, "fp16", 3), (2, "bf16", 2)])
def test_fp32_export(tmp_path: Path, stage: int, dtype: str, world: int) -> None:
    expected = run_ranks(export, world, str(tmp_path), stage, dtype)[0]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    ran = subprocess.run(
        [sys.executable, "-I", "zero_to_fp32.py", ".", "out"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    exported = torch.load(tmp_path / "out" / "pytorch_model.bin", weights_only=True)
    called = get_fp32_state_dict_from_zero_checkpoint(str(tmp_path))
    assert exported.keys() == called.keys() == {*expected, "shift"}
    for name, value in expected.items():
        assert torch.equal(exported[name], value) and torch.equal(called[name], value), name
    model = load_state_dict_from_zero_checkpoint(Noisy(tied=True, reused=True, frozen=True), str(tmp_path))
    for name, param in model.named_parameters():
        assert torch.equal(param, expected[name].float()), name


def weights(rank: int, world: int, folder: str) -> None:
    for stage in STAGES:
        engine = build(config(stage, "bf16"))
        train(engine, rank, 1, seed=1)
        own = engine.module.state_dict()
        assert engine.save_16bit_model(f"{folder}/{stage}") is True
        assert os.listdir(f"{folder}/{stage}") == ["pytorch_model.bin"]
        saved = torch.load(f"{folder}/{stage}/pytorch_model.bin", weights_only=True)
        torch.distributed.barrier()
        assert_same(saved, dict(own))
        assert saved["inp.weight"].data_ptr() == saved["tied_back.weight"].data_ptr(), "tied weights are stored once"
        assert engine.save_16bit_model(f"{folder}/{stage}", "other.bin", exclude_frozen_parameters=True)
        assert "mid.weight" not in torch.load(f"{folder}/{stage}/other.bin", weights_only=True)
        assert_same(dict(engine.module_state_dict()), dict(own))
        state = engine._zero3_consolidated_16bit_state_dict(exclude_frozen_parameters=True)
        assert (state is None) == (rank != 0)
        if state is not None:
            assert state.keys() == own.keys() - {"mid.weight"}
            assert all(t.untyped_storage().nbytes() == t.numel() * t.element_size() for t in state.values())


def test_weights_only(tmp_path: Path) -> None:
    run_ranks(weights, 2, str(tmp_path))


# -- failures ----------------------------------------------------------------------------------------------------------


def failing_save(rank: int, world: int, folder: str, stage: int, failing: int) -> None:
    engine = build(config(stage))
    train(engine, rank, 1, seed=1)
    engine.save_checkpoint(folder)
    first = snapshot(engine)
    torch.distributed.barrier()
    files = {p: p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}
    train(engine, rank, 1, seed=2)
    second = snapshot(engine)
    real = os.fsync

    def broken(handle: int) -> None:
        raise OSError(28, "No space left on device")

    for tag in (None, "global_step1"):  # a new folder; over the good one
        torch.distributed.barrier()
        if rank == failing:
            os.fsync = broken  # after the bytes of a temporary file were written
        message = "No space left" if rank == failing else f"rank {failing} failed: OSError.*No space left"
        with pytest.raises((OSError, CheckpointError), match=message):
            engine.save_checkpoint(folder, tag=tag)
        os.fsync = real
        torch.distributed.barrier()
        assert {p: p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()} == files
        assert sorted(p.name for p in Path(folder).iterdir()) == ["global_step1", "latest", "zero_to_fp32.py"]
        assert_same(snapshot(engine), second)
    engine.load_checkpoint(folder)
    assert_same(snapshot(engine), first)


@pytest.mark.parametrize(("stage", "failing"), [(2, 1), (2, 0), (0, 0)])
def test_a_save_that_fails_on_one_rank_changes_nothing(tmp_path: Path, stage: int, failing: int) -> None:
    run_ranks(failing_save, 2, str(tmp_path), stage, failing)


def no_optimizer(rank: int, world: int, folder: str) -> None:
    settings = config(0)
    del settings["optimizer"], settings["scheduler"]
    engine = build(settings, groups=False)
    engine.save_checkpoint(folder)
    other = build(settings, seed=2, groups=False)
    other.load_checkpoint(folder)
    assert_same(snapshot(other), snapshot(engine))
    trained = build(config(2), seed=3)
    with pytest.raises(CheckpointError, match=r"holds no optimizer state.*load_optimizer_states=False"):
        trained.load_checkpoint(folder)
    trained.load_checkpoint(folder, load_optimizer_states=False)
    assert_same(dict(trained.module.state_dict()), dict(engine.module.state_dict()))


def test_without_an_optimizer(tmp_path: Path) -> None:
    run_ranks(no_optimizer, 2, str(tmp_path))
