"""Saving an engine, in the documented folder layout.

``save_dir/<tag>/`` holds one model file (with ZeRO-3 one a rank) and, with ZeRO, one optimizer file a rank;
``save_dir/latest`` names the newest tag and is written last; ``save_dir/zero_to_fp32.py`` recovers fp32 weights without
this package. Every file appears complete or not at all. An error on one rank is raised on all of them.
"""

from __future__ import annotations

import io
import json
import logging
from collections import OrderedDict
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch

from deepspeed import comm as dist
from deepspeed._core.ckpt.io import StagedFile, atomic_save, atomic_write_text, refused_names, stage_save
from deepspeed._core.ckpt.native import (
    LATEST,
    model_states_name,
    optim_states_name,
)
from deepspeed.checkpoint.utils import clone_tensors_for_torch_save
from deepspeed.runtime import optimizer_state, partitioned_state
from deepspeed.runtime.engine_checkpoint import OWN_KEYS, RNG, gather, mp_rank_of, rng_state, together
from deepspeed.runtime.zero.module_state import named_handles
from deepspeed.utils.logging import log_dist
from deepspeed.version import __version__

if TYPE_CHECKING:
    from deepspeed.runtime.engine import DeepSpeedEngine

__all__ = ["consolidated", "save", "save_weights"]

T = TypeVar("T")

_SCRIPT = "zero_to_fp32.py"


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

    together(lambda: _check_names(chosen, client_state))
    _validate_tag(engine, chosen)
    together(lambda: folder.mkdir(parents=True, exist_ok=True))
    flat = engine._flat
    if flat is not None:
        flat.settle_weights()
    partition = optimizer_state.partition_state(flat) if flat is not None and flat.stage > 0 else None
    rng = gather(rng_state(engine))
    rank, _, writes = partitioned_state.shard_rank(engine)
    first = dist.get_rank(engine.dp_process_group) == 0
    staged: list[StagedFile] = []

    def write() -> None:
        if writes and (first or engine._offload is not None):
            state = {**_model_state(engine, exclude_frozen), RNG: rng, **client_state}
            staged.append(stage_save(state, folder / _model_name(engine, rank)))
            if refused_names(staged[-1].scratch):
                _refuse_objects(state)
        if writes and partition is not None:
            content = {"optimizer_state_dict": partition, "ds_config": _plain_config(engine), "ds_version": __version__}
            staged.append(stage_save(content, folder / _optim_name(engine, rank)))
            if refused_names(staged[-1].scratch):
                _refuse_objects({"optimizer": partition})

    try:
        together(write)
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

    together(publish)
    together(lambda: atomic_write_text(Path(save_dir) / LATEST, chosen) if first and save_latest else None)
    log_dist(f"saved checkpoint {folder}")
    return True


def _check_names(tag: str, client_state: Mapping[str, Any]) -> None:
    taken = OWN_KEYS & set(client_state)
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
    return model_states_name(mp_rank_of(engine), dp_rank=rank if engine._offload is not None else None)


def _optim_name(engine: DeepSpeedEngine, dp_rank: int) -> str:
    return optim_states_name(dp_rank, bf16=engine.bfloat16_enabled(), mp_rank=mp_rank_of(engine))


def _validate_tag(engine: DeepSpeedEngine, tag: str) -> None:
    mode = str(engine.checkpoint_tag_validation_mode()).lower()
    if mode == "ignore" or dist.get_world_size() == 1:
        return
    tags = gather(tag)
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


def _remove_stale(engine: DeepSpeedEngine, folder: Path) -> None:
    """Files of an earlier save under the same tag, by more ranks, by another stage or in another precision."""
    flat, mp_rank = engine._flat, mp_rank_of(engine)
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
    if not _maygather(engine):
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

    together(write)
    return True


_GATHER_OFF = (
    "zero_optimization.stage3_gather_16bit_weights_on_model_save is false, and so no rank may hold the whole model. Set it "
    "to true, or use save_checkpoint and zero_to_fp32.py"
)


def _maygather(engine: DeepSpeedEngine) -> bool:
    return engine._offload is None or bool(engine.zero_gather_16bit_weights_on_model_save())


def consolidated(engine: DeepSpeedEngine, exclude_frozen: bool) -> dict[str, Any] | None:
    """The module's state dict as compact CPU tensors in the model's dtype on rank 0, None elsewhere. Collective.

    With ZeRO-3, rank 0 holds the result and nothing more; the others need no memory.

    Raises:
        ValueError: ZeRO-3 without ``stage3_gather_16bit_weights_on_model_save``; an entry has no data.
    """
    if not _maygather(engine):
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

    together(check)
    return partitioned_state.collect_weights(engine.module, state)
