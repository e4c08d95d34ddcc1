"""Optimizer states on the host and in files: the same training, bit for bit, and what is in memory meanwhile."""

from __future__ import annotations

import contextlib
import copy
import gc
import itertools
import logging
import os
import pickle
import resource
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import deepspeed
import deepspeed.runtime.zero.offload_states as offload_states
from deepspeed.errors import ConfigError
from deepspeed.ops.adam import DeepSpeedCPUAdam
from deepspeed.runtime.optimizer_offload import plan_memory
from deepspeed.runtime.zero.estimate import zero2_memory_needs
from deepspeed.runtime.zero.offload_config import OffloadDeviceEnum, OffloadStateTypeEnum
from deepspeed.runtime.zero.offload_states import get_state_devices
from deepspeed.utils import (
    logger,
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_get_local_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_optimizer_state,
)
from tests.helpers.dist import run_ranks
from tests.helpers.models import batches
from tests.helpers.training import BATCH, make_model, make_optimizer, trained

BF16 = {"bf16": {"enabled": True}}
PIPELINED = {"pipeline_read": True, "pipeline_write": True}


def nvme(folder: Any, **more: Any) -> dict[str, Any]:
    return {"device": "nvme", "nvme_path": str(folder), "buffer_size": 64, **more}


def config_of(
    stage: int, offload: dict | None = None, *, accumulation: int = 1, clip: float = 0.0, **more: Any
) -> dict:
    zero: dict[str, Any] = {"stage": stage, "reduce_bucket_size": 64}
    if offload is not None:
        zero["offload_optimizer"] = offload
    return {
        "train_micro_batch_size_per_gpu": BATCH,
        "zero_optimization": zero,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": clip,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        **more,
    }


def optimizer_of(name: str, model: torch.nn.Module) -> torch.optim.Optimizer:
    params = list(trained(model).values())
    if name == "ours":
        return DeepSpeedCPUAdam(params, lr=0.01, eps=1e-4, weight_decay=0.1)
    if name == "lion":
        return deepspeed.ops.lion.DeepSpeedCPULion(params, lr=0.01, weight_decay=0.1)
    if name == "adagrad":
        return deepspeed.ops.adagrad.DeepSpeedCPUAdagrad(params, lr=0.01, weight_decay=0.1)
    if name == "torch adagrad":  # makes its state in the constructor
        return torch.optim.Adagrad(params, lr=0.01, initial_accumulator_value=0.5)
    return make_optimizer(name, params)


@contextlib.contextmanager
def engine_of(config: dict, optimizer: str = "ours", kind: str = "plain"):
    model = make_model(kind)
    engine = deepspeed.initialize(model=model, optimizer=optimizer_of(optimizer, model), config=config)[0]
    try:
        yield engine
    finally:
        engine.destroy()


def train(engine: Any, rank: int, windows: int, first: int = 0) -> list[float]:
    """``windows`` steps on the batches from window ``first`` on; the losses."""
    steps = engine.gradient_accumulation_steps()
    losses = []
    for x, y in list(batches(rank, (first + windows) * steps, BATCH))[first * steps :]:
        loss = engine(x, y, False)
        losses.append(float(loss.detach()))
        engine.backward(loss)
        engine.step()
    return losses


def masters(engine: Any) -> dict[str, torch.Tensor]:
    return {name: safe_get_full_fp32_param(param) for name, param in trained(engine.module).items()}


def states(engine: Any) -> dict[str, torch.Tensor]:
    return {
        f"{name}.{key}": safe_get_full_optimizer_state(param, key)
        for name, param in trained(engine.module).items()
        for key in engine._flat.states.names(engine._flat.buckets[0])
    }


def same(mine: dict, other: dict, what: str) -> None:
    assert mine.keys() == other.keys(), what
    for name, value in other.items():
        assert torch.equal(mine[name], value), f"{what}: {name}"


def _run(rank: int, config: dict, optimizer: str, kind: str = "plain", windows: int = 2) -> tuple:
    with engine_of(config, optimizer, kind) as engine:
        losses = train(engine, rank, windows)
        return losses, masters(engine), states(engine)


# -- the same training ---------------------------------------------------------------------------------------------------

PLACES = ("cpu", "files", "pipelined", "ratio 0", "ratio 0.3")


