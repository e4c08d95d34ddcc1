"""Optimizer state that exists before the shards do: moved from the model's parameters to the tensors in their place.

Some optimizers make their state in the constructor (torch's Adagrad) and fail without it; others come with the state of
earlier training.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from deepspeed._core.reduce.bucket import Bucket
from deepspeed._core.store.states import ShardStates
from deepspeed._core.store.tiles import is_elementwise

__all__ = ["carry_state"]


def carry_state(
    optimizer: torch.optim.Optimizer,
    buckets: Sequence[Bucket],
    masters: Mapping[int, Sequence[torch.Tensor]],
    shards: ShardStates | None,
) -> None:
    """Re-keys ``optimizer.state`` from model parameters to ``masters`` (by bucket index), cut to this rank's slices.

    ``shards`` has the tiles of the slices; None if masters are whole.

    Not collective; every rank must hold the same state.

    Raises:
        ValueError: parameters that become one tensor have states of different kinds or ages.
    """
    old = dict(optimizer.state)
    optimizer.state.clear()
    if not old:
        return
    for bucket in buckets:
        states: list[dict[str, Any]] = [old.get(slot.param, {}) for slot in bucket.slots]
        if not any(states):
            continue
        tensors = masters[bucket.index]
        if shards is None or _is_whole(tensors, bucket, shards):
            for master, state in zip(tensors, states, strict=True):
                optimizer.state[master] = {key: _like_master(value, master) for key, value in state.items()}
            continue
        merged = _merge(bucket, states)
        for tile in shards.tiles(bucket):
            with shards.editing(tile):
                optimizer.state[tile.param] = {
                    key: value[tile.begin : tile.end].to(tile.param.device)
                    if is_elementwise(value) and value.numel() == bucket.shard_numel
                    else copy.copy(value)
                    for key, value in merged.items()
                }


def _is_whole(tensors: Sequence[torch.Tensor], bucket: Bucket, shards: ShardStates) -> bool:
    """Whether the bucket is a single parameter, its state may have any shape, and all of it is here."""
    return (
        shards.in_memory(bucket)
        and len(tensors) == len(bucket.slots)
        and all(t.shape == s.param.shape for t, s in _pairs(tensors, bucket))
    )


def _pairs(tensors: Sequence[torch.Tensor], bucket: Bucket) -> Any:
    return zip(tensors, bucket.slots, strict=True)


def _like_master(value: Any, master: torch.Tensor) -> Any:
    elementwise = isinstance(value, torch.Tensor) and value.dim() > 0 and value.shape == master.shape
    return value.to(device=master.device, dtype=master.dtype) if elementwise else value


def _merge(bucket: Bucket, states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One state for this rank's slice: elementwise tensors cut, what holds for a whole tensor taken once."""
    merged: dict[str, Any] = {}
    first = states[0]
    for key in first:
        values = [state.get(key) for state in states]
        if _is_elementwise(key, values, bucket):
            flat = torch.zeros(bucket.numel, dtype=torch.float32, device=bucket.device)
            for position, value in enumerate(values):
                bucket.write(flat, position, torch.as_tensor(value))
            merged[key] = bucket.slice_of(flat).clone()
        else:
            merged[key] = first[key]
    for slot, state in zip(bucket.slots, states, strict=True):
        same = state.keys() == first.keys() and all(_equal(state[k], v) for k, v in first.items() if merged[k] is v)
        if not same:
            raise ValueError(
                f"the optimizer already has state, and that of {slot.name} differs in kind or age from that of "
                f"{bucket.slots[0].name}, with which it shares a flat tensor. Put them into different parameter "
                "groups, or give deepspeed.initialize an optimizer without state"
            )
    return merged


def _is_elementwise(key: str, values: Sequence[Any], bucket: Bucket) -> bool:
    return key != "step" and all(
        isinstance(value, torch.Tensor) and value.shape == slot.param.shape
        for value, slot in zip(values, bucket.slots, strict=True)
    )


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return torch.equal(one, other)
    return type(one) is type(other) and bool(one == other)
