"""Loading an engine from a checkpoint folder.

``save_dir/<tag>/`` holds one model file (with ZeRO-3 one a rank) and, with ZeRO, one optimizer file a rank;
``save_dir/latest`` names the newest tag and is written last; ``save_dir/zero_to_fp32.py`` recovers fp32 weights without
this package. Every file appears complete or not at all. An error on one rank is raised on all of them.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import os
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from deepspeed import comm as dist
from deepspeed._core.ckpt.blockreader import Ranges
from deepspeed._core.ckpt.compare import differences, listed
from deepspeed._core.ckpt.io import load_file
from deepspeed._core.ckpt.manifest import runs
from deepspeed._core.ckpt.native import (
    LATEST,
    check_format,
    is_optim_states,
    model_states_path,
    optim_states_paths,
    read_zero_group_shapes,
)
from deepspeed._core.ckpt.reader import NativeZeroReader, ZeroReader
from deepspeed._core.ckpt.staging import tag_of
from deepspeed._core.ckpt.universal import UniversalReader, is_universal
from deepspeed._core.ckpt.weights import PartitionedWeights, is_partitioned
from deepspeed._core.lazy import no_collection
from deepspeed._core.params.handle import ParamHandle, handle_of, handles_of
from deepspeed._core.reduce.bucket import Bucket
from deepspeed.checkpoint.utils import clone_tensors_for_torch_save
from deepspeed.comm.agreement import any_rank
from deepspeed.errors import CheckpointError
from deepspeed.runtime import optimizer_loading, optimizer_state, partitioned_state
from deepspeed.runtime.early_weights import EarlyWeights
from deepspeed.runtime.engine_checkpoint import OWN_KEYS, RNG, everyone, mp_rank_of, set_rng_state, together
from deepspeed.runtime.engine_choosing import Choice, DamagedError, check_rest, choose, require_same
from deepspeed.runtime.engine_local import gathered_files
from deepspeed.runtime.optimizer_loading import LoadPlan, ModelNames, Staged
from deepspeed.runtime.zero.module_state import is_state_hook, named_handles
from deepspeed.utils.logging import log_dist, warning_once

if TYPE_CHECKING:
    from deepspeed.runtime.engine import DeepSpeedEngine
    from deepspeed.runtime.flat_optimizer import FlatOptimizer

__all__ = ["LoadWhat", "load"]

T = TypeVar("T")

_MOST_WORKERS = 4


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
    reader: ZeroReader | None
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
    # What is read is many small objects, and torch's heap is large: collections took as long as reading them.
    with no_collection():
        return _load(engine, load_dir, tag, what)


def _load(
    engine: DeepSpeedEngine, load_dir: str, tag: str | None, what: LoadWhat
) -> tuple[str | None, dict[str, Any] | None]:
    # A fresh engine reads files once, checking them on the way: there is room for what is read beside its own state. One
    # that has states to lose reads them twice.
    once = not any_rank(not _can_stage(engine, what))
    damaged: dict[str, str] = {}
    while True:
        choice = choose(engine, load_dir, tag, damaged, check=not once)
        if choice is None:
            warning_once(
                f"{load_dir} holds no complete checkpoint and no '{LATEST}' file, and no tag was given: nothing loaded"
            )
            return None, None
        with gathered_files(engine, choice.folder) as whole:
            try:
                opened, client_state = _load_from(engine, replace(choice, folder=whole), load_dir, what)
                break
            except DamagedError as error:
                log_dist(f"{error}", level=logging.WARNING)
                damaged[choice.folder.name] = str(error)
    engine.loaded_checkpoint_tag = tag_of(choice.folder)
    log_dist(f"loaded checkpoint {choice.folder}")
    return str(choice.folder / opened.path.name), client_state


def _can_stage(engine: DeepSpeedEngine, what: LoadWhat) -> bool:
    """Whether masters and optimizer state can be read before anything is changed, with no more memory than they take."""
    flat = engine._flat
    if flat is None or not what.optimizer or flat.stage == 0 or flat.optimizer.state:
        return False
    if engine.use_node_local_storage() or not engine._config.document.checkpoint.verify_checksums:
        return False
    return flat.all_in_memory


def _load_from(
    engine: DeepSpeedEngine, choice: Choice, load_dir: str, what: LoadWhat
) -> tuple[_Opened, dict[str, Any]]:
    """Loads a folder that has all files of a checkpoint; returns it and the client state."""
    flat, staged, early = engine._flat, None, None
    with contextlib.ExitStack() as undo:  # what a failure on any rank takes back
        with _unless_damaged(choice):
            opened, names, plan = _prepare(engine, choice.folder, load_dir, what)
            ranges = _ranges(engine, choice)
            if flat is not None:
                flat.settle_weights()
            if choice.unchecked:
                early = _early_weights(engine, plan, what, undo)
                staged = _stage(choice, plan, ranges, early)
        # The scheduler goes first: nothing but taking it tells whether the state fits, and it is easily put back.
        together(lambda: _load_scheduler(engine, opened, what, names, undo))
        together(lambda: _load_module(engine, opened, what, names, plan, undo))
        undo.pop_all()
    if plan is not None and flat is not None:
        together(lambda: optimizer_loading.load_planned(flat, plan, staged, ranges))
        if early is None:
            _agree_on_weights(engine, opened, plan)
        flat.mended()
    if engine._offload is not None:
        engine._offload.refresh()
    if flat is not None:
        flat.zero_grad()
    together(lambda: _load_run(engine, opened.state, what))
    client_state = {key: value for key, value in opened.state.items() if key not in OWN_KEYS}
    # Clones, since the tensors are views of a file that may be removed.
    return opened, clone_tensors_for_torch_save(client_state)


@contextlib.contextmanager
def _unless_damaged(choice: Choice) -> Iterator[None]:
    """Files that were not checked before may lead to any error: if they are damaged, that is the one to raise.

    Collective, and so must be the errors of the block.
    """
    try:
        yield
    except DamagedError:
        raise
    except Exception:
        if choice.unchecked:
            check_rest(choice, None, None)
        raise


def _prepare(
    engine: DeepSpeedEngine, folder: Path, load_dir: str, what: LoadWhat
) -> tuple[_Opened, ModelNames, LoadPlan | None]:
    """Opens a folder and finds all that can be wrong, but for damage. Changes nothing; collective."""
    found: list[_Opened] = []

    def open_it() -> str:
        found.append(_open(engine, folder, what))
        return f"{tag_of(folder)} of {found[0].state.get('global_steps')} steps"

    require_same(everyone(open_it), load_dir)
    opened = found[0]
    flat, reader = engine._flat, opened.reader

    def plan_it() -> tuple[ModelNames, LoadPlan | None]:
        _check_module(engine, opened, what)
        names = _model_names(engine, opened)
        if reader is None or flat is None:
            return names, None
        return names, optimizer_loading.plan_load(flat, reader, names, what.strict)

    names, plan = together(plan_it)
    _tell(folder, [*_notes_on_module(engine, opened, what), *(plan.notes if plan is not None else ())])
    return opened, names, plan


def _ranges(engine: DeepSpeedEngine, choice: Choice) -> Ranges | None:
    """Reads optimizer files past the page cache; None where it is not known what was written."""
    if choice.manifest is None:
        return None
    sums = {name: known for name, known in choice.manifest.files.items() if is_optim_states(name)}
    verify = engine._config.document.checkpoint.verify_checksums
    # What was checked before cannot be put together with what others read.
    return Ranges(choice.folder, sums, verify=verify, pieces=bool(choice.unchecked), workers=_own_cores())


def _own_cores() -> int:
    """How many threads this rank can keep busy without taking another's core; no more than a disk is glad of."""
    mine = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if mine == os.cpu_count():  # the launcher has not bound ranks to cores: all on the node share them
        said = os.environ.get("LOCAL_WORLD_SIZE", "")
        mine //= max(1, int(said) if said.isdigit() else dist.get_world_size())
    return min(max(mine, 1), _MOST_WORKERS)