def place_of(name: str, folder: str) -> dict[str, Any]:
    if name == "cpu":
        return {"device": "cpu"}
    if name == "files":
        return nvme(folder)
    if name == "pipelined":
        return nvme(folder, **PIPELINED)
    return nvme(folder, **PIPELINED, ratio=float(name.split()[1]))


def _parity(rank: int, world: int, folder: str) -> int:
    count = 0
    names = itertools.cycle(PLACES)
    for stage, precision, (accumulation, clip), optimizer in itertools.product(
        (1, 2, 3), ({}, BF16), ((1, 0.0), (2, 0.5)), ("ours", "adam")
    ):
        count += 1
        if world > 1 and (count + count // 8) % 2:
            continue  # every other one: elsewhere, where steps cost more, the places take turns, too
        kind = ("plain", "tied", "frozen")[count % 3]
        options: dict[str, Any] = {"accumulation": accumulation, "clip": clip, **precision}
        expected = _run(rank, config_of(stage, **options), optimizer, kind)
        for name in PLACES if world == 1 and accumulation == 2 else (next(names), next(names)):
            got = _run(rank, config_of(stage, place_of(name, folder), **options), optimizer, kind)
            what = f"stage {stage} {precision} x{accumulation} {optimizer} {kind} {name}"
            assert got[0] == expected[0], what
            same(got[1], expected[1], what)
            same(got[2], expected[2], what)
    return count


@pytest.mark.parametrize("world", [1, 2, 3])
def test_states_elsewhere_change_nothing(world: int, tmp_path: Path) -> None:
    """Losses, masters and optimizer states, bit for bit, in fp32 and bf16."""
    assert run_ranks(_parity, world, str(tmp_path)) == [24] * world
    assert not list(tmp_path.iterdir())


def _other_optimizers(rank: int, world: int, folder: str) -> None:
    for optimizer, stage in (("lion", 1), ("adagrad", 2), ("torch adagrad", 2), ("momentum", 3), ("sgd", 2)):
        for precision in ({}, BF16):
            expected = _run(rank, config_of(stage, **precision), optimizer)
            got = _run(rank, config_of(stage, nvme(folder, **PIPELINED), **precision), optimizer)
            assert got[0] == expected[0], optimizer
            same(got[1], expected[1], optimizer)
            same(got[2], expected[2], optimizer)


def test_other_optimizers(tmp_path: Path) -> None:
    run_ranks(_other_optimizers, 2, str(tmp_path))


def _ratio(rank: int, world: int, folder: str) -> None:
    total = None
    for ratio in (0.0, 0.3, 1.0):
        with engine_of(config_of(2, nvme(folder, ratio=ratio), **BF16)) as engine:
            train(engine, rank, 1)
            flat = engine._flat
            numel = {b.index: sum(slot.numel for slot in b.slots) for b in flat.buckets}
            total = sum(numel.values())
            away = sum(n for i, n in numel.items() if not flat.states.in_memory(flat.buckets[i]))
            assert abs(away - ratio * total) <= max(numel.values())
            assert (away == 0) == (ratio == 0.0) and (away == total) == (ratio == 1.0)
            assert (flat.states.files.nbytes > 0) == (ratio > 0.0)


def test_ratio_is_the_share_in_files(tmp_path: Path) -> None:
    run_ranks(_ratio, 2, str(tmp_path))


# -- what moves, and what is in memory -----------------------------------------------------------------------------------


def _skipped(rank: int, world: int, folder: str) -> None:
    fp16 = {"fp16": {"enabled": True, "initial_scale_power": 8, "hysteresis": 1}}
    with engine_of(config_of(2, nvme(folder, **PIPELINED), **fp16)) as engine:
        train(engine, rank, 1)
        count = engine._flat.states.count
        per_step = count.written_nbytes
        assert engine.was_step_applied()
        before = (count.read_nbytes, count.written_nbytes, masters(engine))
        at = (count.read_nbytes, count.written_nbytes)
        x, y = next(iter(batches(rank, 1, BATCH)))
        engine.backward(engine(x, y, False) * float("inf"))
        engine.step()
        assert not engine.was_step_applied() and engine.skipped_steps == 1
        assert (count.read_nbytes, count.written_nbytes) == at
        same(masters(engine), before[2], "skipped")
        at = (count.read_nbytes, count.written_nbytes)
        train(engine, rank, 1, first=1)
        assert engine.was_step_applied()
        # All of the file is read (but for what fills pages) and written, once.
        assert count.written_nbytes - at[1] == engine._flat.states.files.nbytes <= per_step
        content = sum(12 * t.numel for b in engine._flat.buckets for t in engine._flat.states.tiles(b))
        assert content <= count.read_nbytes - at[0] <= engine._flat.states.files.nbytes


def test_a_skipped_step_neither_reads_nor_writes(tmp_path: Path) -> None:
    run_ranks(_skipped, 2, str(tmp_path))


def _storages() -> dict[int, int]:
    gc.collect()
    found = {}
    for item in gc.get_objects():
        if isinstance(item, torch.Tensor) and item.layout is torch.strided and item.device.type == "cpu":
            storage = item.untyped_storage()
            if storage.nbytes():
                found[storage.data_ptr()] = storage.nbytes()
    return found


class Wide(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(96, 96, bias=False) for _ in range(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x.square().mean()


def _memory(rank: int, world: int, folder: str) -> None:
    gc.freeze()
    for stage in (1, 2, 3):
        before = _storages()
        torch.manual_seed(1)
        model = Wide()
        numel = sum(p.numel() for p in model.parameters())
        config = config_of(stage, nvme(folder, **PIPELINED, buffer_size=2048), **BF16)
        config["zero_optimization"] |= {"reduce_bucket_size": 96 * 96 * 2, "stage3_param_persistence_threshold": 0}
        optimizer = DeepSpeedCPUAdam(model.parameters(), lr=0.01)
        engine = deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]
        flat = engine._flat
        for _ in range(2):
            engine.backward(engine(torch.randn(2, 96, dtype=torch.bfloat16)))
            engine.step()
        # Weights, and nothing else but the buffers; no gradients.
        known = {b.weights.untyped_storage().data_ptr() for b in flat.buckets}
        assert not flat.reducer._pool and all(b.grad_full is None for b in flat.buckets)
        assert not any(b.grad_shard.untyped_storage().nbytes() for b in flat.buckets)
        rest = {a: n for a, n in _storages().items() if a not in known and a not in before}
        files = flat.states.files
        assert files.slot_count == 3 and files.buffer_nbytes < 3 * (12 * 2048 + 3 * 4096 + 4096)
        allowed = files.buffer_nbytes + 64 * numel**0.5  # the rest are numbers
        assert sum(rest.values()) <= allowed, (stage, sorted(rest.values())[-6:])
        assert files.nbytes >= 12 * numel // world
        assert sum(rest.values()) < 12 * numel // world
        plan = plan_memory(flat)
        assert plan.disk == files.nbytes
        assert plan.host == files.buffer_nbytes + sum(b.shard_numel * 4 for b in flat.buckets)
        engine.destroy()


def test_between_steps_memory_holds_no_masters_and_no_moments(tmp_path: Path) -> None:
    run_ranks(_memory, 2, str(tmp_path))


def _planned(rank: int, world: int) -> tuple[int, int]:
    """Planned host and device bytes of a rank, the model's size being that of the estimate."""
    model = Wide()
    config = config_of(2, {"device": "cpu"}, **BF16)
    engine = deepspeed.initialize(model=model, optimizer=DeepSpeedCPUAdam(model.parameters(), lr=0.01), config=config)[
        0
    ]
    plan = plan_memory(engine._flat)
    engine.destroy()
    return plan.host, plan.device


@pytest.mark.parametrize("world", [1, 2])
def test_the_plan_agrees_with_the_estimate(world: int) -> None:
    plans = run_ranks(_planned, world)
    numel = sum(p.numel() for p in Wide().parameters())
    need = next(n for n in zero2_memory_needs(numel, world, 1, 1.0) if n.offload_optimizer == "cpu")
    host = sum(plan[0] for plan in plans)
    assert abs(host - need.cpu_bytes) <= 0.1 * need.cpu_bytes
    assert all(abs(plan[1] - need.gpu_bytes) <= 0.1 * need.gpu_bytes for plan in plans)


# -- checkpoints and access ----------------------------------------------------------------------------------------------


def _tier(name: str, folder: str) -> dict[str, Any] | None:
    return {"none": None, "cpu": {"device": "cpu"}, "nvme": nvme(folder, **PIPELINED)}[name]


def _save(rank: int, world: int, folder: str, stage: int, tier: str, precision: dict) -> dict:
    with engine_of(config_of(stage, _tier(tier, folder), **precision)) as engine:
        train(engine, rank, 2)
        engine.save_checkpoint(f"{folder}/ckpt")
        at = masters(engine), states(engine)
        train(engine, rank, 2, first=2)
        return {"at": at, "end": (masters(engine), states(engine))}


def _load(rank: int, world: int, folder: str, stage: int, tier: str, precision: dict, saved: dict, whole: bool) -> None:
    with engine_of(config_of(stage, _tier(tier, folder), **precision)) as engine:
        if not whole:
            train(engine, rank, 1)  # what it had is replaced
        engine.load_checkpoint(f"{folder}/ckpt")
        same(masters(engine), saved["at"][0], f"{tier} masters")
        same(states(engine), saved["at"][1], f"{tier} states")
        if whole:
            train(engine, rank, 2, first=2)
            same(masters(engine), saved["end"][0], f"{tier} masters at the end")
            same(states(engine), saved["end"][1], f"{tier} states at the end")


@pytest.mark.parametrize(("stage", "precision"), [(1, BF16), (2, {}), (3, BF16)])
@pytest.mark.parametrize(("source", "target"), [("nvme", "none"), ("none", "nvme"), ("nvme", "cpu"), ("nvme", "nvme")])
def test_checkpoints_go_from_any_tier_to_any_other(
    tmp_path: Path, stage: int, precision: dict, source: str, target: str
) -> None:
    saved = run_ranks(_save, 2, str(tmp_path), stage, source, precision)[0]
    run_ranks(_load, 2, str(tmp_path), stage, target, precision, saved, whole=True)
    assert [path.name for path in tmp_path.iterdir()] == ["ckpt"]
    # Another stage and number of ranks, over state that is there already.
    run_ranks(_load, 1, str(tmp_path), 3 if stage == 2 else 2, target, precision, saved, whole=False)


def _access(rank: int, world: int, folder: str) -> None:
    for stage, precision in itertools.product((2, 3), ({}, BF16)):
        found = []
        for offload in (None, nvme(folder)):
            with engine_of(config_of(stage, offload, **precision)) as engine:
                param = engine.module.mid.weight
                with pytest.raises(ValueError, match="none yet"):
                    safe_get_full_optimizer_state(param, "exp_avg")
                train(engine, rank, 1)
                with pytest.raises(ValueError, match="there are: exp_avg, exp_avg_sq"):
                    safe_get_full_optimizer_state(param, "exp_age")
                moment = safe_get_full_optimizer_state(param, "exp_avg")
                safe_set_full_optimizer_state(param, moment * 2, "exp_avg")
                safe_set_full_fp32_param(param, safe_get_full_fp32_param(param) + 0.125)
                local = safe_get_local_optimizer_state(param, "exp_avg_sq")
                safe_set_local_optimizer_state(param, local.clone() + 1, "exp_avg_sq")
                read = safe_get_full_optimizer_state(param, "exp_avg")
                assert torch.equal(read, moment * 2)
                train(engine, rank, 1, first=1)
                found.append({**masters(engine), **states(engine)})
        same(found[1], found[0], f"stage {stage} {precision}")


def test_states_in_files_are_read_and_set(tmp_path: Path) -> None:
    run_ranks(_access, 2, str(tmp_path))


def _weights_by_hand(rank: int, world: int, folder: str) -> None:
    """What is written to weights reaches the masters, and the masters the weights."""
    for stage in (2, 3):
        found = []
        for offload in (None, nvme(folder)):
            with engine_of(config_of(stage, offload, **BF16)) as engine:
                train(engine, rank, 1)
                with deepspeed.zero.GatheredParameters(engine.module.head.weight, modifier_rank=0):
                    if stage == 2 or rank == 0:
                        engine.module.head.weight.data.add_(0.5)
                if stage == 2:
                    engine._flat.refresh_master()
                train(engine, rank, 1, first=1)
                found.append(masters(engine))
                state = engine.optimizer.state_dict()  # clients make one that they do not use
                for read in (dict, list, len, copy.deepcopy, pickle.dumps, lambda state: state.get("zero_stage")):
                    with pytest.raises(RuntimeError, match="tile by tile") if offload else contextlib.nullcontext():
                        read(state)
                if offload:
                    assert "use engine.save_checkpoint" in repr(state)
                    with pytest.raises(RuntimeError, match="tile by tile"):
                        engine.optimizer.load_state_dict({})
        same(found[1], found[0], f"stage {stage}")


def test_weights_written_by_hand_reach_the_file(tmp_path: Path) -> None:
    run_ranks(_weights_by_hand, 2, str(tmp_path))


# -- engine.offload_states -----------------------------------------------------------------------------------------------


def _moved(rank: int, world: int, monkey: bool) -> None:
    if monkey:  # as if the host were another device: all is copied, and everything has to be found again
        offload_states._to_host = lambda pin, non_blocking: torch.Tensor.clone
    cpu = {torch.device("cpu")}
    for stage, precision in itertools.product((0, 1, 2, 3), ({}, BF16)):
        expected = _run(rank, config_of(stage, **precision), "ours", windows=4)[1] if stage else None
        with engine_of(config_of(stage, **precision)) as engine:
            train(engine, rank, 2)
            before = masters(engine)
            engine.offload_states()
            assert all(b.grad_shard.numel() == 0 for b in engine._flat.buckets)
            for state in OffloadStateTypeEnum:
                assert get_state_devices(engine, state) == (set() if "buffer" in state.value else cpu)
            with pytest.raises(RuntimeError, match="reload_states"):
                engine._flat.step()
            same(masters(engine), before, "away")
            engine.reload_states()
            train(engine, rank, 1, first=2)
            engine.offload_states(include=["optim_states", OffloadStateTypeEnum.hp_params], pin_memory=False)
            engine.reload_states(non_blocking=True)
            train(engine, rank, 1, first=3)
            if expected is not None:
                same(masters(engine), expected, f"stage {stage} {precision}")
            x, y = next(iter(batches(rank, 1, BATCH)))
            engine.backward(engine(x, y, False))
            with pytest.raises(RuntimeError, match="after step"):
                engine.offload_states()
            with pytest.raises(ValueError, match="optim_states"):
                get_state_devices(engine, "moments")
            with pytest.raises(ValueError, match="cpu"):
                engine.offload_states(device=OffloadDeviceEnum.nvme)


@pytest.mark.parametrize("moving", [False, True])
def test_states_go_away_and_come_back(moving: bool) -> None:
    run_ranks(_moved, 2, moving)


# -- settings ------------------------------------------------------------------------------------------------------------


def _refusals(rank: int, world: int, folder: str) -> None:
    model = make_model("plain")
    torch_adam = torch.optim.AdamW(model.parameters())
    config = {**config_of(2, {"device": "cpu"}), "zero_force_ds_cpu_optimizer": True}
    with pytest.raises(ConfigError, match="zero_force_ds_cpu_optimizer"):
        deepspeed.initialize(model=model, optimizer=torch_adam, config=config)
    with pytest.raises(ConfigError, match="nvme_path"):
        deepspeed.initialize(model=model, optimizer=torch_adam, config=config_of(2, {"device": "nvme"}))
    engine = deepspeed.initialize(
        model=model, config={**config, "optimizer": {"type": "AdamW", "params": {"lr": 0.01}}}
    )[0]
    assert type(engine.basic_optimizer) is DeepSpeedCPUAdam
    engine.destroy()
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    with engine_of(config_of(2, nvme(folder))) as engine:
        plan = plan_memory(engine._flat)
        numbers = f"device {plan.device}, host {plan.host}, pinned 0, disk {plan.disk} "
        assert any("planned bytes a rank: " + numbers in line for line in said), said
    logger.setLevel(logging.WARNING)
    config = config_of(1)
    del config["zero_optimization"]["reduce_bucket_size"]
    config["zero_optimization"]["cpu_offload"] = True
    with engine_of(config) as engine:
        assert engine._flat.settings.offload.device == "cpu"
        train(engine, rank, 1)


def test_settings_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    run_ranks(_refusals, 1, str(tmp_path))


# -- faults --------------------------------------------------------------------------------------------------------------


def _bad_folder(rank: int, world: int, folder: str) -> None:
    good = Path(folder)
    mine = good / "missing" if rank == world - 1 else good
    with pytest.raises(OSError) as caught, engine_of(config_of(2, nvme(mine))):
        pass
    assert "missing" in str(caught.value) and "nvme_path" in str(caught.value), caught.value
    with pytest.raises(OSError, match="nvme_path"), engine_of(config_of(3, nvme("/proc"))):
        pass


def test_a_folder_that_cannot_be_used_is_an_error_on_all_ranks(tmp_path: Path) -> None:
    run_ranks(_bad_folder, 2, str(tmp_path))
    assert not list(tmp_path.iterdir())


def _full(rank: int, world: int, folder: str) -> None:
    if rank == world - 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (8192, resource.RLIM_INFINITY))
    with pytest.raises(OSError) as caught, engine_of(config_of(2, nvme(folder))):
        pass
    assert "bytes" in str(caught.value) and folder in str(caught.value), caught.value


def test_a_full_disk_shows_at_the_start(tmp_path: Path) -> None:
    run_ranks(_full, 2, str(tmp_path))
    assert not list(tmp_path.iterdir())


def _cut_short(rank: int, world: int, folder: str) -> None:
    for stage in (2, 3):
        with engine_of(config_of(stage, nvme(folder, **PIPELINED), **BF16)) as engine:
            train(engine, rank, 2)
            if rank == 0:
                os.ftruncate(engine._flat.states.files._file.descriptor(False), 4096)
            with pytest.raises(OSError) as caught:
                train(engine, rank, 1)
            assert "cut from" in str(caught.value) and ("rank 0" in str(caught.value)) == (rank != 0)
            assert "4096 bytes" in str(caught.value)
            for action in (lambda: train(engine, rank, 1), lambda: engine.save_checkpoint(f"{folder}/no")):
                with pytest.raises((RuntimeError, ValueError), match="last checkpoint"):
                    action()


def test_a_file_cut_short_stops_all_ranks(tmp_path: Path) -> None:
    run_ranks(_cut_short, 2, str(tmp_path))


def _fails_in_mid_step(rank: int, world: int, folder: str) -> None:
    with engine_of(config_of(2, nvme(folder, **PIPELINED), **BF16)) as engine:
        train(engine, rank, 2)
        engine.save_checkpoint(f"{folder}/ckpt")
        at = masters(engine), states(engine)
        train(engine, rank, 2, first=2)
        expected = masters(engine), states(engine)
        if rank == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (8192, resource.RLIM_INFINITY))
        with pytest.raises(OSError) as caught:
            train(engine, rank, 1)
        assert ("write of" in str(caught.value)) and "bytes at offset" in str(caught.value), caught.value
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        with pytest.raises(RuntimeError, match="last checkpoint"):
            train(engine, rank, 1)
        engine.load_checkpoint(f"{folder}/ckpt")
        same(masters(engine), at[0], "mended")
        train(engine, rank, 2, first=2)
        same(masters(engine), expected[0], "mended")
        same(states(engine), expected[1], "mended")


