"""Saving and loading an engine, in the documented folder layout.

``save_dir/<tag>/`` holds one model file (with ZeRO-3 one a rank) and, with ZeRO, one optimizer file a rank;
``save_dir/latest`` names the newest tag and is written last; ``save_dir/zero_to_fp32.py`` recovers fp32 weights without
this package. Every file appears complete or not at all. An error on one rank is raised on all of them.
"""

from __future__ import annotations

import copy
import io
import json
import logging
import os
import random
from collections import OrderedDict
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import numpy as np
import torch

from deepspeed import comm as dist
from deepspeed._core.ckpt.io import StagedFile, atomic_save, atomic_write_text, load_file, refused_names, stage_save
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
from deepspeed._core.ckpt.weights import PartitionedWeights, is_partitioned
from deepspeed._core.params.handle import handle_of
from deepspeed.checkpoint.utils import clone_tensors_for_torch_save
from deepspeed.comm.agreement import together
from deepspeed.errors import CheckpointError
from deepspeed.runtime import optimizer_state, partitioned_state
from deepspeed.runtime.zero.module_state import is_state_hook, named_handles
from deepspeed.utils.logging import log_dist, warning_once
from deepspeed.version import __version__

if TYPE_CHECKING:
    from deepspeed.runtime.engine import DeepSpeedEngine

__all__ = ["LoadWhat", "consolidated", "load", "save", "save_weights"]

T = TypeVar("T")

_SCRIPT = "zero_to_fp32.py"

_RNG = "ds_rng_states"

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
    _RNG,
}


@dataclass(frozen=True)
class LoadWhat:
    """Which parts of a checkpoint :func:`load` takes."""

    strict: bool = True
    optimizer: bool = True
    scheduler: bool = True
    counters: bool = True
    custom_load_fn: Callable[..., Any] | None = None


@dataclass(frozen=True)
class _Opened:
    """A checkpoint that was found and read, but not loaded."""

    path: Path
    """The model file."""
    state: dict[str, Any]
    """Its content."""
    reader: NativeZeroReader | None
    """Optimizer state, if that is to be loaded."""
    weights: PartitionedWeights | None
    """Where the weights are, in a folder of stage 3."""

    def entries(self) -> dict[str, Any]:
        """The module's entries; partitioned ones as tensors of their true shapes, without data."""
        module: dict[str, Any] = self.state["module"]
        if self.weights is None:
            return module
        known = self.weights
        return {
            name: torch.empty(known.shape(name), dtype=value.dtype, device="meta") if name in known else value
            for name, value in module.items()
        }


def _together(action: Callable[[], T]) -> T:
    return together(action, CheckpointError)


def _gather(value: Any) -> list[Any]:
    """``value`` of every rank. Collective."""
    values: list[Any] = [value] * dist.get_world_size()
    if dist.get_world_size() > 1:
        dist.all_gather_object(values, value)
    return values


def _mp_rank(engine: DeepSpeedEngine) -> int:
    """Which model-parallel part of the model this rank holds; 0 without model parallelism."""
    for getter in ("get_model_parallel_rank", "get_tensor_model_parallel_rank"):
        if hasattr(engine.mpu, getter):
            return int(getattr(engine.mpu, getter)())
    return 0


# -- saving ------------------------------------------------------------------------------------------------------------


def save(
    engine: DeepSpeedEngine,
    save_dir: str,
    tag: str | None,
    client_state: dict[str, Any],
    save_latest: bool,
    exclude_frozen: bool,
) -> bool:
    """See ``DeepSpeedEngine.save_checkpoint``.

    Every rank first writes under temporary names. Only when all have succeeded do the files get theirs, and ``latest``
    is written after that.
    """
    chosen = str(tag) if tag is not None else f"global_step{engine.global_steps}"
    folder = Path(save_dir) / chosen

    _together(lambda: _check_names(chosen, client_state))
    _validate_tag(engine, chosen)
    _together(lambda: folder.mkdir(parents=True, exist_ok=True))
    flat = engine._flat
    if flat is not None:
        flat.settle_weights()
    partition = optimizer_state.partition_state(flat) if flat is not None and flat.stage > 0 else None
    rng = _gather(_rng_state(engine))
    rank, _, writes = partitioned_state.shard_rank(engine)
    first = dist.get_rank(engine.dp_process_group) == 0
    staged: list[StagedFile] = []

    def write() -> None:
        if writes and (first or engine._offload is not None):
            state = {**_model_state(engine, exclude_frozen), _RNG: rng, **client_state}
            staged.append(stage_save(state, folder / _model_name(engine, rank)))
            if refused_names(staged[-1].scratch):
                _refuse_objects(state)
        if writes and partition is not None:
            content = {"optimizer_state_dict": partition, "ds_config": _plain_config(engine), "ds_version": __version__}
            staged.append(stage_save(content, folder / _optim_name(engine, rank)))
            if refused_names(staged[-1].scratch):
                _refuse_objects({"optimizer": partition})

    try:
        _together(write)
    except BaseException:
        for file in staged:
            file.discard()
        with suppress(OSError):  # it goes only if it is empty, and so was made for this save
            folder.rmdir()
        raise

    def publish() -> None:
        for file in staged:
            file.commit()
        if first:
            _remove_stale(engine, folder)
            _copy_script(Path(save_dir))

    _together(publish)
    _together(lambda: atomic_write_text(Path(save_dir) / LATEST, chosen) if first and save_latest else None)
    log_dist(f"saved checkpoint {folder}")
    return True


