"""Saving and loading an engine, in the documented folder layout.

``save_dir/<tag>/`` holds one model file and, with ZeRO, one optimizer file a rank; ``save_dir/latest`` names the newest
tag and is written last; ``save_dir/zero_to_fp32.py`` recovers fp32 weights without this package. Every file appears
complete or not at all. An error on one rank is raised on all of them.
"""

from __future__ import annotations

import logging
import os
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from deepspeed import comm as dist
from deepspeed._core.ckpt.io import atomic_save, atomic_write_text, load_file
from deepspeed._core.ckpt.native import (
    LATEST,
    find_tag_dir,
    model_states_name,
    model_states_path,
    optim_states_name,
    optim_states_paths,
    read_latest,
)
from deepspeed._core.ckpt.reader import NativeZeroReader
from deepspeed.checkpoint.utils import clone_tensors_for_torch_save
from deepspeed.errors import CheckpointError
from deepspeed.runtime import optimizer_state
from deepspeed.utils.logging import log_dist, warning_once
from deepspeed.version import __version__

if TYPE_CHECKING:
    from deepspeed.runtime.engine import DeepSpeedEngine

__all__ = ["LoadWhat", "consolidated", "load", "save", "save_weights"]

T = TypeVar("T")

_SCRIPT = "zero_to_fp32.py"

# Keys of the model file that are ours (or the reference's); all others are the user's client state.
_OWN_KEYS = {
    "module",
    "buffer_names",
    "optimizer",
    "param_shapes",
    "frozen_param_shapes",
    "shared_params",
    "frozen_param_fragments",
    "lr_scheduler",
    "data_sampler",
    "random_ltd",
    "sparse_tensor_module_names",
    "skipped_steps",
    "global_steps",
    "global_samples",
    "dp_world_size",
    "mp_world_size",
    "checkpoint_parallel_dimensions",
    "ds_config",
    "ds_version",
    "rng_states",
}


@dataclass(frozen=True)
class LoadWhat:
    """Which parts of a checkpoint :func:`load` takes."""

    strict: bool = True
    optimizer: bool = True
    scheduler: bool = True
    counters: bool = True
    custom_load_fn: Callable[..., Any] | None = None


def _together(engine: DeepSpeedEngine, action: Callable[[], T]) -> T:
    """Runs ``action`` on every rank; if it fails on any, raises on all. Collective; ``action`` must not be."""
    error: BaseException | None = None
    result: T | None = None
    try:
        result = action()
    except (OSError, RuntimeError, ValueError, KeyError, TypeError) as caught:
        error = caught
    reports: list[Any] = [None] * dist.get_world_size()
    if dist.get_world_size() > 1:
        dist.all_gather_object(reports, None if error is None else f"{type(error).__name__}: {error}")
    if error is not None:
        raise error
    for rank, report in enumerate(reports):
        if report is not None:
            raise CheckpointError(f"rank {rank} failed: {report}")
    return result  # type: ignore[return-value]


# -- saving ------------------------------------------------------------------------------------------------------------


def save(
    engine: DeepSpeedEngine,
    save_dir: str,
    tag: str | None,
    client_state: dict[str, Any],
    save_latest: bool,
    exclude_frozen: bool,
) -> bool:
    """See ``DeepSpeedEngine.save_checkpoint``."""
    chosen = str(tag) if tag is not None else f"global_step{engine.global_steps}"
    folder = Path(save_dir) / chosen

    def check() -> None:
        taken = _OWN_KEYS & set(client_state)
        if taken:
            raise ValueError(f"client_state uses keys that the checkpoint itself needs: {sorted(taken)}; rename them")
        if not chosen or Path(chosen).name != chosen or chosen in (".", ".."):
            raise ValueError(f"tag {chosen!r} cannot be a folder name")
        folder.mkdir(parents=True, exist_ok=True)

    _together(engine, check)
    _validate_tag(engine, chosen)
    flat = engine._flat
    partition = optimizer_state.partition_state(flat) if flat is not None and flat.stage > 0 else None
    rng = _gather_rng(engine)
    first = dist.get_rank(engine.dp_process_group) == 0

    def write() -> None:
        if first:
            state = {**_model_state(engine, exclude_frozen), "rng_states": rng, **client_state}
            atomic_save(state, folder / model_states_name())
        if partition is not None:
            name = optim_states_name(dist.get_rank(engine.dp_process_group), bf16=engine.bfloat16_enabled())
            content = {"optimizer_state_dict": partition, "ds_config": _plain_config(engine), "ds_version": __version__}
            atomic_save(content, folder / name)
        if first:
            _remove_stale(engine, folder)

    _together(engine, write)

    def finish() -> None:
        if first:
            _copy_script(Path(save_dir))
            if save_latest:
                atomic_write_text(Path(save_dir) / LATEST, chosen)

    _together(engine, finish)
    log_dist(f"saved checkpoint {folder}")
    return True