def _early_weights(
    engine: DeepSpeedEngine, plan: LoadPlan | None, what: LoadWhat, undo: contextlib.ExitStack
) -> EarlyWeights | None:
    """What sends the weights while moments are read, where weights follow from masters and nothing else.

    ``undo`` gets what takes them back. The same on all ranks.
    """
    flat = engine._flat
    if plan is None or flat is None or what.custom_load_fn is not None or _loads_itself(engine.module):
        return None
    if not _masters_count(engine) or not EarlyWeights.possible(flat):
        return None
    early = EarlyWeights(flat)
    if flat.stage < 3 and flat.transport.world_size > 1 and all(held.device.type == "cpu" for held in flat.buckets):
        group = flat.transport.group or torch.distributed.group.WORLD
        neighbours = engine._saver.neighbours(group) if group is not None else None
        if group is not None and neighbours is not None:
            early.share(neighbours, group)
    undo.callback(early.take_back)
    return early


def _stage(
    choice: Choice, plan: LoadPlan | None, ranges: Ranges | None, early: EarlyWeights | None
) -> list[Staged] | None:
    """Reads what the plan wants, and checks all that was not checked before. Collective.

    Raises:
        DamagedError: a file is not what was written; nothing was changed but ``early``'s weights.
    """

    def read() -> tuple[list[Staged] | None, str | None]:
        if plan is None or ranges is None:
            return None, None
        try:
            _check_share(choice, ranges)
            return optimizer_loading.stage_planned(plan, ranges, early), None
        except CheckpointError as error:
            return None, str(error)
        finally:
            if early is not None:
                early.finish()

    staged, problem = together(read)
    check_rest(choice, ranges, problem)
    return staged