def _check_names(tag: str, client_state: Mapping[str, Any]) -> None:
    taken = _OWN_KEYS & set(client_state)
    if taken:
        raise ValueError(f"client_state uses keys that the checkpoint itself needs: {sorted(taken)}; rename them")
    if not tag or Path(tag).name != tag or tag == "..":
        raise ValueError(f"tag {tag!r} cannot be a folder name")


def _refuse_objects(state: Mapping[str, Any]) -> None:
    """Raises for values that would be written but never loaded again, naming the entries that hold them."""
    culprits = []
    for key, value in state.items():
        buffer = io.BytesIO()
        torch.save(value, buffer)
        buffer.seek(0)
        names = refused_names(buffer)
        if names:
            culprits.append(f"{key!r} holds {', '.join(names)}")
    raise ValueError(
        f"checkpoint state must be plain values and tensors, since loading builds nothing else: {'; '.join(culprits)}. "
        "Store what the objects are made of instead, such as obj.__dict__ or str(obj)"
    )


def _model_name(engine: DeepSpeedEngine, rank: int) -> str:
    return model_states_name(_mp_rank(engine), dp_rank=rank if engine._offload is not None else None)


def _optim_name(engine: DeepSpeedEngine, dp_rank: int) -> str:
    return optim_states_name(dp_rank, bf16=engine.bfloat16_enabled(), mp_rank=_mp_rank(engine))


def _validate_tag(engine: DeepSpeedEngine, tag: str) -> None:
    mode = str(engine.checkpoint_tag_validation_mode()).lower()
    if mode == "ignore" or dist.get_world_size() == 1:
        return
    tags = _gather(tag)
    if len(set(tags)) > 1:
        message = f"ranks save under different tags: {dict(enumerate(tags))}; such a checkpoint does not load"
        if mode == "fail":
            raise ValueError(message + " (checkpoint.tag_validation is Fail)")
        log_dist(message, level=logging.WARNING)


def _model_state(engine: DeepSpeedEngine, exclude_frozen: bool) -> dict[str, Any]:
    module, flat = engine.module, engine._flat
    trained = {slot.param for slot in flat.slots()} if flat is not None else set()
    names = {param: name for name, param in module.named_parameters()}
    handles = named_handles(module)
    weights = engine.module_state_dict(exclude_frozen_parameters=exclude_frozen)
    if handles:
        partitioned_state.check_written({name: handle for name, handle in handles.items() if name in weights})
        weights = partitioned_state.without_data(weights, handles)
    weights = clone_tensors_for_torch_save(weights)
    frozen = [name for param, name in names.items() if param not in trained and name in weights]
    shared = {
        name: names[param]
        for name, param in module.named_parameters(remove_duplicate=False)
        if names[param] != name and (param in trained or name in handles) and name in weights
    }
    # The tensors under "module" again, which costs no bytes in the file; of partitioned ones this rank's piece.
    fragments = OrderedDict((n, weights[n]) for n in frozen if n not in handles)
    fragments.update(partitioned_state.fragments(handles, [n for n in frozen if n in handles]))
    zero = engine._offload is not None or (flat is not None and flat.stage > 0)
    scheduler = engine.lr_scheduler
    mpu_size = getattr(engine.mpu, "get_model_parallel_world_size", None)
    mp_size = int(mpu_size()) if mpu_size is not None else 1
    return {
        "module": weights,
        "buffer_names": [name for name, _ in module.named_buffers()],
        "optimizer": optimizer_state.whole_state(flat, weights) if flat is not None and not zero else None,
        "param_shapes": optimizer_state.group_shapes(flat) if flat is not None else None,
        "frozen_param_shapes": OrderedDict((names[p], p.shape) for p in names if names[p] in frozen) or None,
        "shared_params": shared,
        "frozen_param_fragments": fragments if zero and frozen else None,
        "lr_scheduler": scheduler.state_dict() if hasattr(scheduler, "state_dict") else None,
        "data_sampler": None,
        "random_ltd": None,
        "sparse_tensor_module_names": set(),
        "skipped_steps": engine.skipped_steps,
        "global_steps": engine.global_steps,
        "global_samples": engine.global_samples,
        "dp_world_size": partitioned_state.shard_rank(engine)[1],
        "mp_world_size": mp_size,
        "checkpoint_parallel_dimensions": {"pp_degree": 1, "tp_degree": mp_size},
        "ds_config": _plain_config(engine),
        "ds_version": __version__,
    }


