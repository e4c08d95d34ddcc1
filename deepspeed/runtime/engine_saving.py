"""Saving an engine, in the documented folder layout.

``save_dir/<tag>/`` holds one model file (with ZeRO-3 one a rank) and, with ZeRO, one optimizer file a rank;
``save_dir/latest`` names the newest tag and is written last; ``save_dir/zero_to_fp32.py`` recovers fp32 weights without
this package. Every file appears complete or not at all. An error on one rank is raised on all of them.
"""

from __future__ import annotations

import copy
import json
import logging
import pickle
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, cast

import torch

from deepspeed import comm as dist
from deepspeed._core.ckpt.archive import Archive
from deepspeed._core.ckpt.groups import all_gather_values
from deepspeed._core.ckpt.io import atomic_save, refused
from deepspeed._core.ckpt.manifest import Manifest
from deepspeed._core.ckpt.native import NATIVE_FORMAT, model_states_name, optim_states_name
from deepspeed._core.ckpt.save import SaveJob, WriterOptions
from deepspeed._core.ckpt.source import Exchanged
from deepspeed._core.ckpt.staging import Staging, check_tag
from deepspeed.checkpoint.utils import clone_tensors_for_torch_save
from deepspeed.comm import doctor
from deepspeed.runtime import optimizer_state, partitioned_state
from deepspeed.runtime.config_sections.checkpoint import CheckpointWriterConfig
from deepspeed.runtime.engine_checkpoint import OWN_KEYS, RNG, gather, mp_rank_of, rng_state, saving_groups, together
from deepspeed.runtime.engine_local import node_ranks
from deepspeed.runtime.zero.module_state import check_has_data, named_handles
from deepspeed.utils.logging import log_dist, warning_once
from deepspeed.version import __version__

if TYPE_CHECKING:
    from deepspeed.runtime.engine import DeepSpeedEngine

__all__ = ["consolidated", "save", "save_weights", "settle"]


def save(
    engine: DeepSpeedEngine,
    save_dir: str,
    tag: str | None,
    client_state: dict[str, Any],
    save_latest: bool,
    exclude_frozen: bool,
) -> bool:
    """See ``DeepSpeedEngine.save_checkpoint``.

    Every rank writes into a hidden folder; only when all have succeeded does it become ``save_dir/tag``, and ``latest`` is
    written after that. With ``checkpoint.async_save`` all of that happens in a thread, and here the plain values are
    taken down and tensors only noted: what is not written when training changes them is copied then.
    """
    settle(engine)
    chosen = str(tag) if tag is not None else f"global_step{engine.global_steps}"
    together(lambda: _check_names(chosen, client_state))
    _validate_tag(engine, chosen)
    settings = engine._config.document.checkpoint
    flat = engine._flat
    background = _in_background(engine)
    if flat is not None:
        flat.settle_weights()
    world, exchange = saving_groups(engine)
    rng = gather(rng_state(engine))
    here = node_ranks(engine)
    # Each node with storage of its own has the file that the ranks share.
    first = here[0] if len(here) < dist.get_world_size() else 0
    shared = dist.get_rank(engine.dp_process_group) == 0 or dist.get_rank() == first
    files = together(lambda: _archives(engine, exclude_frozen, rng, client_state, exchange, background, shared))
    if exchange is not None and flat is not None and flat.stage in (1, 2) and not background:
        _share_memory(engine, files, exchange)
    staging, members = _stage(Path(save_dir), chosen, here)
    job = SaveJob(
        staging=staging,
        files=files,
        facts=Manifest(
            chosen, 0.0, engine.global_steps, flat.stage if flat is not None else 0, dist.get_world_size(), __version__
        ),
        members=members,
        latest=save_latest and here[0] in members,  # of ranks with tags of their own, the first decides
        keep_last=settings.keep_last,
        script=_script(),
        group=world,
        options=_writer_options(settings.writer),
        quiet=background,
    )
    doctor.now.phase = "save_checkpoint"  # for the hang doctor: who waits here waits for a file
    engine._saver.run(job, background=background, then=lambda: log_dist(f"saved checkpoint {staging.target}"))
    return True