def _validate_tag(engine: DeepSpeedEngine, tag: str) -> None:
    mode = str(engine.checkpoint_tag_validation_mode()).lower()
    if mode == "ignore" or dist.get_world_size() == 1:
        return
    tags: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(tags, tag)
    if len(set(tags)) > 1:
        message = f"ranks save under different tags: {dict(enumerate(tags))}; such a checkpoint does not load"
        if mode == "fail":
            raise ValueError(message + " (checkpoint.tag_validation is Fail)")
        log_dist(message, level=logging.WARNING)


def _model_state(engine: DeepSpeedEngine, exclude_frozen: bool) -> dict[str, Any]:
    module, flat = engine.module, engine._flat
    trained = {slot.param for slot in flat.slots()} if flat is not None else set()
    names = {param: name for name, param in module.named_parameters()}
    frozen = {name: p for p, name in names.items() if p not in trained} if not exclude_frozen else {}
    shared = {
        name: names[param]
        for name, param in module.named_parameters(remove_duplicate=False)
        if names[param] != name and param in trained
    }
    zero = flat is not None and flat.stage > 0
    scheduler = engine.lr_scheduler
    weights = engine.module_state_dict(exclude_frozen_parameters=exclude_frozen)
    return {
        "module": clone_tensors_for_torch_save(weights),
        "buffer_names": [name for name, _ in module.named_buffers()],
        "optimizer": optimizer_state.whole_state(flat) if flat is not None and not zero else None,
        "param_shapes": optimizer_state.group_shapes(flat) if flat is not None else None,
        "frozen_param_shapes": {n: p.shape for n, p in frozen.items()} if zero and frozen else None,
        "shared_params": shared,
        "frozen_param_fragments": (
            {n: p.detach().cpu().clone() for n, p in frozen.items()} if zero and frozen else None
        ),
        "lr_scheduler": scheduler.state_dict() if hasattr(scheduler, "state_dict") else None,
        "data_sampler": None,
        "random_ltd": None,
        "sparse_tensor_module_names": set(),
        "skipped_steps": engine.skipped_steps,
        "global_steps": engine.global_steps,
        "global_samples": engine.global_samples,
        "dp_world_size": engine.dp_world_size,
        "mp_world_size": 1,
        "checkpoint_parallel_dimensions": {"pp_degree": 1, "tp_degree": 1},
        "ds_config": _plain_config(engine),
        "ds_version": __version__,
    }


def _plain_config(engine: DeepSpeedEngine) -> Any:
    return engine.config if isinstance(engine.config, dict) else str(engine.config)


def _gather_rng(engine: DeepSpeedEngine) -> list[Any]:
    states: list[Any] = [None] * dist.get_world_size()
    own = {"cpu": torch.get_rng_state(), "python": random.getstate()}
    if engine.device.type == "cuda":
        own["device"] = torch.cuda.get_rng_state(engine.device)
    if dist.get_world_size() > 1:
        dist.all_gather_object(states, own)
    else:
        states = [own]
    return states


def _remove_stale(engine: DeepSpeedEngine, folder: Path) -> None:
    """Optimizer files of an earlier save under the same tag, by more ranks, by another stage or in another precision."""
    flat = engine._flat
    wanted = set()
    if flat is not None and flat.stage > 0:
        wanted = {optim_states_name(r, bf16=engine.bfloat16_enabled()) for r in range(engine.dp_world_size)}
    for path in folder.glob("*zero_pp_rank_*optim_states.pt"):
        if path.name not in wanted:
            path.unlink()


def _copy_script(root: Path) -> None:
    source = Path(__file__).parent.parent / "utils" / _SCRIPT
    atomic_write_text(root / _SCRIPT, source.read_text(encoding="utf-8"), mode=0o755)


def save_weights(engine: DeepSpeedEngine, save_dir: str, filename: str, exclude_frozen: bool) -> bool:
    """See ``DeepSpeedEngine.save_16bit_model``."""
    state = consolidated(engine, exclude_frozen)

    def write() -> None:
        if state is not None:
            Path(save_dir).mkdir(parents=True, exist_ok=True)
            atomic_save(state, Path(save_dir) / filename)

    _together(engine, write)
    return True


def consolidated(engine: DeepSpeedEngine, exclude_frozen: bool) -> dict[str, Any] | None:
    """The module's state dict as compact CPU tensors on rank 0, None elsewhere. Collective by contract."""
    if dist.get_rank() != 0:
        return None
    state: dict[str, Any] = clone_tensors_for_torch_save(
        engine.module_state_dict(exclude_frozen_parameters=exclude_frozen)
    )
    return state


