"""A flat optimizer's state as checkpoint content, and back: which values, by which keys, for which group.

Stages 1 and 2 store, for each optimizer group, one rank's contiguous piece of the group's concatenated parameters
(``contiguous`` layout), whatever the buckets in memory are; stage 3 stores this rank's piece of each parameter, one after
the other (``per_param``), which is what it holds; stage 0 stores whole parameters.
"""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Collection, Sequence
from typing import Any

import torch

from deepspeed._core.ckpt.exchange import exchange
from deepspeed._core.ckpt.reader import MASTER, NativeZeroReader, ZeroGroup
from deepspeed._core.layout.spans import ShardLayout, bucketed, contiguous, per_param
from deepspeed._core.params.bucket import ShardBucket
from deepspeed._core.reduce.bucket import Bucket
from deepspeed.errors import CheckpointError
from deepspeed.runtime.flat_optimizer import FlatOptimizer
from deepspeed.utils.logging import warning_once
from deepspeed.version import __version__

__all__ = ["check_matches", "group_shapes", "load_into", "partition_state", "whole_state"]

# Group entries that come with the class (in torch, Adam and AdamW differ in the last only): the running program's stay.
_IMPLEMENTATION_KEYS = {"params", "foreach", "fused", "capturable", "differentiable", "decoupled_weight_decay"}

# What a dynamic loss scaler has found out; its other attributes are settings, which the running config decides.
_SCALER_PROGRESS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis", "consecutive_skips")


def group_shapes(flat: FlatOptimizer) -> list[OrderedDict[str, torch.Size]]:
    """Names and shapes of the trained parameters of each optimizer group, in the order of the files."""
    groups: list[OrderedDict[str, torch.Size]] = [OrderedDict() for _ in flat.param_groups]
    for slot in flat.slots():
        groups[slot.bucket.group_index][slot.name] = slot.param.shape
    return groups


def _group_options(group: dict[str, Any], params: list[int]) -> dict[str, Any]:
    plain = {k: v for k, v in group.items() if k != "params" and not callable(v)}
    return {**plain, "params": params}


def _split_state(flat: FlatOptimizer, bucket: Bucket) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """A shard's state: tensors with one value an element, and values that hold for the shard as a whole."""
    (master,) = flat.master_of(bucket)
    state = flat.optimizer.state.get(master, {})
    tensors = {k: v for k, v in state.items() if isinstance(v, torch.Tensor) and v.dim()}
    for key, value in tensors.items():
        if value.shape != master.shape:
            raise CheckpointError(
                f"{type(flat.optimizer).__name__} keeps {key!r} of shape {tuple(value.shape)} for a shard of "
                f"{master.numel()} elements: state that is not elementwise can be saved with ZeRO stage 0 only"
            )
    return tensors, {k: v for k, v in state.items() if k not in tensors}


def _bucket_layout(bucket: Bucket, world_size: int) -> ShardLayout:
    if isinstance(bucket, ShardBucket):
        return per_param({slot.name: slot.numel for slot in bucket.slots}, world_size)
    members = [(slot.name, slot.start, slot.numel) for slot in bucket.slots]
    return bucketed([members], [bucket.numel], world_size)


def partition_state(flat: FlatOptimizer) -> dict[str, Any]:
    """This rank's ``optimizer_state_dict`` of stages 1 to 3, on the CPU. Collective.

    Raises:
        CheckpointError: the optimizer keeps state that is not elementwise, which no other cut of the group could use.
    """
    return _per_param_state(flat) if flat.stage == 3 else _contiguous_state(flat)


def _progress(flat: FlatOptimizer) -> dict[str, Any]:
    return {
        "loss_scaler": flat.loss_scaler.state_dict(),
        "dynamic_loss_scale": flat.dynamic_loss_scale,
        "overflow": flat.overflow,
    }