def test_after_a_step_that_failed_only_a_checkpoint_helps(tmp_path: Path) -> None:
    run_ranks(_fails_in_mid_step, 2, str(tmp_path))


def _two_jobs(rank: int, world: int, folder: str) -> None:
    config = config_of(2, nvme(folder), **BF16)
    expected = _run(rank, config_of(2, **BF16), "ours", windows=2)
    with engine_of(config) as first, engine_of(config) as second:
        for window in range(2):
            for engine in (first, second):
                train(engine, rank, 1, first=window)
        for engine in (first, second):
            same(masters(engine), expected[1], "two jobs")


@pytest.mark.parametrize("memory", [False, True])
def test_two_jobs_in_one_folder(memory: bool, tmp_path: Path) -> None:
    """Also where there is no direct I/O."""
    folder = Path("/dev/shm") / f"offload-test-{os.getpid()}" if memory else tmp_path
    folder.mkdir(exist_ok=True)
    try:
        run_ranks(_two_jobs, 1, str(folder))
        assert not list(folder.iterdir())
    finally:
        folder.rmdir() if memory else None


def test_nothing_stays_after_a_kill(tmp_path: Path) -> None:
    ready = tmp_path / "ready"
    folder = tmp_path / "nvme"
    folder.mkdir()
    pid = os.fork()
    if pid == 0:
        try:
            os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")
            torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
            with engine_of(config_of(2, nvme(folder))) as engine:
                train(engine, 0, 1)
                ready.touch()
                time.sleep(60)
        finally:
            os._exit(1)
    try:
        deadline = time.monotonic() + 30
        while not ready.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert ready.exists()
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    assert not list(folder.iterdir())