def _plain_config(engine: DeepSpeedEngine) -> Any:
    """The config as JSON has it; other objects, which a config dict may hold, as text."""
    return json.loads(json.dumps(engine._config.raw, default=str))


def _rng_state(engine: DeepSpeedEngine) -> dict[str, Any]:
    """The generators that code draws from without naming one, as plain values."""
    kind, keys, *rest = cast("tuple[Any, ...]", np.random.get_state())
    state: dict[str, Any] = {
        "cpu": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": (str(kind), torch.from_numpy(keys.astype(np.int64)), *map(float, rest)),
    }
    if engine.device.type == "cuda":
        state["device"] = torch.cuda.get_rng_state(engine.device)
    return state


def _set_rng_state(engine: DeepSpeedEngine, state: dict[str, Any]) -> None:
    torch.set_rng_state(state["cpu"].clone())
    random.setstate(state["python"])
    kind, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), int(position), int(has_gauss), gauss))
    if "device" in state and engine.device.type == "cuda":
        torch.cuda.set_rng_state(state["device"].clone(), engine.device)


def _remove_stale(engine: DeepSpeedEngine, folder: Path) -> None:
    """Files of an earlier save under the same tag, by more ranks, by another stage or in another precision."""
    flat, mp_rank = engine._flat, _mp_rank(engine)
    _, ranks, _ = partitioned_state.shard_rank(engine)
    wanted = {_model_name(engine, rank) for rank in range(ranks)}
    if flat is not None and flat.stage > 0:
        wanted |= {_optim_name(engine, rank) for rank in range(ranks)}
    own = f"mp_rank_{mp_rank:02d}"
    for pattern in (f"*zero_pp_rank_*_{own}_optim_states.pt", f"zero_pp_rank_*_{own}_model_states.pt"):
        for path in folder.glob(pattern):
            if path.name not in wanted:
                path.unlink()
    whole = model_states_name(mp_rank)
    if whole not in wanted:
        (folder / whole).unlink(missing_ok=True)


def _copy_script(root: Path) -> None:
    source = Path(__file__).parent.parent / "utils" / _SCRIPT
    atomic_write_text(root / _SCRIPT, source.read_text(encoding="utf-8"), mode=0o755)


def save_weights(engine: DeepSpeedEngine, save_dir: str, filename: str, exclude_frozen: bool) -> bool:
    """See ``DeepSpeedEngine.save_16bit_model``."""
    if not _may_gather(engine):
        log_dist(
            f"save_16bit_model did not save {filename}: {_GATHER_OFF}",
            level=logging.WARNING,
        )
        return False
    state = consolidated(engine, exclude_frozen)

    def write() -> None:
        if state is not None:
            Path(save_dir).mkdir(parents=True, exist_ok=True)
            atomic_save(state, Path(save_dir) / filename)

    _together(write)
    return True


_GATHER_OFF = (
    "zero_optimization.stage3_gather_16bit_weights_on_model_save is false, and so no rank may hold the whole model. Set it "
    "to true, or use save_checkpoint and zero_to_fp32.py"
)


def _may_gather(engine: DeepSpeedEngine) -> bool:
    return engine._offload is None or bool(engine.zero_gather_16bit_weights_on_model_save())


