"""Checkpoints of ZeRO-3: a resumed run is the run that went on; the files are the reference's; damage is noticed."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import deepspeed
from deepspeed._core.ckpt.io import load_file
from deepspeed.errors import CheckpointError
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_get_local_fp32_param,
    safe_get_local_optimizer_state,
)
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint, load_state_dict_from_zero_checkpoint
from tests.helpers import preload  # noqa: F401 - before ranks are forked
from tests.helpers.ckpt import Noisy, assert_same, build, by_name, config, snapshot, train, whole
from tests.helpers.dist import run_ranks
from tests.helpers.fixture_model import FIXTURES


def settings(dtype: str = "fp32", persistent: int = 12, stage: int = 3, **zero: Any) -> dict[str, Any]:
    """Some parameters stay whole, most do not."""
    made = config(stage, dtype)
    made["zero_optimization"].update(zero)
    if dtype == "fp16":
        made["fp16"]["initial_scale_power"] = 19  # overflows in the first steps only
    if stage == 3:
        made["zero_optimization"]["stage3_param_persistence_threshold"] = persistent
    return made


def live_numel(engine: Any) -> int:
    return int(engine._offload.coordinator.live_numel)


# -- resuming ----------------------------------------------------------------------------------------------------------


def draws() -> tuple[float, float, float]:
    return float(torch.rand(())), random.random(), float(np.random.rand())


def resume(rank: int, world: int, folder: str, dtype: str) -> None:
    engine = build(settings(dtype))
    train(engine, rank, 4, seed=1)
    engine.module.shift.fill_(0.5 + rank)  # buffers are a rank's own
    assert engine.skipped_steps > 0 or dtype != "fp16", "the test wants a history of overflows"
    random.seed(rank)
    np.random.seed(rank)
    assert engine.save_checkpoint(folder, client_state={"epoch": 3, "own": torch.arange(3) + rank})
    saved = snapshot(engine)
    went_on = train(engine, rank, 3, seed=2)
    random_numbers, final = draws(), snapshot(engine)
    assert any(not torch.equal(final[key], saved[key]) for key in saved if key.startswith("module."))

    other = build(settings(dtype), seed=5)
    groups = list(other.optimizer.param_groups)
    file, client = other.load_checkpoint(folder)
    assert file == f"{folder}/global_step4/zero_pp_rank_{rank}_mp_rank_00_model_states.pt"
    assert client["epoch"] == 3 and len(client) == 2 and client["own"].tolist() == [rank, 1 + rank, 2 + rank]
    assert_same(snapshot(other), saved, "loaded")
    assert live_numel(other) == 0, "nothing stays gathered but what is persistent"
    assert all(a is b for a, b in zip(other.optimizer.param_groups, groups, strict=True)), "groups stay live"
    assert train(other, rank, 3, seed=2) == went_on
    assert draws() == random_numbers
    assert_same(snapshot(other), final, "resumed")

    engine.load_checkpoint(folder)  # in place
    assert_same(snapshot(engine), saved, "in place")
    assert train(engine, rank, 3, seed=2) == went_on
    assert_same(snapshot(engine), final, "resumed in place")
    engine.save_checkpoint(folder, tag="next")
    engine.load_checkpoint(folder)  # right after the save
    assert_same(snapshot(engine), final, "in place after the save")


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_resumed_run_is_the_run_that_went_on(tmp_path: Path, world: int, dtype: str) -> None:
    run_ranks(resume, world, str(tmp_path), dtype)


def fresh(rank: int, world: int, folder: str) -> None:
    """Before the first step; into a model that was born in parts."""
    engine = build(settings("bf16"))
    engine.save_checkpoint(folder)
    made = settings("bf16")
    with deepspeed.zero.Init(config_dict_or_path=made):
        model = Noisy(tied=True, reused=True, frozen=True)
    other = build(made, 3, model)
    train(other, rank, 1, seed=9)
    other.load_checkpoint(folder)
    assert other.module.shift.dtype == torch.bfloat16, "made inside zero.Init"
    other.module.shift = other.module.shift.float()
    assert_same(snapshot(other), snapshot(engine))
    assert train(other, rank, 3, 1, dropout_seed=5) == train(engine, rank, 3, 1, dropout_seed=5)
    assert_same(snapshot(other), snapshot(engine))


def test_checkpoint_before_the_first_step(tmp_path: Path) -> None:
    run_ranks(fresh, 2, str(tmp_path))


# -- elsewhere ---------------------------------------------------------------------------------------------------------


def save_somewhere(rank: int, world: int, folder: str, stage: int, dtype: str) -> dict[str, torch.Tensor]:
    engine = build(settings(dtype, stage=stage))
    train(engine, rank, 4, seed=1)
    engine.save_checkpoint(folder, tag=f"from{stage}")
    return by_name(engine)


def load_elsewhere(rank: int, world: int, folder: str, tag: str, dtype: str, expected: Any, stages: Any) -> None:
    for stage, zero in stages:
        engine = build(settings(dtype, stage=stage, **zero), seed=8)
        path, _ = engine.load_checkpoint(folder, tag=tag)
        assert os.path.exists(path)
        assert_same(by_name(engine), expected, f"{tag} into stage {stage} at world size {world}")
        assert {float(s["step"]) for s in engine.basic_optimizer.state.values()} == {4.0} and engine.global_steps == 4
        for param in engine.module.parameters():
            if param.requires_grad and stage:
                full, own = (
                    safe_get_full_optimizer_state(param, "exp_avg"),
                    safe_get_local_optimizer_state(param, "exp_avg"),
                )
                assert own.numel() == safe_get_local_fp32_param(param).numel()
                if stage == 3:
                    piece = -(-param.numel() // world)
                    assert torch.equal(own, full.view(-1)[rank * piece : (rank + 1) * piece])
        train(engine, rank, 1, seed=3)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(("world", "others"), [(1, (3,)), (2, (1, 3)), (3, (2,))])
def test_stage_3_folders_at_other_sizes_and_stages(
    tmp_path: Path, world: int, others: tuple[int, ...], dtype: str
) -> None:
    expected = run_ranks(save_somewhere, world, str(tmp_path), 3, dtype)[0]
    stages = [(0, {}), (1, {}), (2, {}), (3, {}), (3, {"reduce_bucket_size": 400, "sub_group_size": 37})]
    for other in others:
        run_ranks(load_elsewhere, other, str(tmp_path), "from3", dtype, expected, stages)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_folders_of_other_stages(tmp_path: Path, stage: int, dtype: str) -> None:
    expected = run_ranks(save_somewhere, 2, str(tmp_path), stage, dtype)[0]
    for world in (2, 3):
        run_ranks(load_elsewhere, world, str(tmp_path), f"from{stage}", dtype, expected, [(3, {})])


def replicas(rank: int, world: int, folder: str) -> None:
    """MiCS: two blocks of ranks hold the model each; one of them saves it."""
    engine = build(settings("bf16", mics_shard_size=2, stage3_gather_16bit_weights_on_model_save=True))
    train(engine, rank, 3, seed=1)
    engine.save_checkpoint(folder)
    names = sorted(os.listdir(f"{folder}/global_step3"))
    assert [name for name in names if "optim" in name] == [
        f"bf16_zero_pp_rank_{r}_mp_rank_00_optim_states.pt" for r in range(2)
    ]
    assert [name for name in names if "model" in name] == [
        f"zero_pp_rank_{r}_mp_rank_00_model_states.pt" for r in range(2)
    ]
    saved = by_name(engine)
    for zero in ({"mics_shard_size": 2}, {}):
        other = build(settings("bf16", **zero), seed=4)
        other.load_checkpoint(folder)
        assert_same(by_name(other), saved)
    state, expected = engine._zero3_consolidated_16bit_state_dict(), whole(engine.module)
    assert (state is None) == (rank > 0)
    if state is not None:
        assert_same(state, expected)


def test_replicated_models_are_saved_once(tmp_path: Path) -> None:
    run_ranks(replicas, 4, str(tmp_path))


# -- files -------------------------------------------------------------------------------------------------------------


def layout(rank: int, world: int, folder: str, dtype: str, sub_group: int | None) -> None:
    engine = build(settings(dtype, **({"sub_group_size": sub_group} if sub_group else {})))
    while engine.global_steps - engine.skipped_steps < 3:
        train(engine, rank, 1, seed=1)
    engine.save_checkpoint(folder, "tag", client_state={"epoch": 2, "note": "x"})
    tag = Path(folder, "tag")
    prefix = "bf16_" if dtype == "bf16" else ""
    optim = [f"{prefix}zero_pp_rank_{r}_mp_rank_00_optim_states.pt" for r in range(world)]
    model = [f"zero_pp_rank_{r}_mp_rank_00_model_states.pt" for r in range(world)]
    assert sorted(os.listdir(tag)) == sorted(["manifest.json", *optim, *model])
    assert sorted(os.listdir(folder)) == ["latest", "tag", "zero_to_fp32.py"]

    own = torch.load(tag / model[rank], weights_only=True)
    theirs = torch.load(
        FIXTURES / "z3_fp32/ckpt/step3" / "zero_pp_rank_0_mp_rank_00_model_states.pt", weights_only=True
    )
    assert set(own) == {*(set(theirs) - {"epoch", "note"}), "ds_format", "ds_rng_states", "epoch", "note"}
    assert {k for k in own if own[k] is None} == {k for k in theirs if theirs[k] is None}
    params = dict(engine.module.named_parameters())
    for name, value in own["module"].items():
        assert value.numel() == (11 if name == "shift" else 0), name
        assert name == "shift" or value.dtype == params[own["shared_params"].get(name, name)].dtype
    assert list(own["module"]) == list(engine.module.state_dict())
    assert own["shared_params"] == {"tied_back.weight": "inp.weight"} and own["buffer_names"] == ["shift"]
    assert own["frozen_param_shapes"] == {"mid.weight": (11, 11)}
    fragment = own["frozen_param_fragments"]["mid.weight"]
    assert torch.equal(fragment, params["mid.weight"].ds_tensor) and fragment.shape == (-(-121 // world),)
    trained = [(n, p) for n, p in params.items() if p.requires_grad]
    groups = [[n for n, p in trained if p.dim() > 1], [n for n, p in trained if p.dim() <= 1]]
    assert [list(group) for group in own["param_shapes"]] == groups
    assert own["dp_world_size"] == world and own["ds_config"]["zero_optimization"]["stage"] == 3

    file = load_file(tag / optim[rank], mmap=False)
    reference = {"zero_stage", "loss_scaler", "dynamic_loss_scale", "overflow", "partition_count"}
    state = file["optimizer_state_dict"]
    assert set(file) == {"optimizer_state_dict", "ds_config", "ds_format", "ds_version"}
    assert set(state) == {*reference, "optimizer_state_dict", "fp32_flat_groups"}
    assert state["zero_stage"] == 3 and state["partition_count"] == world
    flats, inner = state["fp32_flat_groups"], state["optimizer_state_dict"]
    assert [i for group in inner["param_groups"] for i in group["params"]] == list(range(len(flats)))
    assert len(flats) == 2 if sub_group is None else len(flats) > 2
    assert all(flat.untyped_storage().nbytes() == flat.nbytes for flat in flats)
    for key, flat in (("fp32", flats), ("exp_avg", [inner["state"][i]["exp_avg"] for i in range(len(flats))])):
        got = torch.cat(flat).split([-(-params[n].numel() // world) for group in groups for n in group])
        for name, piece in zip([n for group in groups for n in group], got, strict=True):
            param = params[name]
            local = safe_get_local_fp32_param(param) if key == "fp32" else safe_get_local_optimizer_state(param, key)
            assert torch.equal(piece[: local.numel()], local), (key, name)
    assert {float(entry["step"]) for entry in inner["state"].values()} == {3.0}


@pytest.mark.parametrize(("world", "dtype", "sub_group"), [(1, "fp32", None), (2, "bf16", 60), (3, "fp16", None)])
def test_file_layout(tmp_path: Path, world: int, dtype: str, sub_group: int | None) -> None:
    run_ranks(layout, world, str(tmp_path), dtype, sub_group)


def export(rank: int, world: int, folder: str, dtype: str, sub_group: int) -> dict[str, torch.Tensor]:
    engine = build(settings(dtype, sub_group_size=sub_group))
    while engine.global_steps - engine.skipped_steps < 3:
        train(engine, rank, 1, seed=1)
    engine.save_checkpoint(folder)
    values = whole(engine.module)
    for name, param in engine.module.named_parameters(remove_duplicate=False):
        if param.requires_grad:
            values[name] = safe_get_full_fp32_param(param).clone()
    return values


@pytest.mark.parametrize(("world", "dtype", "sub_group"), [(1, "fp32", 10**9), (3, "bf16", 60), (2, "fp16", 10**9)])
def test_fp32_export(tmp_path: Path, world: int, dtype: str, sub_group: int) -> None:
    expected = run_ranks(export, world, str(tmp_path), dtype, sub_group)[0]
    ran = subprocess.run(
        [sys.executable, "-I", "zero_to_fp32.py", ".", "out"],
        cwd=tmp_path,
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    assert f"zero stage 3, world_size: {world}" in ran.stdout
    exported = torch.load(tmp_path / "out" / "pytorch_model.bin", weights_only=True)
    called = get_fp32_state_dict_from_zero_checkpoint(str(tmp_path))
    assert exported["inp.weight"].data_ptr() == exported["tied_back.weight"].data_ptr()
    assert_same(exported, expected)
    assert_same(called, expected)
    assert exported["mid.weight"].dtype == expected["mid.weight"].dtype
    without = get_fp32_state_dict_from_zero_checkpoint(str(tmp_path), exclude_frozen_parameters=True)
    assert without.keys() == expected.keys() - {"mid.weight"}
    model = load_state_dict_from_zero_checkpoint(Noisy(tied=True, reused=True, frozen=True), str(tmp_path))
    for name, param in model.named_parameters():
        assert torch.equal(param, expected[name].float()), name


def frozen_ties(rank: int, world: int, folder: str) -> None:
    """Without an optimizer everything is frozen; names of tied parameters that nobody trains are kept, too."""
    made = settings("bf16")
    del made["optimizer"], made["scheduler"]
    engine = build(made, groups=False)
    engine.save_checkpoint(folder)
    values = whole(engine.module)
    assert sorted(os.listdir(f"{folder}/global_step0")) == [
        "manifest.json",
        *(f"zero_pp_rank_{r}_mp_rank_00_model_states.pt" for r in range(world)),
    ]
    other = build(made, seed=2, groups=False)
    assert not torch.equal(whole(other.module)["back.weight"], values["back.weight"])
    other.load_checkpoint(folder)
    assert_same(whole(other.module), values)
    whole_model = build({**made, "zero_optimization": {"stage": 0}}, seed=3, groups=False)
    whole_model.load_checkpoint(folder)
    assert_same(dict(whole_model.module.state_dict()), values)
    assert_same(get_fp32_state_dict_from_zero_checkpoint(folder), values)
    trained = build(settings("bf16"), seed=3)
    with pytest.raises(CheckpointError, match=r"holds no optimizer state.*load_optimizer_states=False"):
        trained.load_checkpoint(folder)
    trained.load_checkpoint(folder, load_optimizer_states=False)
    assert_same(whole(trained.module), values)


@pytest.mark.parametrize("world", [1, 2])
def test_without_an_optimizer(tmp_path: Path, world: int) -> None:
    run_ranks(frozen_ties, world, str(tmp_path))


def same_tag(rank: int, world: int, folder: str, stage: int, dtype: str) -> None:
    engine = build(settings(dtype, stage=stage))
    train(engine, rank, 1, seed=world)
    engine.save_checkpoint(folder, tag="same")
    other = build(settings(dtype, stage=stage), seed=4)
    other.load_checkpoint(folder, tag="same")
    assert_same(snapshot(other), snapshot(engine))


def test_saving_again_under_a_tag_leaves_nothing_of_the_old_one(tmp_path: Path) -> None:
    for world, stage, dtype in ((3, 3, "fp32"), (2, 3, "bf16"), (2, 2, "fp32"), (1, 3, "fp32"), (1, 0, "fp32")):
        run_ranks(same_tag, world, str(tmp_path), stage, dtype)
        names = {path.name for path in (tmp_path / "same").iterdir()}
        prefix = "bf16_" if dtype == "bf16" else ""
        wanted = {f"{prefix}zero_pp_rank_{r}_mp_rank_00_optim_states.pt" for r in range(world)} if stage else set()
        model = "zero_pp_rank_{}_mp_rank_00_model_states.pt" if stage == 3 else "mp_rank_00_model_states.pt"
        assert names == wanted | {"manifest.json"} | {model.format(r) for r in range(world)}


# -- what is loaded ----------------------------------------------------------------------------------------------------


def parts(rank: int, world: int, folder: str) -> None:
    engine = build(settings("bf16"))
    train(engine, rank, 4, seed=1)
    engine.save_checkpoint(folder)
    saved = snapshot(engine)

    def new() -> tuple[Any, dict[str, Any]]:
        other = build(settings("bf16"), seed=7)
        train(other, rank, 3, seed=6)
        return other, snapshot(other)

    def taken(before: dict[str, Any], after: dict[str, Any]) -> set[str]:
        return {k.split(".")[0] for k in after if _equal(after[k], saved[k]) and not _equal(after[k], before[k])}

    def follow(after: dict[str, Any]) -> None:
        """Masters are the loaded weights, in their precision."""
        for key, value in after.items():
            if key.startswith("module."):
                assert torch.equal(value, saved[key]), key
            if key.startswith("master."):
                assert torch.equal(value, saved[f"module.{key[7:]}"].float()), key

    for options, kinds in (
        ({}, {"module", "master", "state", "group", "scheduler", "counters"}),
        ({"load_lr_scheduler_states": False}, {"module", "master", "state", "group", "counters"}),
    ):
        other, before = new()
        other.load_checkpoint(folder, **options)
        assert taken(before, snapshot(other)) == kinds, options

    other, before = new()
    other.load_checkpoint(folder, load_optimizer_states=False)
    after = snapshot(other)
    follow(after)
    assert all(_equal(after[k], before[k]) for k in after if k.startswith("state"))
    assert {"scheduler", "counters"} <= taken(before, after)
    train(other, rank, 1, seed=4)  # goes on from the loaded weights, not from old masters
    moved = snapshot(other)
    assert all(
        float((moved[k] - after[k]).abs().max()) < 0.2 for k in after if k.startswith("master.") and after[k].numel()
    )

    other, before = new()
    assert other.load_checkpoint(folder, load_module_only=True)[1] == {}
    after = snapshot(other)
    follow(after)
    assert taken(before, after) <= {"module", "master"} and _equal(after["counters"], before["counters"])

    other, before = new()
    seen: list[dict[str, torch.Tensor]] = []

    def custom(src: dict[str, torch.Tensor], dst: nn.Module) -> None:
        seen.append(src)
        dst.load_state_dict(src)

    other.load_checkpoint(folder, load_module_only=True, custom_load_fn=custom)
    assert_same(dict(seen[0]), {k[7:]: v for k, v in saved.items() if k.startswith("module.")})
    assert seen[0]["inp.weight"] is seen[0]["tied_back.weight"]
    follow(snapshot(other))

    made = settings("bf16", load_from_fp32_weights=False)
    other = build(made, seed=7)
    other.load_checkpoint(folder)
    follow(snapshot(other))
    engine.load_checkpoint(folder)
    with (
        pytest.raises((RuntimeError, CheckpointError), match="gathered by deepspeed"),
        deepspeed.zero.GatheredParameters([engine.module.back.weight]),
    ):
        engine.load_checkpoint(folder)
    assert_same(snapshot(engine), saved)


def _equal(a: Any, b: Any) -> bool:
    return torch.equal(a, b) if torch.is_tensor(a) else a == b


def test_parts_of_a_checkpoint(tmp_path: Path) -> None:
    run_ranks(parts, 2, str(tmp_path))


def without_frozen(rank: int, world: int, folder: str) -> None:
    engine = build(settings("bf16"))
    train(engine, rank, 1, seed=1)
    engine.save_checkpoint(folder, exclude_frozen_parameters=True)
    file = torch.load(f"{folder}/global_step1/zero_pp_rank_{rank}_mp_rank_00_model_states.pt", weights_only=True)
    assert "mid.weight" not in file["module"] and "shift" in file["module"]
    assert file["frozen_param_shapes"] is None and file["frozen_param_fragments"] is None
    for stage in (3, 2):
        other = build(settings("bf16", stage=stage), seed=3)
        own = whole(other.module)["mid.weight"]
        with pytest.raises(CheckpointError, match=r"not in the checkpoint: 'mid.weight' \(11, 11\)"):
            other.load_checkpoint(folder)
        other.load_checkpoint(folder, load_module_strict=False)
        got, wanted = by_name(other), by_name(engine)
        assert torch.equal(got.pop("module.mid.weight"), own)
        wanted.pop("module.mid.weight")
        assert_same(got, wanted)


def test_exclude_frozen_parameters(tmp_path: Path) -> None:
    run_ranks(without_frozen, 2, str(tmp_path))


class Renaming(Noisy):
    """Once called its head another name."""

    def __init__(self) -> None:
        super().__init__(tied=True)
        self.register_state_dict_post_hook(lambda module, state, prefix, _: None)
        self.register_load_state_dict_pre_hook(self._translate)

    @staticmethod
    def _translate(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
        if prefix + "inp.weight" in state:
            state[prefix + "inp.weight"] = state[prefix + "inp.weight"] * 2
            state.pop(prefix + "tied_back.weight", None)


def translating(rank: int, world: int, folder: str) -> None:
    engine = build(settings("bf16"), model=Noisy(tied=True))
    train(engine, rank, 3, seed=1)
    engine.save_checkpoint(folder)
    values = whole(engine.module)
    other = build(settings("bf16"), model=Renaming())
    other.load_checkpoint(folder, load_optimizer_states=False, load_module_strict=False)
    got = whole(other.module)
    assert torch.equal(got["inp.weight"], values["inp.weight"] * 2)
    assert torch.equal(got["back.weight"], values["back.weight"])
    before = snapshot(other)

    def fails(src: dict[str, torch.Tensor], dst: nn.Module) -> None:
        dst.load_state_dict({name: torch.zeros_like(value) for name, value in src.items()}, strict=False)
        if rank == 1:
            raise KeyError("mine")

    with pytest.raises((KeyError, CheckpointError), match="mine"):
        engine.load_checkpoint(folder, custom_load_fn=fails)
    engine.load_checkpoint(folder)
    assert_same(whole(engine.module), values)
    assert_same(snapshot(other), before)


def test_modules_that_translate_names_and_values(tmp_path: Path) -> None:
    run_ranks(translating, 2, str(tmp_path))


def rebound(rank: int, world: int, folder: str) -> None:
    """What a user has put into ``ds_tensor.data`` is what is saved."""
    engine = build(settings())
    weight = engine.module.back.weight
    weight.ds_tensor.data = torch.full_like(weight.ds_tensor, 0.25)
    engine.save_checkpoint(folder)
    other = build(settings(), seed=2)
    other.load_checkpoint(folder)
    assert torch.equal(whole(other.module)["back.weight"], torch.full((13, 11), 0.25))
    assert torch.equal(safe_get_full_fp32_param(other.module.back.weight), torch.full((13, 11), 0.25))
    other.module.back.weight.ds_tensor.data = torch.zeros_like(weight.ds_tensor)
    other.load_checkpoint(folder)
    assert_same(snapshot(other), snapshot(engine))
    train(other, rank, 1, seed=1)


def test_rebound_shards(tmp_path: Path) -> None:
    run_ranks(rebound, 2, str(tmp_path))


# -- damage ------------------------------------------------------------------------------------------------------------


def damaged(rank: int, world: int, folder: str) -> None:
    engine = build(settings("bf16"))
    train(engine, rank, 3, seed=1)
    engine.save_checkpoint(f"{folder}/good")
    tag = "global_step3"
    train(engine, rank, 1, seed=2)
    before = snapshot(engine)

    def expect(damage: Callable[[Path], Any], message: str, model: Any = None, **options: Any) -> None:
        place = Path(folder, "bad")
        torch.distributed.barrier()
        if rank == 0:
            shutil.rmtree(place, ignore_errors=True)
            shutil.copytree(f"{folder}/good", place)
            (place / tag / "manifest.json").unlink()  # whose checksums would tell already
            damage(place / tag)
        torch.distributed.barrier()
        target = engine if model is None else build(settings("bf16"), model=model)
        own = before if model is None else snapshot(target)
        with pytest.raises(CheckpointError, match=message):
            target.load_checkpoint(str(place), **options)
        assert_same(snapshot(target), own)
        assert live_numel(target) == 0

    def rewrite(path: Path, change: Callable[[Any], Any]) -> None:
        content = torch.load(path, weights_only=False)  # as objects, which are written again
        change(content)
        torch.save(content, path)

    optim, model = "bf16_zero_pp_rank_{}_mp_rank_00_optim_states.pt", "zero_pp_rank_{}_mp_rank_00_model_states.pt"
    expect(lambda p: (p / optim.format(1)).unlink(), "optimizer files of 2 ranks, but those of rank 1 are missing")
    expect(lambda p: (p / model.format(1)).unlink(), "model files of 2 ranks, but those of rank 1 are missing")
    expect(lambda p: (p / model.format(0)).unlink(), "expected mp_rank_00_model_states.pt")
    for rank_file in (optim.format(1), model.format(1)):
        expect(lambda p, f=rank_file: (p / f).write_bytes((p / f).read_bytes()[:3000]), "truncated, damaged")
    for r in range(2):
        expect(
            lambda p, r=r: rewrite(p / model.format(r), lambda c: c["frozen_param_fragments"].pop("mid.weight")),
            "'mid.weight' of shape .* is not complete in the model files of 2 ranks",
        )
    expect(lambda p: [(p / optim.format(r)).unlink() for r in range(2)], "keeps trained weights in the optimizer files")
    expect(
        lambda p: rewrite(p / optim.format(1), lambda c: c["optimizer_state_dict"].update(partition_count=3)),
        "is of a run on 3 ranks",
    )
    expect(
        lambda p: [
            rewrite(p / optim.format(r), lambda c: c["optimizer_state_dict"]["fp32_flat_groups"].pop())
            for r in range(2)
        ],
        "fp32 elements a rank, the files have",
    )
    # Another model: other shapes, other names.
    expect(lambda p: None, "of another shape: 'inp.weight' .* in the model", model=Wider())
    expect(
        lambda p: None, "not in the checkpoint: 'extra.weight'", model=Noisy(tied=True, frozen=True, unused=True)
    )


class Wider(Noisy):
    def __init__(self) -> None:
        super().__init__(tied=True, frozen=True)
        self.inp = nn.Linear(13, 12)


def test_damaged_and_foreign_folders_change_nothing(tmp_path: Path) -> None:
    run_ranks(damaged, 2, str(tmp_path))


def failing_save(rank: int, world: int, folder: str, failing: int) -> None:
    engine = build(settings())
    train(engine, rank, 3, seed=1)
    engine.save_checkpoint(folder)
    first = snapshot(engine)
    torch.distributed.barrier()
    files = {p: p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}
    train(engine, rank, 1, seed=2)
    real = os.fsync

    def broken(handle: int) -> None:
        raise OSError(28, "No space left on device")

    for tag in (None, "global_step3"):
        torch.distributed.barrier()
        if rank == failing:
            os.fsync = broken
        message = "No space left" if rank == failing else f"rank {failing} failed: OSError.*No space left"
        with pytest.raises((OSError, CheckpointError), match=message):
            engine.save_checkpoint(folder, tag=tag)
        os.fsync = real
        torch.distributed.barrier()
        assert {p: p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()} == files
    engine.load_checkpoint(folder)
    assert_same(snapshot(engine), first)


@pytest.mark.parametrize("failing", [0, 1])
def test_a_save_that_fails_on_one_rank_changes_nothing(tmp_path: Path, failing: int) -> None:
    run_ranks(failing_save, 2, str(tmp_path), failing)
