"""A flat optimizer's state as checkpoint content, and back: which values, by which keys, for which group.

Stages 1 and 2 store, for each optimizer group, one rank's contiguous piece of the group's concatenated parameters
(``contiguous`` layout), whatever the buckets in memory are; stage 0 stores whole parameters.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch

from deepspeed._core.ckpt.exchange import exchange
from deepspeed._core.ckpt.reader import MASTER, NativeZeroReader
from deepspeed._core.layout.spans import ShardLayout, bucketed, contiguous
from deepspeed._core.reduce.bucket import Bucket, Slot
from deepspeed.errors import CheckpointError
from deepspeed.runtime.flat_optimizer import FlatOptimizer
from deepspeed.utils.logging import warning_once
from deepspeed.version import __version__

__all__ = ["check_matches", "group_shapes", "load_into", "partition_state", "whole_state"]

# Group entries that choose an implementation, not a result: those of the running program stay.
_IMPLEMENTATION_KEYS = {"params", "foreach", "fused", "capturable", "differentiable"}


def group_shapes(flat: FlatOptimizer) -> list[OrderedDict[str, torch.Size]]:
    """Names and shapes of the trained parameters of each optimizer group, in the order of the files."""
    groups: list[OrderedDict[str, torch.Size]] = [OrderedDict() for _ in flat.param_groups]
    for slot in flat.slots():
        groups[slot.bucket.group_index][slot.name] = slot.param.shape
    return groups


def _group_options(group: dict[str, Any], params: list[int]) -> dict[str, Any]:
    plain = {k: v for k, v in group.items() if k != "params" and not callable(v)}
    return {**plain, "params": params}


def _split_state(state: dict[str, Any], like: torch.Tensor) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Element-wise state tensors, and values that hold for the tensor as a whole."""
    tensors = {k: v for k, v in state.items() if isinstance(v, torch.Tensor) and v.shape == like.shape and v.dim()}
    return tensors, {k: v for k, v in state.items() if k not in tensors}


def _bucket_layout(bucket: Bucket, world_size: int) -> ShardLayout:
    members = [(slot.name, slot.start, slot.numel) for slot in bucket.slots]
    return bucketed([members], [bucket.numel], world_size)


def partition_state(flat: FlatOptimizer) -> dict[str, Any]:
    """This rank's ``optimizer_state_dict`` of stages 1 and 2, on the CPU. Collective."""
    masters: list[torch.Tensor] = []
    state: dict[int, dict[str, Any]] = {}
    paddings: list[int] = []
    world = flat.transport.world_size
    for index, shapes in enumerate(group_shapes(flat)):
        buckets = [b for b in flat.buckets if b.group_index == index]
        numels = {name: shape.numel() for name, shape in shapes.items()}
        target = contiguous(numels, world)
        source = bucketed(
            [[(s.name, s.start, s.numel) for s in b.slots] for b in buckets], [b.numel for b in buckets], world
        )

        def to_file(
            tensors: list[torch.Tensor], source: ShardLayout = source, target: ShardLayout = target
        ) -> torch.Tensor:
            local = torch.cat([t.detach().reshape(-1) for t in tensors] or [torch.zeros(0)])
            return exchange(local, source, target, flat.transport).cpu()

        masters.append(to_file([b.master.float() for b in buckets]))
        paddings.append(sum(target.buffer_numels) - sum(numels.values()))
        held = [_split_state(flat.optimizer.state.get(flat.master_of(b)[0], {}), b.master) for b in buckets]
        if held and held[0]:
            entry: dict[str, Any] = {k: _to_cpu(v) for k, v in held[0][1].items()}
            for key in held[0][0]:
                entry[key] = to_file([tensors[key] for tensors, _ in held])
            if entry:
                state[index] = entry
    return {
        "zero_stage": flat.stage,
        "loss_scaler": flat.loss_scaler.state_dict(),
        "dynamic_loss_scale": flat.dynamic_loss_scale,
        "overflow": flat.overflow,
        "clip_grad": flat.settings.gradient_clipping,
        "base_optimizer_state": {
            "state": state,
            "param_groups": [_group_options(g, [i]) for i, g in enumerate(flat.param_groups)],
        },
        "single_partition_of_fp32_groups": masters,
        "group_paddings": paddings if flat.transport.rank == world - 1 else [0] * len(paddings),
        "partition_count": [world] * len(paddings),
        "ds_version": __version__,
    }