def _in_background(engine: DeepSpeedEngine) -> bool:
    """Three keys ask for it: ours, the fast writer's, and that of DataStates."""
    document, flat = engine._config.document, engine._flat
    writer = document.checkpoint.writer
    decoupled = writer is not None and writer.decoupled
    if not (document.checkpoint.async_save or decoupled or document.datastates_ckpt is not None):
        return False
    if flat is not None and flat.keeps_files:
        warning_once(
            "checkpoint.async_save has no effect with optimizer states on NVMe: saving in the background would have to "
            "hold all of them in memory before the next step"
        )
        return False
    return True


def _writer_options(writer: CheckpointWriterConfig | None) -> WriterOptions:
    if writer is None:
        return WriterOptions()
    return WriterOptions(writer.io_buffer_size, 2 if writer.io_buffer_double else 1)


def settle(engine: DeepSpeedEngine) -> None:
    """Waits for a save that is still being written; if it failed, the error is raised on all ranks. Collective."""
    together(engine._saver.settle)


def _stage(root: Path, tag: str, here: list[int]) -> tuple[Staging, list[int]]:
    """The hidden folder for this save, and the ranks that share it. Collective.

    Ranks share one that see the same storage (``here``) and were given the same tag.
    """
    proposed = Staging(root, tag)
    votes = gather((tag, proposed.name))
    members = [rank for rank in here if votes[rank][0] == tag]
    leader = members[0]
    staging = Staging(root, tag, votes[leader][1])
    together(staging.create if dist.get_rank() == leader else lambda: None)
    try:
        together(staging.require)
    except BaseException:
        if dist.get_rank() == leader:
            staging.discard()
        raise
    return staging, members


def _archives(
    engine: DeepSpeedEngine,
    exclude_frozen: bool,
    rng: list[Any],
    client_state: dict[str, Any],
    exchange: torch.distributed.ProcessGroup | None,
    background: bool,
    shared: bool,
) -> list[tuple[str, Archive]]:
    """This rank's files: names and content. Refuses content that could not be loaded again, before anything is written."""
    flat = engine._flat
    rank, _, writes = partitioned_state.shard_rank(engine)
    files: list[tuple[str, Archive]] = []
    if writes and (shared or engine._offload is not None):
        kept = clone_tensors_for_torch_save(client_state) if background else client_state
        state = {**_model_state(engine, exclude_frozen, background), "ds_format": NATIVE_FORMAT, RNG: rng, **kept}
        files.append((_model_name(engine, rank), _archive(state, state)))
    if writes and flat is not None and flat.stage > 0:
        partition = optimizer_state.partition_state(flat, exchange)
        content = {"optimizer_state_dict": partition, "ds_config": _plain_config(engine), "ds_version": __version__}
        content["ds_format"] = NATIVE_FORMAT
        files.append((_optim_name(engine, rank), _archive(content, {"optimizer": partition})))
    return files


def _share_memory(
    engine: DeepSpeedEngine, files: list[tuple[str, Archive]], group: torch.distributed.ProcessGroup
) -> None:
    """Has ranks of one host read each other's shards, rather than send them, if all of them can. Collective over the group.

    The ranks leave the save together, so that no shard changes before all are written.
    """
    neighbours = engine._saver.neighbours(group)
    if neighbours is None:
        return
    sources = [source for _, archive in files for source in archive.sources if isinstance(source, Exchanged)]
    places = [source.places() for source in sources]
    every = all_gather_values(None if None in places else places, group)
    if None in every:
        return
    for index, source in enumerate(sources):
        source.share(neighbours, [places[index] for places in every])


def _archive(content: dict[str, Any], named: Mapping[str, Any]) -> Archive:
    """``content`` as a file; ``named`` are its parts by the names that an error gives them."""
    try:
        archive = Archive(content)
    except (
        pickle.PicklingError,
        TypeError,
        AttributeError,
    ):  # these are what pickle says of lambdas, locks, files, ...
        _refuse_objects(named)
    if refused(archive.foreign_names()):
        _refuse_objects(named)
    return archive