def _per_param_state(flat: FlatOptimizer) -> dict[str, Any]:
    """Stage 3: what this rank holds, in flat sub-groups of at most ``sub_group_size`` elements; no communication."""
    masters: list[torch.Tensor] = []
    state: dict[int, dict[str, Any]] = {}
    groups: list[dict[str, Any]] = []
    for index, group in enumerate(flat.param_groups):
        buckets = [bucket for bucket in flat.buckets if bucket.group_index == index]
        tiles = _tiles(buckets, flat.settings.sub_group_numel)
        groups.append(_group_options(group, list(range(len(masters), len(masters) + len(tiles)))))
        for tile in tiles:
            held = [_split_state(flat, bucket) for bucket in tile]
            entry = {key: _to_cpu(value) for _, scalars in held for key, value in scalars.items()}
            for key in {key for tensors, _ in held for key in tensors}:
                parts = zip(held, tile, strict=True)
                entry[key] = _joined([t[key] if key in t else torch.zeros_like(b.master) for (t, _), b in parts])
            if entry:
                state[len(masters)] = entry
            masters.append(_joined([bucket.master for bucket in tile]))
    return {
        "zero_stage": int(flat.stage),
        **_progress(flat),
        "partition_count": flat.transport.world_size,
        "optimizer_state_dict": {"state": state, "param_groups": groups},
        "fp32_flat_groups": masters,
    }


def _tiles(buckets: Sequence[Bucket], limit_numel: int) -> list[list[Bucket]]:
    """Consecutive buckets of a group that are one flat vector in the file; at least one tile."""
    tiles: list[list[Bucket]] = [[]]
    numel = 0
    for bucket in buckets:
        if tiles[-1] and numel + bucket.shard_numel > limit_numel:
            tiles.append([])
            numel = 0
        tiles[-1].append(bucket)
        numel += bucket.shard_numel
    return tiles


