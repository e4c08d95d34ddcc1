"""A flat optimizer's state from a checkpoint: which saved values go where, by the names of the parameters.

What the files hold is :mod:`deepspeed.runtime.optimizer_state`'s to say.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch

from deepspeed._core.ckpt.reader import MASTER, NativeZeroReader, ZeroGroup
from deepspeed._core.layout.spans import ShardLayout, bucketed, per_param
from deepspeed._core.params.bucket import ShardBucket
from deepspeed._core.reduce.bucket import Bucket
from deepspeed.errors import CheckpointError
from deepspeed.runtime.flat_optimizer import FlatOptimizer
from deepspeed.runtime.optimizer_state import group_shapes
from deepspeed.utils.logging import warning_once

__all__ = ["check_matches", "load_into"]

# Group entries that come with the class (in torch, Adam and AdamW differ in the last only): the running program's stay.
_IMPLEMENTATION_KEYS = {"params", "foreach", "fused", "capturable", "differentiable", "decoupled_weight_decay"}

# What a dynamic loss scaler has found out; its other attributes are settings, which the running config decides.
_SCALER_PROGRESS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis", "consecutive_skips")


def _bucket_layout(bucket: Bucket, world_size: int) -> ShardLayout:
    if isinstance(bucket, ShardBucket):
        return per_param({slot.name: slot.numel for slot in bucket.slots}, world_size)
    members = [(slot.name, slot.start, slot.numel) for slot in bucket.slots]
    return bucketed([members], [bucket.numel], world_size)


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