def _check_names(tag: str, client_state: Mapping[str, Any]) -> None:
    taken = OWN_KEYS & set(client_state)
    if taken:
        raise ValueError(f"client_state uses keys that the checkpoint itself needs: {sorted(taken)}; rename them")
    check_tag(tag)


def _refuse_objects(state: Mapping[str, Any]) -> NoReturn:
    """Raises for values that would be written but never loaded again, naming the entries that hold them."""
    culprits = []
    for key, value in state.items():
        try:
            names = refused(Archive(value).foreign_names())
        except (pickle.PicklingError, TypeError, AttributeError) as error:
            names = [f"what cannot be pickled ({error})"]
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


def _model_state(engine: DeepSpeedEngine, exclude_frozen: bool, background: bool) -> dict[str, Any]:
    module, flat = engine.module, engine._flat
    trained = {slot.param for slot in flat.slots()} if flat is not None else set()
    names = {param: name for name, param in module.named_parameters()}
    known = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    handles = named_handles(module)
    weights = engine.module_state_dict(exclude_frozen_parameters=exclude_frozen)
    if handles:
        partitioned_state.check_written({name: handle for name, handle in handles.items() if name in weights})
        weights = partitioned_state.without_data(weights, handles)
    if background:
        # Weights change in steps, which wait for what is being written; everything else whenever the module runs.
        changing = {name: value for name, value in weights.items() if name not in known}
        weights = copy.copy(weights)
        weights.update(clone_tensors_for_torch_save(changing))
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


def _script() -> str:
    return (Path(__file__).parent.parent / "utils" / "zero_to_fp32.py").read_text(encoding="utf-8")


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

    together(write)
    return True


_GATHER_OFF = (
    "zero_optimization.stage3_gather_16bit_weights_on_model_save is false, and so no rank may hold the whole model. Set it "
    "to true, or use save_checkpoint and zero_to_fp32.py"
)


def _may_gather(engine: DeepSpeedEngine) -> bool:
    return engine._offload is None or bool(engine.zero_gather_16bit_weights_on_model_save())


def _has_frozen(engine: DeepSpeedEngine) -> bool:
    return any(not param.requires_grad for param in engine.module.parameters())


def consolidated(engine: DeepSpeedEngine, exclude_frozen: bool) -> dict[str, Any] | None:
    """The module's state dict as compact CPU tensors in the model's dtype on rank 0, None elsewhere. Collective.

    With ZeRO-3, rank 0 holds the result and nothing more; the others need no memory. What is trained on a frozen base
    (``exclude_frozen``) is given whatever ``stage3_gather_16bit_weights_on_model_save`` says: that is about the whole
    model, and PEFT has no other way to save its adapters.

    Raises:
        ValueError: ZeRO-3 without ``stage3_gather_16bit_weights_on_model_save``, all weights are asked for or trained;
            an entry has no data.
    """
    if not _may_gather(engine) and not (exclude_frozen and _has_frozen(engine)):
        raise ValueError(f"the weights cannot be put together: {_GATHER_OFF}")

    def whole() -> dict[str, Any] | None:
        if dist.get_rank() != 0:
            return None
        state = engine.module_state_dict(exclude_frozen_parameters=exclude_frozen)
        check_has_data(state)
        return cast("dict[str, Any]", clone_tensors_for_torch_save(state))

    if engine._offload is None:
        return together(whole)
    # Parameters themselves, since what is whole here would be cloned, on all ranks.
    state = engine.module_state_dict(keep_vars=True, exclude_frozen_parameters=exclude_frozen)

    def check() -> None:
        handles = named_handles(engine.module)
        partitioned_state.check_written({name: handle for name, handle in handles.items() if name in state})
        partitioned_state.without_data(state, handles)

    together(check)
    return partitioned_state.collect_weights(engine.module, state)