# -- loading -----------------------------------------------------------------------------------------------------------


def load(
    engine: DeepSpeedEngine, load_dir: str, tag: str | None, what: LoadWhat
) -> tuple[str | None, dict[str, Any] | None]:
    """See ``DeepSpeedEngine.load_checkpoint``. Everything is read and checked before anything is changed."""

    def locate() -> Path | None:
        if tag is None and os.path.isdir(load_dir) and read_latest(load_dir) is None:
            return None
        return find_tag_dir(load_dir, tag)

    folder = _together(engine, locate)
    if folder is None:
        warning_once(f"{load_dir} has no '{LATEST}' file and no tag was given: nothing loaded")
        return None, None
    path, state, reader = _together(engine, lambda: _open(engine, folder, what))
    _together(engine, lambda: _check_module(engine, state, path, what))
    if reader is not None and engine._flat is not None:
        flat, checked = engine._flat, reader
        _together(engine, lambda: optimizer_state.check_matches(flat, checked))
    engine.load_module_state_dict(state["module"], strict=what.strict, custom_load_fn=what.custom_load_fn)
    if reader is not None and engine._flat is not None:
        if engine.zero_load_from_fp32_weights() or engine._flat.stage == 0:
            optimizer_state.load_into(engine._flat, reader)
            engine._flat.publish_weights()
        else:
            optimizer_state.load_into(engine._flat, reader)
            engine._flat.refresh_master()
    if engine._flat is not None:
        engine._flat.zero_grad()
    _load_run(engine, state, what)
    engine.loaded_checkpoint_tag = folder.name
    log_dist(f"loaded checkpoint {folder}")
    return str(path), {key: value for key, value in state.items() if key not in _OWN_KEYS}


def _open(
    engine: DeepSpeedEngine, folder: Path, what: LoadWhat
) -> tuple[Path, dict[str, Any], NativeZeroReader | None]:
    path = model_states_path(folder)
    state = load_file(path)
    if not isinstance(state, dict) or "module" not in state:
        raise CheckpointError(f"{path}: expected a dict with the model's weights under 'module'")
    if not what.optimizer or engine._flat is None:
        return path, state, None
    if not optim_states_paths(folder) and not state.get("optimizer"):
        raise CheckpointError(
            f"{folder} holds no optimizer state (neither optimizer files nor an 'optimizer' entry in {path.name}); "
            "pass load_optimizer_states=False to load the weights only"
        )
    names = [list(group) for group in optimizer_state.group_shapes(engine._flat)]
    return path, state, NativeZeroReader(folder, param_names=names)


def _check_module(engine: DeepSpeedEngine, state: dict[str, Any], path: Path, what: LoadWhat) -> None:
    if what.custom_load_fn is not None:
        return
    saved, mine = state["module"], engine.module.state_dict()
    problems = [
        f"{name!r} has shape {tuple(mine[name].shape)} in the model and {tuple(tensor.shape)} in the checkpoint"
        for name, tensor in saved.items()
        if isinstance(tensor, torch.Tensor) and name in mine and tensor.shape != mine[name].shape
    ]
    if what.strict:
        problems += [f"{name!r} is not in the checkpoint" for name in mine if name not in saved]
        problems += [f"{name!r} is in the checkpoint only" for name in saved if name not in mine]
    if problems:
        more = f" and {len(problems) - 10} more" if len(problems) > 10 else ""
        raise CheckpointError(
            f"{path} is of another model: {'; '.join(problems[:10])}{more}. Nothing was loaded. Missing or extra names "
            "are tolerated with load_module_strict=False"
        )


def _load_run(engine: DeepSpeedEngine, state: dict[str, Any], what: LoadWhat) -> None:
    """Scheduler, counters, random numbers."""
    if what.scheduler and engine.lr_scheduler is not None and state.get("lr_scheduler") is not None:
        engine.lr_scheduler.load_state_dict(state["lr_scheduler"])
    if not what.counters:
        return
    engine.global_steps = int(state.get("global_steps", 0))
    engine.global_samples = int(state.get("global_samples", engine.global_steps * engine.train_batch_size()))
    engine.skipped_steps = int(state.get("skipped_steps", 0))
    engine.micro_steps = engine.global_steps * engine.gradient_accumulation_steps()
    states = state.get("rng_states")
    if not what.optimizer or states is None:
        return
    if len(states) != dist.get_world_size():
        warning_once("the checkpoint was saved by another number of ranks: random states are not restored")
        return
    own = states[dist.get_rank()]
    torch.set_rng_state(own["cpu"])
    version, internal, gauss = own["python"]
    random.setstate((version, tuple(internal), gauss))
    if "device" in own and engine.device.type == "cuda":
        torch.cuda.set_rng_state(own["device"], engine.device)