def consolidated(engine: DeepSpeedEngine, exclude_frozen: bool) -> dict[str, Any] | None:
    """The module's state dict as compact CPU tensors in the model's dtype on rank 0, None elsewhere. Collective.

    With ZeRO-3, rank 0 holds the result and nothing more; the others need no memory.

    Raises:
        ValueError: ZeRO-3 without ``stage3_gather_16bit_weights_on_model_save``; an entry has no data.
    """
    if not _may_gather(engine):
        raise ValueError(f"the weights cannot be put together: {_GATHER_OFF}")
    if engine._offload is None and dist.get_rank() != 0:
        return None
    state = engine.module_state_dict(exclude_frozen_parameters=exclude_frozen)
    if engine._offload is None:
        return cast("dict[str, Any]", clone_tensors_for_torch_save(state))

    def check() -> None:
        handles = named_handles(engine.module)
        partitioned_state.check_written({name: handle for name, handle in handles.items() if name in state})
        partitioned_state.without_data(state, handles)

    _together(check)
    return partitioned_state.collect_weights(engine.module, state)


# -- loading -----------------------------------------------------------------------------------------------------------


def load(
    engine: DeepSpeedEngine, load_dir: str, tag: str | None, what: LoadWhat
) -> tuple[str | None, dict[str, Any] | None]:
    """See ``DeepSpeedEngine.load_checkpoint``. Everything is read and checked before anything is changed."""

    def locate() -> Path | None:
        if tag is None and os.path.isdir(load_dir) and read_latest(load_dir) is None:
            return None
        return find_tag_dir(load_dir, tag)

    folder = _together(locate)
    found = _gather(None if folder is None else folder.name)
    if len(set(found)) > 1:
        raise CheckpointError(
            f"ranks would load different checkpoints: {dict(enumerate(found))} in {load_dir}. Give every rank the same "
            "tag, and a folder that all of them see"
        )
    if folder is None:
        warning_once(f"{load_dir} has no '{LATEST}' file and no tag was given: nothing loaded")
        return None, None
    opened = _together(lambda: _open(engine, folder, what))
    flat, reader = engine._flat, opened.reader
    _together(lambda: _check_module(engine, opened, what))
    if reader is not None and flat is not None:
        _together(lambda: optimizer_state.check_matches(flat, reader))
    if flat is not None:
        flat.settle_weights()
    # The scheduler goes first: nothing but taking it tells whether the state fits, and it is easily put back.
    undo = _together(lambda: _load_scheduler(engine, opened.state, what))
    try:
        _together(lambda: _load_module(engine, opened, what))
    except BaseException:
        undo()
        raise
    if reader is not None and flat is not None:
        _together(lambda: optimizer_state.load_into(flat, reader))
        _agree_on_weights(engine, opened)
    if engine._offload is not None:
        engine._offload.refresh()
    if flat is not None:
        flat.zero_grad()
    _together(lambda: _load_run(engine, opened.state, what))
    engine.loaded_checkpoint_tag = folder.name
    log_dist(f"loaded checkpoint {folder}")
    client_state = {key: value for key, value in opened.state.items() if key not in _OWN_KEYS}
    # Clones, since the tensors are views of a file that may be removed.
    return str(opened.path), clone_tensors_for_torch_save(client_state)


def _agree_on_weights(engine: DeepSpeedEngine, opened: _Opened) -> None:
    """After the masters were loaded: they, or the weights in the model's dtype, are what counts. Collective."""
    flat = engine._require_optimizer("load_checkpoint")
    from_masters = engine.zero_load_from_fp32_weights() or flat.stage == 0
    if from_masters or opened.weights is not None:  # stage 3 folders hold no other weights
        flat.publish_weights()
    if not from_masters:
        flat.refresh_master()


def _open(engine: DeepSpeedEngine, folder: Path, what: LoadWhat) -> _Opened:
    partitioned_state.check_released(named_handles(engine.module))
    mp_rank, flat = _mp_rank(engine), engine._flat
    weights = PartitionedWeights(folder, mp_rank) if is_partitioned(folder, mp_rank) else None
    if weights is not None:
        rank, ranks, _ = partitioned_state.shard_rank(engine)
        # A rank's own buffers and client state, if there are as many ranks.
        path, state = weights.model_file(rank if ranks == weights.world_size else 0)
    else:
        path = model_states_path(folder, mp_rank)
        state = load_file(path)
    if not isinstance(state, dict) or not isinstance(state.get("module"), Mapping):
        raise CheckpointError(f"{path}: expected a dict with the model's weights under 'module'")
    if not what.optimizer or flat is None:
        return _Opened(path, state, None, weights)
    if not optim_states_paths(folder, mp_rank) and not state.get("optimizer"):
        raise CheckpointError(
            f"{folder} holds no optimizer state (neither optimizer files nor an 'optimizer' entry in {path.name}); "
            "pass load_optimizer_states=False to load the weights only"
        )
    if weights is not None:
        return _Opened(path, state, weights.reader, weights)
    names = [list(group) for group in optimizer_state.group_shapes(flat)]
    return _Opened(path, state, NativeZeroReader(folder, param_names=names, mp_rank=mp_rank), None)