def whole_state(flat: FlatOptimizer) -> dict[str, Any]:
    """The ``optimizer`` entry of a stage 0 model file, on the CPU: whole parameters, the same on all ranks."""
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
    if all(bucket.full_precision for bucket in flat.buckets):
        return inner
    return {
        "dynamic_loss_scale": flat.dynamic_loss_scale,
        "cur_scale": flat.loss_scale,
        "loss_scaler": flat.loss_scaler.state_dict(),
        "optimizer_state_dict": inner,
        "fp32_groups": masters,
    }


def _to_cpu(value: Any) -> Any:
    """Tensors as compact CPU copies (a view would drag its whole flat buffer into the file)."""
    return value.detach().cpu().clone() if isinstance(value, torch.Tensor) else value


def check_matches(flat: FlatOptimizer, reader: NativeZeroReader) -> None:
    """Raises ``CheckpointError``, before anything is changed, if the files are of another model or optimizer."""
    shapes = {name: tuple(shape) for group in group_shapes(flat) for name, shape in group.items()}
    reader.require_shapes(shapes)
    where = {name: index for index, group in enumerate(reader.groups) for name in group.shapes}
    for bucket in flat.buckets:
        saved = reader.groups[where[bucket.slots[0].name]].param_group
        live = flat.param_groups[bucket.group_index]
        if saved and ("betas" in saved) != ("betas" in live):
            raise CheckpointError(
                f"{reader.tag_dir} holds the state of another optimizer (group options "
                f"{sorted(set(saved) - _IMPLEMENTATION_KEYS)}, here {sorted(set(live) - _IMPLEMENTATION_KEYS)}); "
                "pass load_optimizer_states=False to load the weights only"
            )


def load_into(flat: FlatOptimizer, reader: NativeZeroReader) -> None:
    """Fills masters, optimizer state, group options and scaler from the files; reads this rank's ranges only."""
    where = {name: index for index, group in enumerate(reader.groups) for name in group.shapes}
    whole = flat.stage == 0
    for bucket in flat.buckets:
        layout = _bucket_layout(bucket, 1 if whole else flat.transport.world_size)
        rank = 0 if whole else flat.transport.rank
        reader.fill(None, MASTER, layout, rank, bucket.master.detach())
        group = reader.groups[where[bucket.slots[0].name]]
        for master in flat.master_of(bucket):
            flat.optimizer.state[master] = {}
        for key in group.state_keys:
            values = torch.zeros(bucket.master.numel(), dtype=torch.float32, device=bucket.device)
            reader.fill(None, key, layout, rank, values)
            for master, value in _per_master(flat, bucket, values):
                flat.optimizer.state[master][key] = value
        for master in flat.master_of(bucket):
            for key, scalar in group.state_scalars.items():
                flat.optimizer.state[master][key] = scalar.clone() if isinstance(scalar, torch.Tensor) else scalar
            if not flat.optimizer.state[master]:
                del flat.optimizer.state[master]
    _load_options(flat, reader, where)
    scaler = reader.common.get("loss_scaler") or {k: v for k, v in reader.common.items() if k == "cur_scale"}
    if bool(reader.common.get("dynamic_loss_scale", False)) == flat.dynamic_loss_scale:
        flat.loss_scaler.load_state_dict(scaler)
    elif flat.settings.precision.loss_scaling:
        warning_once("the checkpoint's loss scaler is of another kind (static or dynamic); the configured one starts")


def _per_master(flat: FlatOptimizer, bucket: Bucket, values: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    masters = flat.master_of(bucket)
    if flat.stage != 0:
        return [(masters[0], values)]
    slots: list[Slot] = bucket.slots
    return [(master, slot.view(values).clone()) for master, slot in zip(masters, slots, strict=True)]


def _load_options(flat: FlatOptimizer, reader: NativeZeroReader, where: dict[str, int]) -> None:
    """Learning rates and other options go into the live group dicts, which clients and schedulers hold."""
    for index, live in enumerate(flat.param_groups):
        names = [slot.name for b in flat.buckets if b.group_index == index for slot in b.slots]
        if not names:
            continue
        for key, value in reader.groups[where[names[0]]].param_group.items():
            if key in live and key not in _IMPLEMENTATION_KEYS:
                live[key] = value
