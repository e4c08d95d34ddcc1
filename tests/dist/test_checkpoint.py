"""Save and load: a resumed run is the run that went on, bit for bit, wherever it is resumed."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from deepspeed.errors import CheckpointError
from deepspeed.ops.adagrad import DeepSpeedCPUAdagrad
from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam
from deepspeed.ops.lion import DeepSpeedCPULion, FusedLion
from tests.helpers import preload  # noqa: F401 - before ranks are forked
from tests.helpers.ckpt import ADAMW, Noisy, assert_same, build, by_name, config, snapshot, train
from tests.helpers.dist import run_ranks

STAGES = (0, 1, 2)


def draws() -> tuple[float, float, float]:
    return float(torch.rand(())), random.random(), float(np.random.rand())


def resume(rank: int, world: int, folder: str, dtype: str) -> None:
    for stage in STAGES:
        path = f"{folder}/{stage}"
        engine = build(config(stage, dtype))
        train(engine, rank, 4, seed=1)
        if dtype == "fp16":
            assert engine.skipped_steps > 0 and engine.loss_scale < 2**25, "the test wants a history of overflows"
        random.seed(rank)
        np.random.seed(rank)
        np.random.randn()  # leaves a second normal number in store
        client = {"epoch": 3, "nested": {"list": [1, 2.5, None, "x"], "tensor": torch.arange(3) + rank}}
        assert engine.save_checkpoint(path, client_state=client)
        saved = snapshot(engine)
        went_on = train(engine, rank, 3, seed=2)
        random_numbers, final = draws(), snapshot(engine)

        other = build(config(stage, dtype), seed=5)
        groups = list(other.optimizer.param_groups)
        file, got = other.load_checkpoint(path)
        assert file == f"{path}/global_step4/mp_rank_00_model_states.pt"
        assert got["epoch"] == 3 and got["nested"]["list"] == [1, 2.5, None, "x"] and len(got) == 2
        assert got["nested"]["tensor"].tolist() == [0, 1, 2], "the client state is that of rank 0"
        assert_same(snapshot(other), saved, f"stage {stage}: loaded")
        assert all(a is b for a, b in zip(other.optimizer.param_groups, groups, strict=True)), "groups stay live"
        assert other.lr_scheduler.optimizer.param_groups[0] is groups[0]
        assert train(other, rank, 3, seed=2) == went_on
        assert draws() == random_numbers
        assert_same(snapshot(other), final, f"stage {stage}: resumed")

        engine.load_checkpoint(path)  # in place
        assert_same(snapshot(engine), saved, f"stage {stage}: in place")
        assert train(engine, rank, 3, seed=2) == went_on
        assert_same(snapshot(engine), final, f"stage {stage}: resumed in place")


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_resumed_run_is_the_run_that_went_on(tmp_path: Path, world: int, dtype: str) -> None:
    run_ranks(resume, world, str(tmp_path), dtype)


def fresh_state(rank: int, world: int, folder: str) -> None:
    """Before the first step, and right after the first load."""
    for stage in STAGES:
        engine = build(config(stage, "bf16"))
        engine.save_checkpoint(f"{folder}/{stage}")
        other = build(config(stage, "bf16"), seed=3)
        train(other, rank, 1, seed=9)
        other.load_checkpoint(f"{folder}/{stage}")
        assert_same(snapshot(other), snapshot(engine))
        other.save_checkpoint(f"{folder}/{stage}", tag="again")
        assert train(other, rank, 2, 1, dropout_seed=5) == train(engine, rank, 2, 1, dropout_seed=5)
        assert_same(snapshot(other), snapshot(engine))


def test_checkpoint_before_the_first_step(tmp_path: Path) -> None:
    run_ranks(fresh_state, 2, str(tmp_path))


def save_for_elsewhere(rank: int, world: int, folder: str, stage: int, dtype: str) -> dict[str, torch.Tensor]:
    engine = build(config(stage, dtype))
    train(engine, rank, 2, seed=1)
    engine.save_checkpoint(folder, tag=f"from{stage}")
    return by_name(engine)


def load_from_elsewhere(rank: int, world: int, folder: str, tag: str, dtype: str, expected: Any) -> None:
    for stage, bucket in ((0, 10**6), (1, 37), (2, 400)):
        settings = config(stage, dtype)
        settings["zero_optimization"]["reduce_bucket_size"] = bucket
        engine = build(settings, seed=8)
        engine.load_checkpoint(folder, tag=tag)
        assert_same(by_name(engine), expected, f"{tag} into stage {stage} at world size {world}")
        steps = {float(s["step"]) for s in engine.basic_optimizer.state.values()}
        assert steps == {2.0} and engine.global_steps == 2
        train(engine, rank, 1, seed=3)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(("stage", "world", "others"), [(0, 2, (3,)), (1, 3, (1, 2)), (2, 2, (1, 3))])
def test_other_world_sizes_stages_and_buckets(
    tmp_path: Path, stage: int, world: int, others: tuple[int, ...], dtype: str
) -> None:
    expected = run_ranks(save_for_elsewhere, world, str(tmp_path), stage, dtype)[0]
    for other in others:
        run_ranks(load_from_elsewhere, other, str(tmp_path), f"from{stage}", dtype, expected)


def fewer_ranks_same_tag(rank: int, world: int, folder: str, stage: int, dtype: str) -> None:
    engine = build(config(stage, dtype))
    train(engine, rank, 1, seed=world)
    engine.save_checkpoint(folder, tag="same")
    other = build(config(stage, dtype), seed=4)
    other.load_checkpoint(folder, tag="same")
    assert_same(snapshot(other), snapshot(engine))


def test_saving_again_under_a_tag_leaves_nothing_of_the_old_one(tmp_path: Path) -> None:
    for world, stage, dtype in ((3, 2, "fp32"), (2, 1, "bf16"), (1, 2, "bf16"), (2, 0, "fp32")):
        run_ranks(fewer_ranks_same_tag, world, str(tmp_path), stage, dtype)
        optim = {p.name for p in (tmp_path / "same").glob("*optim*")}
        prefix = "bf16_" if dtype == "bf16" else ""
        wanted = {f"{prefix}zero_pp_rank_{r}_mp_rank_00_optim_states.pt" for r in range(world)} if stage else set()
        assert optim == wanted


# -- tags --------------------------------------------------------------------------------------------------------------


def tags(rank: int, world: int, folder: str) -> None:
    engine = build(config(1))
    assert engine.load_checkpoint(folder) == (None, None), "an empty folder is no error"
    train(engine, rank, 1, seed=0)
    engine.save_checkpoint(folder)
    first = snapshot(engine)
    latest = Path(folder, "latest")
    assert latest.read_bytes() == b"global_step1"
    train(engine, rank, 1, seed=1)
    engine.save_checkpoint(folder, "mine", save_latest=False)
    assert latest.read_bytes() == b"global_step1"
    second = snapshot(engine)
    engine.load_checkpoint(folder)
    assert_same(snapshot(engine), first)
    path, _ = engine.load_checkpoint(folder, "mine")
    assert path == f"{folder}/mine/mp_rank_00_model_states.pt" and engine.loaded_checkpoint_tag == "mine"
    assert_same(snapshot(engine), second)
    with pytest.raises(CheckpointError, match=r"'nope'.*global_step1, mine"):
        engine.load_checkpoint(folder, tag="nope")
    for bad in ("a/b", "..", ""):
        with pytest.raises(ValueError, match="cannot be a folder name"):
            engine.save_checkpoint(folder, tag=bad)


def test_tags_and_latest(tmp_path: Path) -> None:
    run_ranks(tags, 2, str(tmp_path))


def tag_modes(rank: int, world: int, folder: str) -> None:
    for mode in ("Ignore", "WARN", "fail"):
        engine = build(config(1, checkpoint={"tag_validation": mode}))
        own = f"{folder}/{mode}"
        if mode == "fail":
            with pytest.raises(ValueError, match=r"different tags: {0: 'rank0', 1: 'rank1'}"):
                engine.save_checkpoint(own, tag=f"rank{rank}")
            torch.distributed.barrier()
            assert not os.path.exists(own)
        else:
            engine.save_checkpoint(own, tag=f"rank{rank}")
            assert Path(own, "latest").read_text() == "rank0"
        engine.save_checkpoint(own, tag="both")
        with (
            pytest.raises(CheckpointError, match="different checkpoints")
            if mode != "fail"
            else pytest.raises(CheckpointError)
        ):
            engine.load_checkpoint(own, tag="both" if rank else "rank0")


def test_tag_validation(tmp_path: Path) -> None:
    run_ranks(tag_modes, 2, str(tmp_path))


# -- what is loaded ----------------------------------------------------------------------------------------------------


def parts(rank: int, world: int, folder: str) -> None:
    for stage in STAGES:
        where = f"{folder}/{stage}"
        engine = build(config(stage, "bf16"))
        train(engine, rank, 2, seed=1)
        engine.save_checkpoint(where)
        saved = snapshot(engine)

        def new(stage: int = stage) -> tuple[Any, dict[str, Any]]:
            other = build(config(stage, "bf16"), seed=7)
            train(other, rank, 1, seed=6)
            return other, snapshot(other)

        def taken(before: dict, after: dict, saved: dict = saved) -> set[str]:
            """Kinds of values that are the saved ones now; all others must be as before."""
            kinds = set()
            for key, value in after.items():
                same = torch.equal(value, saved[key]) if torch.is_tensor(value) else value == saved[key]
                old = torch.equal(value, before[key]) if torch.is_tensor(value) else value == before[key]
                assert same or old or key.startswith("master"), key
                if same and not old:
                    kinds.add(key.split(".")[0])
            return kinds

        other, before = new()
        other.load_checkpoint(where)
        assert taken(before, snapshot(other)) == {"module", "master", "state", "group", "scheduler", "counters"}

        other, before = new()
        other.load_checkpoint(where, load_optimizer_states=False)
        after = snapshot(other)
        assert taken(before, after) >= {"module", "scheduler", "counters"}
        assert all(torch.equal(after[k].bfloat16(), saved[f"module.{k[7:]}"]) for k in after if k.startswith("master."))
        assert not any(k.startswith("state") and not _equal(after[k], before[k]) for k in after)

        other, before = new()
        other.load_checkpoint(where, load_lr_scheduler_states=False)
        assert "scheduler" not in taken(before, snapshot(other))

        other, before = new()
        _, client = other.load_checkpoint(where, load_module_only=True)
        after = snapshot(other)
        assert taken(before, after) == {"module"} and client == {}
        assert all(torch.equal(after[k].bfloat16(), saved[f"module.{k[7:]}"]) for k in after if k.startswith("master."))
        train(other, rank, 1, seed=4)  # goes on from the loaded weights, not from old masters
        moved = snapshot(other)
        assert all(
            float((moved[k] - after[k]).abs().max()) < 0.2 for k in after if k.startswith("master.") if after[k].numel()
        )

        other, before = new()
        seen = []

        def custom(src: dict[str, Any], dst: torch.nn.Module, seen: list = seen) -> None:
            seen.append(set(src))
            dst.load_state_dict(src)

        other.load_checkpoint(where, load_module_only=True, custom_load_fn=custom)
        assert seen == [set(other.module.state_dict())]
        assert taken(before, snapshot(other)) == {"module"}


def _equal(a: Any, b: Any) -> bool:
    return torch.equal(a, b) if torch.is_tensor(a) else a == b


def test_parts_of_a_checkpoint(tmp_path: Path) -> None:
    run_ranks(parts, 2, str(tmp_path))


def without_frozen(rank: int, world: int, folder: str) -> None:
    for stage in STAGES:
        where = f"{folder}/{stage}"
        engine = build(config(stage, "bf16"))
        train(engine, rank, 1, seed=1)
        frozen = [n for n, p in engine.module.named_parameters() if not p.requires_grad]
        assert frozen == ["mid.weight"]
        engine.save_checkpoint(where, exclude_frozen_parameters=True)
        file = torch.load(f"{where}/global_step1/mp_rank_00_model_states.pt", weights_only=True)
        assert "mid.weight" not in file["module"] and "shift" in file["module"]
        other = build(config(stage, "bf16"), seed=3)
        own = other.module.mid.weight.clone()
        with pytest.raises(CheckpointError, match=r"not in the checkpoint: 'mid.weight' \(11, 11\)"):
            other.load_checkpoint(where)
        other.load_checkpoint(where, load_module_strict=False)
        assert torch.equal(other.module.mid.weight, own)
        got, wanted = snapshot(other), snapshot(engine)
        assert_same({**got, "module.mid.weight": 0}, {**wanted, "module.mid.weight": 0})
        assert "mid.weight" not in engine.module_state_dict(exclude_frozen_parameters=True)


def test_exclude_frozen_parameters(tmp_path: Path) -> None:
    run_ranks(without_frozen, 2, str(tmp_path))


# -- optimizers --------------------------------------------------------------------------------------------------------

OPTIMIZERS = {
    "torch AdamW": lambda p: torch.optim.AdamW(p, lr=0.02),
    "torch Adam amsgrad": lambda p: torch.optim.Adam(p, lr=0.02, amsgrad=True),
    "torch SGD": lambda p: torch.optim.SGD(p, lr=0.1),
    "torch SGD momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "torch RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.01, centered=True),
    "torch Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.05),
    "FusedAdam": lambda p: FusedAdam(p, lr=0.02),
    "CPUAdam": lambda p: DeepSpeedCPUAdam(p, lr=0.02),
    "CPUAdagrad": lambda p: DeepSpeedCPUAdagrad(p, lr=0.05),
    "CPULion": lambda p: DeepSpeedCPULion(p, lr=0.002),
    "FusedLion": lambda p: FusedLion(p, lr=0.002),
}
SAME_KIND = [
    {"torch AdamW", "torch Adam amsgrad", "FusedAdam", "CPUAdam"},
    {"CPULion", "FusedLion"},
    {"torch Adagrad", "CPUAdagrad"},
]


def optimizers(rank: int, world: int, folder: str, stage: int) -> None:
    settings = {**config(stage, "bf16"), "zero_allow_untested_optimizer": True}
    del settings["optimizer"], settings["scheduler"]

    def make(name: str, seed: int) -> Any:
        torch.manual_seed(seed)
        model = Noisy(tied=True)
        return build(settings, seed, model, optimizer=OPTIMIZERS[name](model.parameters()))

    for name in OPTIMIZERS:
        engine = make(name, 0)
        train(engine, rank, 2, seed=1)
        engine.save_checkpoint(folder, tag=name.replace(" ", "_"))
        other = make(name, 3)
        other.load_checkpoint(folder)
        assert_same(snapshot(other), snapshot(engine), name)
        engine.load_checkpoint(folder)
        assert train(other, rank, 2, 2, dropout_seed=5) == train(engine, rank, 2, 2, dropout_seed=5)
        assert_same(snapshot(other), snapshot(engine), f"{name} going on")
    for name in ("torch AdamW", "torch SGD momentum", "CPUAdagrad", "FusedLion"):
        engine = make(name, 3)
        before = snapshot(engine)
        for saved in OPTIMIZERS:
            tag = saved.replace(" ", "_")
            if saved == name or any({saved, name} <= kind for kind in SAME_KIND):
                continue
            if {saved, name} == {"torch SGD momentum", "torch SGD"}:
                continue  # one class: momentum is an option, and options are the checkpoint's
            with pytest.raises(CheckpointError, match=r"another kind of optimizer.*load_optimizer_states=False"):
                engine.load_checkpoint(folder, tag=tag)
            assert_same(snapshot(engine), before, f"{saved} into {name}")
    for saved, name in (("torch AdamW", "FusedAdam"), ("CPUAdam", "torch AdamW"), ("torch Adagrad", "CPUAdagrad")):
        engine = make(name, 4)
        engine.load_checkpoint(folder, tag=saved.replace(" ", "_"))
        train(engine, rank, 1, seed=5)


@pytest.mark.parametrize("stage", [*STAGES, 3])
def test_optimizers_and_their_kinds(tmp_path: Path, stage: int) -> None:
    run_ranks(optimizers, 2, str(tmp_path), stage)


def factored(rank: int, world: int, folder: str) -> None:
    """State that is not elementwise goes to the same parameter, or nowhere."""

    def make(stage: int, seed: int) -> Any:
        settings = {**config(stage), "zero_allow_untested_optimizer": True}
        del settings["optimizer"], settings["scheduler"]
        torch.manual_seed(seed)
        model = Noisy()
        filled = [p for p in model.parameters() if p.numel()]
        return build(settings, seed, model, optimizer=torch.optim.Adafactor(filled, lr=0.01))

    engine, other = make(0, 0), make(0, 1)
    train(engine, rank, 2, seed=1)
    engine.save_checkpoint(folder)
    other.load_checkpoint(folder)
    state = other.basic_optimizer.state[other.module.mid.weight]
    assert state["row_var"].shape == (11, 1)
    assert_same(snapshot(other), snapshot(engine))


def test_factored_state_at_stage_0(tmp_path: Path) -> None:
    run_ranks(factored, 2, str(tmp_path))


def schedulers(rank: int, world: int, folder: str) -> None:
    settings = config(2)
    del settings["scheduler"]

    def make(seed: int) -> Any:
        return build(settings, seed, lr_scheduler=lambda opt: torch.optim.lr_scheduler.StepLR(opt, 2, gamma=0.5))

    engine = make(0)
    train(engine, rank, 3, seed=1)
    engine.save_checkpoint(folder)
    other = make(1)
    other.load_checkpoint(folder)
    assert other.get_lr() == engine.get_lr() == [0.01, 0.01]
    train(engine, rank, 1, seed=1)
    train(other, rank, 1, seed=1)
    assert other.get_lr() == engine.get_lr() == [0.005, 0.005]
    ours = build(config(2), 2)
    before = snapshot(ours)
    with pytest.raises(CheckpointError, match="last_batch_iteration"):
        ours.load_checkpoint(folder)
    assert_same(snapshot(ours), before)
    ours.load_checkpoint(folder, load_lr_scheduler_states=False)


def test_client_scheduler(tmp_path: Path) -> None:
    run_ranks(schedulers, 2, str(tmp_path))


def scales(rank: int, world: int, folder: str) -> None:
    engine = build(config(1, "fp16"))
    train(engine, rank, 4, seed=1)
    engine.save_checkpoint(folder)
    static = config(1, "fp16", fp16={"enabled": True, "loss_scale": 64.0})
    other = build(static)
    other.load_checkpoint(folder)
    assert other.loss_scale == 64.0
    other.save_checkpoint(folder, tag="static")
    dynamic = config(1, "fp16", fp16={"enabled": True, "initial_scale_power": 7, "loss_scale_window": 9})
    third = build(dynamic)
    third.load_checkpoint(folder, tag="static")
    assert third.loss_scale == 128.0
    third.load_checkpoint(folder, tag="global_step4")
    assert third.loss_scale == engine.loss_scale and third._flat.loss_scaler.scale_window == 9


def test_loss_scale_goes_on_and_settings_are_the_configs(tmp_path: Path) -> None:
    run_ranks(scales, 1, str(tmp_path))


def test_config_of_the_tests_has_many_buckets(tmp_path: Path) -> None:
    assert ADAMW["type"] == "AdamW"
    assert run_ranks(count_buckets, 1) == [True]


def count_buckets(rank: int, world: int) -> bool:
    return len(build(config(2))._flat.buckets) >= 5