def _joined(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """One after the other, on the CPU; in memory of its own, since a view drags its storage into the file."""
    return torch.cat([part.detach().reshape(-1).cpu() for part in parts] or [torch.zeros(0)])


def _contiguous_state(flat: FlatOptimizer) -> dict[str, Any]:
    """Stages 1 and 2: this rank's part of each group's flat vector. Collective."""
    masters: list[torch.Tensor] = []
    state: dict[int, dict[str, Any]] = {}
    paddings: list[int] = []
    transport = flat.transport
    for index, shapes in enumerate(group_shapes(flat)):
        buckets = [b for b in flat.buckets if b.group_index == index]
        target = contiguous({name: shape.numel() for name, shape in shapes.items()}, transport.world_size)
        padding = target.padding[transport.rank]
        paddings.append(padding)
        if not buckets:
            masters.append(torch.zeros(0))
            continue
        source = bucketed(
            [[(s.name, s.start, s.numel) for s in b.slots] for b in buckets],
            [b.numel for b in buckets],
            transport.world_size,
        )

        def to_file(
            tensors: list[torch.Tensor], source: ShardLayout = source, target: ShardLayout = target
        ) -> torch.Tensor:
            local = torch.cat([t.detach().reshape(-1) for t in tensors])
            return exchange(local, source, target, transport).cpu()

        whole = to_file([b.master for b in buckets])
        # The documented files hold the masters without the padding at the end, the state with it.
        masters.append(whole[: whole.numel() - padding].clone())
        held = [_split_state(flat, bucket) for bucket in buckets]
        entry = {key: _to_cpu(value) for key, value in held[0][1].items()}
        entry.update({key: to_file([tensors[key] for tensors, _ in held]) for key in held[0][0]})
        if entry:
            state[index] = entry
    return {
        **_progress(flat),
        "clip_grad": flat.settings.gradient_clipping,
        "base_optimizer_state": {
            "state": state,
            "param_groups": [_group_options(g, [i]) for i, g in enumerate(flat.param_groups)],
        },
        "single_partition_of_fp32_groups": masters,
        "zero_stage": int(flat.stage),
        "group_paddings": paddings,
        "partition_count": [transport.world_size] * len(paddings),
        "ds_version": __version__,
    }


def whole_state(flat: FlatOptimizer, in_module: Collection[str]) -> dict[str, Any]:
    """The ``optimizer`` entry of a stage 0 model file, on the CPU: whole parameters, the same on all ranks.

    Masters go in where the module's weights are not the same values, or (not in ``in_module``) not in the file at all.
    """
    state: dict[int, dict[str, Any]] = {}
    groups: list[dict[str, Any]] = []
    masters: list[list[torch.Tensor]] = []
    count = 0
    for group in flat.param_groups:
        ids = list(range(count, count + len(group["params"])))
        count += len(ids)
        groups.append(_group_options(group, ids))
        masters.append([_to_cpu(p.detach()) for p in group["params"]])
        for i, param in zip(ids, group["params"], strict=True):
            held = flat.optimizer.state.get(param, {})
            if held:
                state[i] = {k: _to_cpu(v) for k, v in held.items()}
    inner = {"state": state, "param_groups": groups}
    if all(bucket.full_precision for bucket in flat.buckets) and all(s.name in in_module for s in flat.slots()):
        return inner
    progress = flat.loss_scaler.state_dict()
    return {
        "dynamic_loss_scale": flat.dynamic_loss_scale,
        "cur_scale": flat.loss_scale,
        **{key: progress[key] for key in ("cur_iter", "last_overflow_iter") if key in progress},
        "loss_scaler": flat.loss_scaler.state_dict(),
        "optimizer_state_dict": inner,
        "fp32_groups": masters,
    }


def _to_cpu(value: Any) -> Any:
    """Tensors as compact CPU copies (a view would drag its whole flat buffer into the file)."""
    return value.detach().cpu().clone() if isinstance(value, torch.Tensor) else value


def check_matches(flat: FlatOptimizer, reader: NativeZeroReader) -> None:
    """Raises ``CheckpointError``, before anything is changed, if the files are of another model or optimizer."""
    reader.require_shapes({name: tuple(shape) for group in group_shapes(flat) for name, shape in group.items()})
    where = {name: index for index, group in enumerate(reader.groups) for name in group.shapes}
    seen = set()
    for slot in flat.slots():
        pair = (where[slot.name], slot.bucket.group_index)
        if pair not in seen:
            seen.add(pair)
            _check_kind(flat, reader, *pair)


def _check_kind(flat: FlatOptimizer, reader: NativeZeroReader, saved_index: int, live_index: int) -> None:
    saved, live = reader.groups[saved_index], flat.param_groups[live_index]
    template = _state_template(flat, live_index, saved.param_group)
    saved_keys = set(saved.state_keys)
    if template is not None and (saved_keys or saved.state_scalars) and sum(saved.layout.buffer_numels):
        wrong = saved_keys != {k for k, v in template.items() if _elementwise(v)}
        wrong = wrong or ("step" in template and _scalar_of(saved, "step") is None)
    else:
        # Saved before the first step, or by an optimizer without state: only the options tell.
        telling = {"betas", "momentum", "eps"}
        wrong = bool(saved.param_group) and telling & set(saved.param_group) != telling & set(live)
    if wrong:
        raise CheckpointError(
            f"{reader.tag_dir} holds the state of another kind of optimizer: state {sorted(saved_keys)} and group "
            f"options {sorted(set(saved.param_group) - _IMPLEMENTATION_KEYS)}; {type(flat.optimizer).__name__} here "
            f"has state {sorted(template or ())} and options {sorted(set(live) - _IMPLEMENTATION_KEYS)}. Pass "
            "load_optimizer_states=False to load the weights only"
        )


def _elementwise(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dim() > 0


def _scalar_of(group: ZeroGroup, key: str) -> Any:
    """A value for the group as a whole; some optimizers keep their step count among the options."""
    return group.state_scalars.get(key, group.param_group.get(key))


def _state_template(flat: FlatOptimizer, group_index: int, saved: dict[str, Any]) -> dict[str, Any] | None:
    """What a step of the running optimizer, with the options it will have after loading, puts into its state.

    Found by stepping a scrap tensor, since torch's optimizers do not tell. None where that does not work, or where the
    state is not elementwise.
    """
    live = flat.param_groups[group_index]
    optimizer = flat.optimizer
    scrap = torch.nn.Parameter(torch.zeros((2, 3) if flat.stage == 0 else (6,)))
    scrap.grad = torch.zeros_like(scrap)
    options = {**live, **{k: v for k, v in saved.items() if k in live and k not in _IMPLEMENTATION_KEYS}}
    try:
        probe = type(optimizer).__new__(type(optimizer))
        group = {**options, "params": [scrap]}
        probe.__setstate__({**optimizer.__getstate__(), "state": defaultdict(dict), "param_groups": [group]})
        probe.step()
        state = dict(probe.state.get(scrap, {}))
    except Exception:  # a client's optimizer may need what only its constructor sets
        return None
    shapes = {tuple(v.shape) for v in state.values() if _elementwise(v)}
    return state if shapes <= {tuple(scrap.shape)} else None


def load_into(flat: FlatOptimizer, reader: NativeZeroReader) -> None:
    """Fills masters, optimizer state, group options and scaler from the files; reads this rank's ranges only.

    Call :func:`check_matches` before. Not collective; the weights on other ranks follow with ``publish_weights``.
    """
    where = {name: index for index, group in enumerate(reader.groups) for name in group.shapes}
    whole = flat.stage == 0
    templates = [_template_after(flat, reader, where, index) for index in range(len(flat.param_groups))]
    for bucket in flat.buckets:
        layout = _bucket_layout(bucket, 1 if whole else flat.transport.world_size)
        rank = 0 if whole else flat.transport.rank
        reader.fill(None, MASTER, layout, rank, bucket.master.detach())
        template = templates[bucket.group_index]
        masters = flat.master_of(bucket)
        for master in masters:
            flat.optimizer.state.pop(master, None)
        if whole and reader.zero_stage == 0:
            for slot, master in zip(bucket.slots, masters, strict=True):
                state = reader.whole_state(slot.name) or {}
                _set_state(flat, master, state, template, reader.groups[where[slot.name]])
            continue
        group = reader.groups[where[bucket.slots[0].name]]
        states: list[dict[str, Any]] = [dict(group.state_scalars) for _ in masters]
        for key in group.state_keys:
            values = torch.zeros(bucket.master.numel(), dtype=bucket.master.dtype, device=bucket.device)
            reader.fill(None, key, layout, rank, values)
            for state, value in zip(states, _per_master(flat, bucket, values), strict=True):
                state[key] = value
        for master, state in zip(masters, states, strict=True):
            _set_state(flat, master, state, template, group)
    _load_options(flat, reader, where)
    _load_scaler(flat, reader)
    flat.overflow = False


def _template_after(
    flat: FlatOptimizer, reader: NativeZeroReader, where: dict[str, int], group_index: int
) -> dict[str, Any] | None:
    names = [slot.name for slot in flat.slots() if slot.bucket.group_index == group_index]
    return _state_template(flat, group_index, reader.groups[where[names[0]]].param_group) if names else None


def _set_state(
    flat: FlatOptimizer, master: torch.Tensor, state: dict[str, Any], like: dict[str, Any] | None, saved: ZeroGroup
) -> None:
    """Gives a master its state, with the types that the optimizer itself uses (a step count may be int or tensor)."""
    if not state:
        return
    loaded: dict[str, Any] = {}
    if "step" in (like or {}):
        state = {"step": _scalar_of(saved, "step"), **state}
    for key, value in state.items():
        example = (like or {}).get(key)
        if isinstance(example, torch.Tensor) and not example.dim():
            loaded[key] = torch.tensor(float(value), dtype=example.dtype)
        elif isinstance(example, (int, float)) and not isinstance(example, bool):
            loaded[key] = type(example)(value)
        elif isinstance(value, torch.Tensor):
            # A copy: whole states come as views of the file.
            loaded[key] = value.to(device=master.device if value.dim() else value.device, copy=True)
        else:
            loaded[key] = value
    for key, example in (like or {}).items():
        if key not in loaded and _elementwise(example):
            loaded[key] = torch.zeros_like(master)  # parameters without elements have no state in the files
    flat.optimizer.state[master] = loaded


def _per_master(flat: FlatOptimizer, bucket: Bucket, values: torch.Tensor) -> list[torch.Tensor]:
    return [slot.view(values) for slot in bucket.slots] if flat.stage == 0 else [values]


def _load_options(flat: FlatOptimizer, reader: NativeZeroReader, where: dict[str, int]) -> None:
    """Learning rates and other options go into the live group dicts, which clients and schedulers hold."""
    for index, live in enumerate(flat.param_groups):
        names = [slot.name for b in flat.buckets if b.group_index == index for slot in b.slots]
        if not names:
            continue
        for key, value in reader.groups[where[names[0]]].param_group.items():
            if key in live and key not in _IMPLEMENTATION_KEYS:
                live[key] = value


def _load_scaler(flat: FlatOptimizer, reader: NativeZeroReader) -> None:
    """A dynamic scale goes on where it was; a static one is the config's, whatever the files had."""
    common = reader.common
    if not flat.dynamic_loss_scale:
        return
    if not common.get("dynamic_loss_scale", False):
        warning_once("the checkpoint has no dynamic loss scale: it starts anew, as configured")
        return
    saved = {**common, **(common.get("loss_scaler") or {})}
    flat.loss_scaler.load_state_dict({key: saved[key] for key in _SCALER_PROGRESS if key in saved})
