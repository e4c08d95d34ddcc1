"""What is wrong is said once, clearly, on every rank, and changes nothing: not the engine, not the model, not the disk."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import deepspeed
from deepspeed.errors import CheckpointError, ConfigError
from tests.helpers import preload  # noqa: F401 - before ranks are forked
from tests.helpers.ckpt import Noisy, assert_same, build, config, snapshot, train
from tests.helpers.dist import run_ranks

TAG = "global_step1"
MODEL = f"{TAG}/mp_rank_00_model_states.pt"


def optim(rank: int) -> str:
    return f"{TAG}/zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"


def files_in(folder: str | Path) -> dict[str, bytes | None]:
    return {str(p): p.read_bytes() if p.is_file() else None for p in Path(folder).rglob("*")}


# -- checkpoints -------------------------------------------------------------------------------------------------------


def truncate(path: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        size = (folder / path).stat().st_size
        os.truncate(folder / path, size // 2)

    return damage


def remove(path: str) -> Callable[[Path], None]:
    return lambda folder: (folder / path).unlink()


def write(path: str, content: bytes) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / path).write_bytes(content)

    return damage


def edit(path: str, change: Callable[[Any], Any]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        content = torch.load(folder / path, weights_only=False)  # as objects, which are written again
        torch.save(change(content), folder / path)

    return damage


class Foreign:
    """A class that a file may name and loading must not build."""


def set_count(count: int) -> Callable[[Any], Any]:
    def change(content: Any) -> Any:
        content["optimizer_state_dict"]["partition_count"] = [count, count]
        return content

    return change


def reshape(content: Any) -> Any:
    content["module"]["mid.bias"] = torch.zeros(12)
    return content


def rename(content: Any) -> Any:
    content["module"]["middle.bias"] = content["module"].pop("mid.bias")
    return content


def other_trained(content: Any) -> Any:
    content["param_shapes"][0]["mid.weight"] = torch.Size([11, 11])
    return content


def fewer_elements(content: Any) -> Any:
    state = content["optimizer_state_dict"]
    state["single_partition_of_fp32_groups"][0] = state["single_partition_of_fp32_groups"][0][:-20].clone()
    return content


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "folder missing": (shutil.rmtree, "no such folder"),
    "latest pointing nowhere": (write("latest", b"global_step99"), "'global_step99'.*global_step1"),
    "latest empty": (write("latest", b""), "is empty"),
    "latest not text": (write("latest", b"\xff\xfe\x00"), "expected a file with one tag name"),
    "tag folder is a file": (lambda f: (shutil.rmtree(f / TAG), (f / TAG).write_text("x")), "is not a folder"),
    "model file missing": (remove(MODEL), "expected mp_rank_00_model_states.pt"),
    "model file truncated": (truncate(MODEL), "truncated, damaged"),
    "model file empty": (write(MODEL, b""), "0 bytes"),
    "model file of another kind": (edit(MODEL, lambda c: [1, 2]), "expected a dict with the model's weights"),
    "model file names a class": (edit(MODEL, lambda c: {**c, "x": Foreign()}), "Foreign"),
    "optimizer file of rank 0 truncated": (truncate(optim(0)), "rank_0.*truncated, damaged"),
    "optimizer file of rank 1 truncated": (truncate(optim(1)), "rank_1.*truncated, damaged"),
    "optimizer file of rank 1 missing": (remove(optim(1)), "those of rank 1 are missing"),
    "optimizer file of rank 0 missing": (remove(optim(0)), "those of rank 0 are missing"),
    "all optimizer files missing": (lambda f: (remove(optim(0))(f), remove(optim(1))(f)), "holds no optimizer state"),
    "optimizer file of another kind": (edit(optim(1), lambda c: {"a": 1}), "optimizer_state_dict"),
    "optimizer file of another world": (edit(optim(1), set_count(3)), "mixes two saves"),
    "optimizer file lacks elements": (edit(optim(0), fewer_elements), "group 0"),
    "weights of another shape": (edit(MODEL, reshape), r"'mid.bias' \(11,\) in the model and \(12,\)"),
    "weights of other names": (
        edit(MODEL, rename),
        "not in the checkpoint: 'mid.bias'.*in the checkpoint only: 'middle.bias'",
    ),
    "other parameters trained": (edit(MODEL, other_trained), "mid.weight|group 0"),
    "no parameter names": (edit(MODEL, lambda c: {**c, "param_shapes": None}), "param_shapes"),
    "no schedule index": (edit(MODEL, lambda c: {**c, "lr_scheduler": {"x": 1}}), "last_batch_iteration"),
}


def damaged_checkpoints(rank: int, world: int, root: str) -> None:
    engine = build(config(2))
    train(engine, rank, 1, seed=1)
    engine.save_checkpoint(f"{root}/good")
    train(engine, rank, 1, seed=2)
    before = snapshot(engine)
    for number, (name, (damage, message)) in enumerate(DAMAGE.items()):
        folder = Path(root, f"case{number}")
        if rank == 0:
            shutil.copytree(f"{root}/good", folder)
            damage(folder)
        torch.distributed.barrier()
        # Once as it is, when sizes and checksums tell; then as a folder that never had such.
        for wanted in ("", message):
            disk = files_in(folder)
            if wanted or not name.startswith("latest"):  # the one checkpoint is whole, and found without that file
                with pytest.raises(CheckpointError) as caught:
                    engine.load_checkpoint(str(folder))
                assert caught.match(f"(?s){wanted}"), name
            assert_same(snapshot(engine), before, name)
            assert files_in(folder) == disk, name
            torch.distributed.barrier()
            if rank == 0 and (folder / TAG).is_dir():
                (folder / TAG / "manifest.json").unlink(missing_ok=True)
            torch.distributed.barrier()
    assert engine.loaded_checkpoint_tag is None
    path, _ = engine.load_checkpoint(f"{root}/good")  # and the engine still works
    assert path is not None
    train(engine, rank, 1, seed=2)
    assert_same(snapshot(engine), before)


def test_damaged_checkpoints(tmp_path: Path) -> None:
    run_ranks(damaged_checkpoints, 2, str(tmp_path))


def seen_by_one_rank(rank: int, world: int, root: str) -> None:
    engine = build(config(1))
    train(engine, rank, 1, seed=1)
    engine.save_checkpoint(f"{root}/good")
    train(engine, rank, 1, seed=2)
    before = snapshot(engine)

    def mine(text: str) -> str:
        return text if rank == 1 else f"rank 1 failed: .*{text}"

    with pytest.raises(CheckpointError, match=mine("no such folder")):
        engine.load_checkpoint(f"{root}/good" if rank == 0 else f"{root}/nowhere")
    with pytest.raises(CheckpointError, match="different checkpoints"):
        os.makedirs(f"{root}/empty", exist_ok=True)
        engine.load_checkpoint(f"{root}/good" if rank == 0 else f"{root}/empty")

    def custom(src: Any, dst: torch.nn.Module) -> None:
        if rank == 1:
            with torch.no_grad():
                dst.mid.bias.zero_()
            raise LookupError("my own trouble")
        dst.load_state_dict(src)

    with pytest.raises((CheckpointError, LookupError), match=mine("my own trouble")):
        engine.load_checkpoint(f"{root}/good", custom_load_fn=custom)
    assert_same(snapshot(engine), before)
    if rank == 1:
        Path(root, "occupied").write_text("a file")
    torch.distributed.barrier()
    with pytest.raises(OSError if rank == 0 else CheckpointError, match="occupied"):  # rank 0 makes the folder
        engine.save_checkpoint(f"{root}/occupied")
    with pytest.raises(OSError, match="occupied"):
        engine.save_16bit_model(f"{root}/occupied") if rank == 0 else _reraise(engine, root)
    assert Path(root, "occupied").read_text() == "a file"
    train(engine, rank, 1, seed=3)


def _reraise(engine: Any, root: str) -> None:
    try:
        engine.save_16bit_model(f"{root}/occupied")
    except CheckpointError as error:
        assert "rank 0 failed" in str(error)
        raise OSError(str(error)) from error


def test_what_one_rank_sees_reaches_all(tmp_path: Path) -> None:
    run_ranks(seen_by_one_rank, 2, str(tmp_path))


# -- configs -----------------------------------------------------------------------------------------------------------

BASE = {"train_micro_batch_size_per_gpu": 2, "optimizer": {"type": "AdamW", "params": {"lr": 0.01}}}
ZERO = {**BASE, "zero_optimization": {"stage": 2}}

CONFIGS: dict[str, tuple[Any, str]] = {
    "stage of a wrong type": ({**BASE, "zero_optimization": {"stage": "two"}}, "zero_optimization.stage"),
    "stage out of range": ({**BASE, "zero_optimization": {"stage": 7}}, "zero_optimization.stage"),
    "negative bucket": ({**BASE, "zero_optimization": {"stage": 2, "reduce_bucket_size": -5}}, "reduce_bucket_size"),
    "negative micro batch": ({**BASE, "train_micro_batch_size_per_gpu": -2}, "train_micro_batch_size_per_gpu"),
    "micro batch of a wrong type": ({**BASE, "train_micro_batch_size_per_gpu": "four"}, "train_micro_batch_size"),
    "negative clipping": ({**BASE, "gradient_clipping": -1.0}, "gradient_clipping"),
    "a section that is no dict": ({**BASE, "zero_optimization": 2}, "zero_optimization"),
    "triangle does not close": (
        {**BASE, "train_batch_size": 32, "gradient_accumulation_steps": 3},
        r"(?s)32.*2.*3.*",
    ),
    "triangle does not divide": ({**BASE, "train_batch_size": 7}, "7"),
    "no batch size": ({"optimizer": BASE["optimizer"]}, "train_batch_size"),
    "file missing": ("nowhere/ds_config.json", "nowhere/ds_config.json"),
    "config of a wrong type": (["stage", 2], "list"),
    "no config": (None, "config"),
    "feature that is off": ({**ZERO, "sparse_gradients": True}, "sparse_gradients"),
    "two precisions": ({**ZERO, "fp16": {"enabled": True}, "bf16": {"enabled": True}}, "fp16"),
    "unknown optimizer": ({**BASE, "optimizer": {"type": "AdamX"}}, "AdamX"),
    "unknown optimizer argument": ({**BASE, "optimizer": {"type": "AdamW", "params": {"rl": 1}}}, "rl"),
    "negative learning rate": ({**BASE, "optimizer": {"type": "AdamW", "params": {"lr": -1}}}, "lr|learning rate"),
    "unknown scheduler": ({**ZERO, "scheduler": {"type": "WarmDown"}}, "WarmDown"),
    "unknown key where strict": ({**ZERO, "strict": True, "zero_optimisation": {}}, "zero_optimization"),
}


def bad_configs(rank: int, world: int, root: str) -> None:
    os.chdir(root)
    Path(root, f"broken{rank}.json").write_text('{"train_batch_size": 4,, }')
    Path(root, f"twice{rank}.json").write_text('{"train_batch_size": 4, "train_batch_size": 8}')
    cases = {
        **CONFIGS,
        "broken file": (f"broken{rank}.json", f"broken{rank}.json"),
        "key given twice": (f"twice{rank}.json", "train_batch_size"),
    }
    torch.distributed.barrier()
    disk = files_in(root)
    torch.manual_seed(rank)
    model = Noisy()
    before = {name: (t.data_ptr(), t.detach().clone()) for name, t in model.state_dict().items()}
    for name, (settings, message) in cases.items():
        kept = json.dumps(settings)
        with pytest.raises(ConfigError) as caught:
            deepspeed.initialize(model=model, config=settings)
        assert caught.match(message), name
        assert json.dumps(settings) == kept, name
        for key, tensor in model.state_dict().items():
            pointer, value = before[key]
            assert tensor.data_ptr() == pointer and torch.equal(tensor, value), f"{name} changed {key}"
    assert files_in(root) == disk
    torch.distributed.barrier()
    engine = deepspeed.initialize(model=model, config=ZERO)[0]  # nothing is left behind that would be in the way
    train(engine, rank, 1, seed=1)


def test_bad_configs(tmp_path: Path) -> None:
    run_ranks(bad_configs, 2, str(tmp_path))


def bad_schedule(rank: int, world: int) -> None:
    model = Noisy()
    before = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    with pytest.raises(ConfigError, match="warm"):
        settings = {**ZERO, "scheduler": {"type": "WarmupLR", "params": {"warm": 1}}}
        deepspeed.initialize(model=model, config=settings)
    assert {name: tensor.data_ptr() for name, tensor in model.state_dict().items()} == before


def test_bad_schedule_arguments_leave_the_model_alone() -> None:
    run_ranks(bad_schedule, 2)


def bad_arguments(rank: int, world: int) -> None:
    model = Noisy()
    clean = {k: v for k, v in ZERO.items() if k != "optimizer"}
    with pytest.raises(ConfigError, match=r"torch.nn.Module, not dict"):
        deepspeed.initialize(model={}, config=ZERO)
    with pytest.raises(ConfigError, match="callable that makes one"):
        deepspeed.initialize(model=model, config=clean, optimizer="AdamW")
    with pytest.raises(ConfigError, match="returned int"):
        deepspeed.initialize(model=model, config=clean, optimizer=lambda groups: 3)
    with pytest.raises(ConfigError, match="zero_allow_untested_optimizer"):
        untested = torch.optim.Rprop(model.parameters())
        deepspeed.initialize(model=model, config=clean, optimizer=untested)
    for param in model.parameters():
        param.requires_grad_(False)
    with pytest.raises(ConfigError, match="no trainable parameters"):
        deepspeed.initialize(model=model, config=ZERO)


def test_bad_arguments() -> None:
    run_ranks(bad_arguments, 2)
