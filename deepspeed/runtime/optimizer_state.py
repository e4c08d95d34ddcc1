"""A flat optimizer's state as checkpoint content: which values, by which keys, for which group.

Stages 1 and 2 store, for each optimizer group, one rank's contiguous piece of the group's concatenated parameters
(``contiguous`` layout), whatever the buckets in memory are; stage 3 stores this rank's piece of each parameter, one after
the other (``per_param``), which is what it holds; stage 0 stores whole parameters.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Sequence
from typing import Any

import torch

from deepspeed._core.ckpt.source import Exchanged, Part, Rope, Source
from deepspeed._core.layout.spans import bucketed, contiguous
from deepspeed._core.reduce.bucket import Bucket
from deepspeed._core.store.tiles import is_elementwise
from deepspeed.errors import CheckpointError
from deepspeed.runtime.flat_optimizer import FlatOptimizer
from deepspeed.utils.tensor_fragment import fragment_address
from deepspeed.version import __version__

__all__ = ["group_shapes", "partition_state", "whole_state"]


def group_shapes(flat: FlatOptimizer) -> list[OrderedDict[str, torch.Size]]:
    """Names and shapes of the trained parameters of each optimizer group, in the order of the files."""
    groups: list[OrderedDict[str, torch.Size]] = [OrderedDict() for _ in flat.param_groups]
    for slot in flat.slots():
        groups[slot.bucket.group_index][slot.name] = slot.param.shape
    return groups


def _group_options(group: dict[str, Any], params: list[int]) -> dict[str, Any]:
    plain = {k: v for k, v in group.items() if k != "params" and not callable(v)}
    return {**plain, "params": params}


def _names(flat: FlatOptimizer, bucket: Bucket) -> list[str]:
    """Names of a shard's states with one value an element."""
    for tile in flat.states.tiles(bucket):
        for key, value in flat.states.state_of(tile).items():
            if is_elementwise(value) and value.shape != tile.param.shape:
                raise CheckpointError(
                    f"{type(flat.optimizer).__name__} keeps {key!r} of shape {tuple(value.shape)} for a shard of "
                    f"{tile.numel} elements: state that is not elementwise can be saved with ZeRO stage 0 only"
                )
    return flat.states.names(bucket)


def partition_state(flat: FlatOptimizer, group: torch.distributed.ProcessGroup | None) -> dict[str, Any]:
    """This rank's ``optimizer_state_dict`` of stages 1 to 3: plain values, and live tensors and sources of such.

    No communication here; the sources of stages 1 and 2 communicate over ``group`` when they are written.

    Args:
        flat: the optimizer.
        group: the ranks of ``flat.transport``, over a backend for CPU tensors that nobody else uses; None for one rank.

    Raises:
        CheckpointError: the optimizer keeps state that is not elementwise, which no other cut of the group could use.
    """
    flat.require_intact()
    return _per_param_state(flat) if flat.stage == 3 else _contiguous_state(flat, group)


def _progress(flat: FlatOptimizer) -> dict[str, Any]:
    return {
        # The object, by its public name: the reference goes on with what it finds here, and its stage 3 insists on it.
        "loss_scaler": flat.loss_scaler,
        "dynamic_loss_scale": flat.dynamic_loss_scale,
        "overflow": flat.overflow,
    }


def _per_param_state(flat: FlatOptimizer) -> dict[str, Any]:
    """Stage 3: what this rank holds, in flat sub-groups of at most ``sub_group_size`` elements; no communication."""
    masters: list[Source] = []
    state: dict[int, dict[str, Any]] = {}
    groups: list[dict[str, Any]] = []
    for index, group in enumerate(flat.param_groups):
        buckets = [bucket for bucket in flat.buckets if bucket.group_index == index]
        tiles = _tiles(buckets, flat.settings.sub_group_numel)
        groups.append(_group_options(group, list(range(len(masters), len(masters) + len(tiles)))))
        for tile in tiles:
            entry = {key: value for bucket in tile for key, value in flat.states.scalars(bucket).items()}
            for key in sorted({name for bucket in tile for name in _names(flat, bucket)}):
                entry[key] = Rope([part for bucket in tile for part in flat.states.parts(bucket, key)])
            if entry:
                state[len(masters)] = entry
            masters.append(Rope([part for bucket in tile for part in flat.states.parts(bucket, None)]))
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


def _contiguous_state(flat: FlatOptimizer, group: torch.distributed.ProcessGroup | None) -> dict[str, Any]:
    """Stages 1 and 2: this rank's part of each group's flat vector."""
    masters: list[Source] = []
    state: dict[int, dict[str, Any]] = {}
    paddings: list[int] = []
    mappings: list[OrderedDict[str, fragment_address]] = []
    rank, world = flat.transport.rank, flat.transport.world_size
    for index, shapes in enumerate(group_shapes(flat)):
        buckets = [b for b in flat.buckets if b.group_index == index]
        wanted = contiguous({name: shape.numel() for name, shape in shapes.items()}, world)
        padding = wanted.padding[rank]
        paddings.append(padding)
        # For the reference's converter; our reader knows the layout.
        spans = [span for span in wanted.of_rank(rank) if span.numel]
        mappings.append(OrderedDict((s.name, fragment_address(s.numel, s.offset)) for s in spans))
        if not buckets:
            masters.append(Rope([]))
            continue
        held = bucketed(
            [[(s.name, s.start, s.numel) for s in b.slots] for b in buckets], [b.numel for b in buckets], world
        )
        # The documented files hold the masters without the padding at the end, the state with it.
        numel = wanted.buffer_numels[rank] - padding

        def parts(key: str | None, buckets: list[Bucket] = buckets) -> list[Part]:
            return [part for bucket in buckets for part in flat.states.parts(bucket, key)]

        masters.append(Exchanged(parts(None), held, wanted, group, rank, numel))
        entry: dict[str, Any] = flat.states.scalars(buckets[0])
        for key in sorted({name for bucket in buckets for name in _names(flat, bucket)}):
            entry[key] = Exchanged(parts(key), held, wanted, group, rank)
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
        "partition_count": [world] * len(paddings),
        "param_slice_mappings": mappings,
        "ds_version": __version__,
    }


def whole_state(flat: FlatOptimizer, in_module: Collection[str]) -> dict[str, Any]:
    """The ``optimizer`` entry of a stage 0 model file: whole parameters, the same on all ranks, live.

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
        masters.append([p.detach() for p in group["params"]])
        for i, param in zip(ids, group["params"], strict=True):
            held = flat.optimizer.state.get(param, {})
            if held:
                state[i] = dict(held)
    inner = {"state": state, "param_groups": groups}
    if all(bucket.full_precision for bucket in flat.buckets) and all(s.name in in_module for s in flat.slots()):
        return inner
    progress = flat.loss_scaler.state_dict()
    return {
        "dynamic_loss_scale": flat.dynamic_loss_scale,
        "cur_scale": flat.loss_scale,
        "cur_iter": 0,  # of a static scaler, too: the reference insists on it
        **{key: progress[key] for key in ("cur_iter", "last_overflow_iter") if key in progress},
        "loss_scaler": flat.loss_scaler.state_dict(),
        "optimizer_state_dict": inner,
        "fp32_groups": masters,
    }