def _check_share(choice: Choice, ranges: Ranges) -> None:
    """Has this rank's share of what nobody reads for its values checked on the way."""
    if choice.manifest is None:
        return
    others = [(name, block) for name, block in choice.unchecked if not is_optim_states(name)]
    rank, world = dist.get_rank(), dist.get_world_size()
    for name, run in runs(others[len(others) * rank // world : len(others) * (rank + 1) // world]):
        ranges.check(name, choice.manifest.files[name], run)


def _tell(folder: Path, notes: list[str]) -> None:
    if notes:
        log_dist(f"loading {folder}: {'; '.join(notes)}", level=logging.WARNING)


def _masters_count(engine: DeepSpeedEngine) -> bool:
    """Whether weights follow the masters of the checkpoint, and not the other way round."""
    return bool(engine.zero_load_from_fp32_weights()) or engine.zero_optimization_stage() == 0


def _agree_on_weights(engine: DeepSpeedEngine, opened: _Opened, plan: LoadPlan) -> None:
    """After the masters were loaded: they, or the weights in the model's dtype, are what counts. Collective."""
    flat = engine._require_optimizer("load_checkpoint")
    if _masters_count(engine) or opened.weights is not None:  # stage 3 folders hold no other weights
        flat.publish_weights()
    if not _masters_count(engine):
        optimizer_loading.follow_weights(flat, plan.matched)


def _model_names(engine: DeepSpeedEngine, opened: _Opened) -> ModelNames:
    live: dict[torch.nn.Parameter, list[str]] = {}
    for name, param in engine.module.named_parameters(remove_duplicate=False):
        live.setdefault(param, []).append(name)
    return ModelNames(live, opened.entries().keys(), opened.state.get("shared_params") or {})


def _open(engine: DeepSpeedEngine, folder: Path, what: LoadWhat) -> _Opened:
    partitioned_state.check_released(named_handles(engine.module))
    mp_rank, flat = mp_rank_of(engine), engine._flat
    if is_partitioned(folder, mp_rank):
        weights = PartitionedWeights(folder, mp_rank)
        rank, ranks, _ = partitioned_state.shard_rank(engine)
        # A rank's own buffers and client state, if there are as many ranks.
        path, state = weights.model_file(rank if ranks == weights.world_size else 0)
        opened = _Opened(path, state, weights.reader, weights)
    else:
        path = model_states_path(folder, mp_rank)
        opened = _Opened(path, load_file(path), None, None)
    state = opened.state
    if not isinstance(state, dict) or not isinstance(state.get("module"), Mapping):
        raise CheckpointError(f"{path}: expected a dict with the model's weights under 'module'")
    check_format(state, path)
    if not what.optimizer or flat is None:
        return replace(opened, reader=None)
    universal = is_universal(folder, mp_rank)
    if engine.load_universal_checkpoint() and not universal:
        warning_once(f"checkpoint.load_universal is true, but {folder} is a native folder: it is loaded as such")
    if not universal and not optim_states_paths(folder, mp_rank) and not state.get("optimizer"):
        raise CheckpointError(
            f"{folder} holds no optimizer state (neither optimizer files nor an 'optimizer' entry in {path.name}); "
            "pass load_optimizer_states=False to load the weights only"
        )
    if opened.weights is not None:
        return opened
    names = [list(group) for group in optimizer_state.group_shapes(flat)]
    kind = UniversalReader if universal else NativeZeroReader
    return replace(opened, reader=kind(folder, param_names=names, mp_rank=mp_rank, model_state=state))


def _check_module(engine: DeepSpeedEngine, opened: _Opened, what: LoadWhat) -> None:
    if what.custom_load_fn is not None or _loads_itself(engine.module):
        return
    saved, mine = _shapes(opened.entries()), _shapes(_names_of(engine))
    clauses = differences(saved, mine, names=what.strict)
    if clauses:
        raise CheckpointError(
            f"{opened.path} is of another model: {'; '.join(clauses)}. Nothing was loaded. Missing or extra names are "
            "tolerated with load_module_strict=False"
        )


def _names_of(engine: DeepSpeedEngine) -> dict[str, Any]:
    """The entries of the module's state dict, without copies of what is whole only now and then."""
    return engine.module.state_dict(keep_vars=True)


def _shapes(entries: Mapping[str, Any]) -> dict[str, tuple[int, ...] | None]:
    return {name: tuple(v.shape) if isinstance(v, torch.Tensor) else None for name, v in entries.items()}


def _notes_on_module(engine: DeepSpeedEngine, opened: _Opened, what: LoadWhat) -> list[str]:
    """What the caller has allowed to be missing or extra."""
    if what.strict or what.custom_load_fn is not None or _loads_itself(engine.module):
        return []
    saved, mine = opened.entries(), _names_of(engine)
    missing, extra = [name for name in mine if name not in saved], [name for name in saved if name not in mine]
    notes = [f"not in the checkpoint, so left as they are: {listed(missing)}"] if missing else []
    return notes + ([f"in the checkpoint only, so left aside: {listed(extra)}"] if extra else [])


# Batch norm counts what it has seen, and makes the count up for models older than that. Names and shapes are compared.
_KNOWN_LOADERS = (
    torch.nn.Module._load_from_state_dict,
    torch.nn.modules.batchnorm._NormBase._load_from_state_dict,
    torch.nn.modules.instancenorm._InstanceNorm._load_from_state_dict,
)


def _loads_itself(module: torch.nn.Module) -> bool:
    """Whether a part of the module translates names or shapes on loading, so that comparing them proves nothing."""
    return any(
        any(not is_state_hook(hook) for hook in part._load_state_dict_pre_hooks.values())
        or type(part)._load_from_state_dict not in _KNOWN_LOADERS
        or type(part).load_state_dict is not torch.nn.Module.load_state_dict
        for part in module.modules()
    )


def _load_module(
    engine: DeepSpeedEngine,
    opened: _Opened,
    what: LoadWhat,
    names: ModelNames,
    plan: LoadPlan | None,
    undo: contextlib.ExitStack,
) -> None:
    """Loads the weights, but for those that the plan's masters bring.

    ``undo`` gets what takes that back, where it could not be checked before.
    """
    module, entries, weights, flat = engine.module, opened.state["module"], opened.weights, engine._flat
    if what.custom_load_fn is not None or _loads_itself(module):
        if weights is not None:
            entries = partitioned_state.whole_state_dict(module, entries, weights)
        before = [(tensor, tensor.detach().clone()) for tensor in _tensors_of(engine)]
        undo.callback(_restore, before, flat, _masters_of(flat))
        away = [handle for handle in handles_of(engine.module.parameters()) if handle.away is not None]
        undo.callback(_restore_shards, [(handle, handle.shard) for handle in away])
        engine.load_module_state_dict(entries, strict=what.strict, custom_load_fn=what.custom_load_fn)
        return
    brought = plan.matched if plan is not None and (weights is not None or _masters_count(engine)) else {}
    left = {alias for known in names.live.values() if known[0] in brought for alias in known}
    if weights is not None:
        left |= {name for name in entries if name in weights}
    rest: OrderedDict[str, Any] = OrderedDict((name, value) for name, value in entries.items() if name not in left)
    if hasattr(entries, "_metadata"):  # versions of modules
        rest._metadata = entries._metadata  # type: ignore[attr-defined]
    module.load_state_dict(rest, strict=False)
    if weights is not None:
        partitioned_state.load_weights(names.live, weights, skip=brought)
    if flat is not None:
        held = {known[0] for known in names.live.values() if any(name in names.saved for name in known)}
        optimizer_loading.follow_weights(flat, held - brought.keys())


def _restore(
    values: list[tuple[torch.Tensor, torch.Tensor]],
    flat: FlatOptimizer | None,
    masters: list[tuple[Bucket, torch.Tensor]],
) -> None:
    with torch.no_grad():
        for tensor, value in values:
            tensor.copy_(value)
        for bucket, value in masters:
            if flat is not None:
                flat.set_master_shard(bucket, value)


def _restore_shards(values: list[tuple[ParamHandle, torch.Tensor]]) -> None:
    for handle, value in values:
        handle.store(value)


def _tensors_of(engine: DeepSpeedEngine) -> list[torch.Tensor]:
    """Where the module's values are; of partitioned parameters the shards, and the whole data while there."""
    tensors: list[torch.Tensor] = [*engine.module.buffers()]
    for param in engine.module.parameters():
        handle = handle_of(param)
        if handle is not None and handle.away is None:
            tensors.append(handle.param.ds_tensor)  # type: ignore[attr-defined]
        if handle is None or handle.available:
            tensors.append(param.data)
    return tensors


def _masters_of(flat: FlatOptimizer | None) -> list[tuple[Bucket, torch.Tensor]]:
    """Copies of the masters that are not the weights themselves."""
    buckets = flat.buckets if flat is not None else []
    return [(b, flat.master_shard(b).clone()) for b in buckets if flat is not None and not b.full_precision]


def _load_scheduler(
    engine: DeepSpeedEngine, opened: _Opened, what: LoadWhat, names: ModelNames, undo: contextlib.ExitStack
) -> None:
    """Loads the schedule; ``undo`` gets what takes that back."""
    scheduler, saved = engine.lr_scheduler, opened.state.get("lr_scheduler")
    if not what.scheduler or saved is None or not hasattr(scheduler, "load_state_dict"):
        return
    before = copy.deepcopy(scheduler.state_dict())
    rates = [group.get("lr") for group in engine._groups()]

    def take_back() -> None:
        scheduler.load_state_dict(before)
        for group, rate in zip(engine._groups(), rates, strict=True):
            if "lr" in group:
                group["lr"] = rate

    undo.callback(take_back)
    order = _group_order(engine, opened, names)
    scheduler.load_state_dict(clone_tensors_for_torch_save(_regrouped(saved, before, order)))


def _group_order(engine: DeepSpeedEngine, opened: _Opened, names: ModelNames) -> tuple[int, list[int | None]] | None:
    """How many parameter groups were saved, and which of them each live group is; None if that is not known."""
    flat, shapes = engine._flat, read_zero_group_shapes(opened.state)
    if flat is None or shapes is None:
        return None
    known = {name for group in shapes for name in group}
    matched = {s.name: n for s in flat.slots() if (n := names.source_of(s.param, known)) is not None}
    sources = optimizer_loading.saved_groups(flat, shapes, matched)
    return len(shapes), list(sources)


# What torch's schedulers keep as a list with one entry a parameter group.
_PER_GROUP = {"base_lrs", "_last_lr", "min_lrs", "max_lrs", "base_momentums", "max_momentums", "lr_lambdas"}


def _regrouped(saved: Any, live: Any, order: tuple[int, list[int | None]] | None) -> Any:
    """A scheduler's state with its lists in the order of the live parameter groups; of new groups, what they have."""
    if order is None or not isinstance(saved, Mapping) or not isinstance(live, Mapping):
        return saved
    count, sources = order
    if sources == list(range(count)):
        return saved

    def entry(key: str, value: Any) -> Any:
        mine = live.get(key)
        if isinstance(value, Mapping):
            return _regrouped(value, mine, order)
        if key == "_schedulers" and isinstance(mine, list) and len(mine) == len(value):
            return [_regrouped(one, other, order) for one, other in zip(value, mine, strict=True)]
        per_group = key in _PER_GROUP and isinstance(value, list) and len(value) == count
        if not per_group or not isinstance(mine, list) or len(mine) != len(sources):
            return value
        return [value[source] if source is not None else own for source, own in zip(sources, mine, strict=True)]

    return {key: entry(key, value) for key, value in saved.items()}


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