def _check_module(engine: DeepSpeedEngine, opened: _Opened, what: LoadWhat) -> None:
    if what.custom_load_fn is not None or _loads_itself(engine.module):
        return
    saved, mine = opened.entries(), engine.module.state_dict()
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
            f"{opened.path} is of another model: {'; '.join(problems[:10])}{more}. Nothing was loaded. Missing or "
            "extra names are tolerated with load_module_strict=False"
        )


def _loads_itself(module: torch.nn.Module) -> bool:
    """Whether a part of the module translates names or shapes on loading, so that comparing them proves nothing."""
    return any(
        any(not is_state_hook(hook) for hook in part._load_state_dict_pre_hooks.values())
        or type(part)._load_from_state_dict is not torch.nn.Module._load_from_state_dict
        or type(part).load_state_dict is not torch.nn.Module.load_state_dict
        for part in module.modules()
    )


def _load_module(engine: DeepSpeedEngine, opened: _Opened, what: LoadWhat) -> None:
    """Loads the weights; where they could not be checked before, a failure puts the old ones back."""
    module, entries, weights = engine.module, opened.state["module"], opened.weights
    uncertain = what.custom_load_fn is not None or _loads_itself(module)
    if weights is not None and not uncertain:
        module.load_state_dict({name: v for name, v in entries.items() if name not in weights}, strict=False)
        # The masters bring the others.
        flat = engine._flat
        trained = {slot.name for slot in flat.slots()} if flat is not None and opened.reader is not None else set()
        partitioned_state.load_weights(module, weights, skip=trained)
        if flat is not None and opened.reader is None:
            flat.refresh_master()
        return
    if weights is not None:
        entries = partitioned_state.whole_state_dict(module, entries, weights)
    before = [(t, t.detach().clone()) for t in _tensors_of(module)] if uncertain else []
    try:
        engine.load_module_state_dict(entries, strict=what.strict, custom_load_fn=what.custom_load_fn)
    except BaseException:
        with torch.no_grad():
            for tensor, value in before:
                tensor.copy_(value)
        raise


def _tensors_of(module: torch.nn.Module) -> list[torch.Tensor]:
    """Where the module's values are; of partitioned parameters the shards, and the whole data while that is there."""
    tensors: list[torch.Tensor] = [*module.buffers()]
    for param in module.parameters():
        handle = handle_of(param)
        if handle is not None:
            tensors.append(handle.param.ds_tensor)  # type: ignore[attr-defined]
        if handle is None or handle.available:
            tensors.append(param.data)
    return tensors


def _load_scheduler(engine: DeepSpeedEngine, state: dict[str, Any], what: LoadWhat) -> Callable[[], None]:
    """Loads the schedule; returns what takes that back."""
    scheduler, saved = engine.lr_scheduler, state.get("lr_scheduler")
    if not what.scheduler or saved is None or not hasattr(scheduler, "load_state_dict"):
        return lambda: None
    before = copy.deepcopy(scheduler.state_dict())
    rates = [group.get("lr") for group in engine._groups()]

    def undo() -> None:
        scheduler.load_state_dict(before)
        for group, rate in zip(engine._groups(), rates, strict=True):
            if "lr" in group:
                group["lr"] = rate

    try:
        scheduler.load_state_dict(clone_tensors_for_torch_save(saved))
    except BaseException:
        undo()
        raise
    return undo


def _load_run(engine: DeepSpeedEngine, state: dict[str, Any], what: LoadWhat) -> None:
    """Counters and random numbers."""
    if not what.counters:
        return
    engine.global_steps = int(state.get("global_steps", 0))
    engine.global_samples = int(state.get("global_samples", engine.global_steps * engine.train_batch_size()))
    engine.skipped_steps = int(state.get("skipped_steps", 0))
    engine.micro_steps = engine.global_steps * engine.gradient_accumulation_steps()
    if engine._flat is not None:
        engine._flat.skipped_steps = engine.skipped_steps
    states = state.get(_RNG)
    if not what.optimizer or states is None:
        return
    if len(states) != dist.get_world_size():
        warning_once("the checkpoint was saved by another number of ranks: random states are not restored")
        return
    _set_rng_state(engine, states[dist.get_rank()])
