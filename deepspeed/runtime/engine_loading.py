"""Loading an engine from a checkpoint folder.

``save_dir/<tag>/`` holds one model file (with ZeRO-3 one a rank) and, with ZeRO, one optimizer file a rank;
``save_dir/latest`` names the newest tag and is written last; ``save_dir/zero_to_fp32.py`` recovers fp32 weights without
this package. Every file appears complete or not at all. An error on one rank is raised on all of them.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from deepspeed import comm as dist
from deepspeed._core.ckpt.io import load_file
from deepspeed._core.ckpt.native import (
    LATEST,
    find_tag_dir,
    model_states_path,
    optim_states_paths,
    read_latest,
)
from deepspeed._core.ckpt.reader import NativeZeroReader
from deepspeed._core.ckpt.weights import PartitionedWeights, is_partitioned
from deepspeed._core.params.handle import handle_of
from deepspeed.checkpoint.utils import clone_tensors_for_torch_save
from deepspeed.errors import CheckpointError
from deepspeed.runtime import optimizer_loading, optimizer_state, partitioned_state
from deepspeed.runtime.engine_checkpoint import OWN_KEYS, RNG, gather, mp_rank_of, set_rng_state, together
from deepspeed.runtime.zero.module_state import is_state_hook, named_handles
from deepspeed.utils.logging import log_dist, warning_once

if TYPE_CHECKING:
    from deepspeed.runtime.engine import DeepSpeedEngine

__all__ = ["LoadWhat", "load"]

T = TypeVar("T")


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


def load(
    engine: DeepSpeedEngine, load_dir: str, tag: str | None, what: LoadWhat
) -> tuple[str | None, dict[str, Any] | None]:
    """See ``DeepSpeedEngine.load_checkpoint``. Everything is read and checked before anything is changed."""

    def locate() -> Path | None:
        if tag is None and os.path.isdir(load_dir) and read_latest(load_dir) is None:
            return None
        return find_tag_dir(load_dir, tag)

    folder = together(locate)
    found = gather(None if folder is None else folder.name)
    if len(set(found)) > 1:
        raise CheckpointError(
            f"ranks would load different checkpoints: {dict(enumerate(found))} in {load_dir}. Give every rank the same "
            "tag, and a folder that all of them see"
        )
    if folder is None:
        warning_once(f"{load_dir} has no '{LATEST}' file and no tag was given: nothing loaded")
        return None, None
    opened = together(lambda: _open(engine, folder, what))
    flat, reader = engine._flat, opened.reader
    together(lambda: _check_module(engine, opened, what))
    if reader is not None and flat is not None:
        together(lambda: optimizer_loading.check_matches(flat, reader))
    if flat is not None:
        flat.settle_weights()
    # The scheduler goes first: nothing but taking it tells whether the state fits, and it is easily put back.
    undo = together(lambda: _load_scheduler(engine, opened.state, what))
    try:
        together(lambda: _load_module(engine, opened, what))
    except BaseException:
        undo()
        raise
    if reader is not None and flat is not None:
        together(lambda: optimizer_loading.load_into(flat, reader))
        _agree_on_weights(engine, opened)
    if engine._offload is not None:
        engine._offload.refresh()
    if flat is not None:
        flat.zero_grad()
    together(lambda: _load_run(engine, opened.state, what))
    engine.loaded_checkpoint_tag = folder.name
    log_dist(f"loaded checkpoint {folder}")
    client_state = {key: value for key, value in opened.state.items() if key not in OWN_KEYS}
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
    mp_rank, flat = mp_rank_of(engine), engine._flat
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
    states = state.get(RNG)
    if not what.optimizer or states is None:
        return
    if len(states) != dist.get_world_size():
        warning_once("the checkpoint was saved by another number of ranks: random states are not restored")
        return
    set_rng_state(engine, states[dist.get_rank()])
