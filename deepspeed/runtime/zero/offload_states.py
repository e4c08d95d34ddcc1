"""Moving an engine's states off the device for a while, and back: room for something else between two steps.

Source: "Offload States" in the ZeRO-3 chapter of the DeepSpeed documentation. Where device memory is host memory, only the
gradient buffers are freed: the rest is where it would be moved to.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator
from typing import TYPE_CHECKING, Any

import torch

from deepspeed._core.ckpt.guard import before_change
from deepspeed._core.pages import empty_flat
from deepspeed._core.params.bucket import ShardBucket
from deepspeed._core.params.handle import handle_of
from deepspeed._core.reduce.bucket import Bucket
from deepspeed._core.store.tiles import is_elementwise
from deepspeed.runtime.zero.offload_config import OffloadDeviceEnum, OffloadStateTypeEnum

if TYPE_CHECKING:
    from deepspeed.runtime.flat_optimizer import FlatOptimizer

__all__ = ["get_state_devices", "offload", "reload"]

Mover = Callable[[torch.Tensor], torch.Tensor]
_KINDS = tuple(OffloadStateTypeEnum)


def get_state_devices(model: Any, state: OffloadStateTypeEnum) -> set[torch.device]:
    """The devices that a kind of state of an engine is on now. Empty if there is none, or it is in files. Not collective.

    Raises:
        ValueError: ``state`` is none of :class:`OffloadStateTypeEnum`, or the engine trains nothing.
    """
    flat = getattr(model, "_flat", None)
    if flat is None:
        raise ValueError("get_state_devices needs an engine with an optimizer, as deepspeed.initialize returns it")
    return {tensor.device for tensor in _tensors(flat, _kind(state))}


def _kind(state: Any) -> OffloadStateTypeEnum:
    try:
        return OffloadStateTypeEnum(state)
    except ValueError:
        names = ", ".join(kind.value for kind in _KINDS)
        raise ValueError(f"unknown kind of state {state!r}; there are: {names}") from None


def _tensors(flat: FlatOptimizer, kind: OffloadStateTypeEnum) -> Iterator[torch.Tensor]:
    for bucket in flat.buckets:
        if kind == OffloadStateTypeEnum.optim_states:
            yield from (value for value in _states_of(flat, bucket))
        elif kind == OffloadStateTypeEnum.hp_params:
            if flat.stage == 0 or flat.states.in_memory(bucket):
                yield bucket.master
        elif kind == OffloadStateTypeEnum.lp_params:
            if not _is_away(bucket):
                yield bucket.weights
        elif kind == OffloadStateTypeEnum.lp_grads:
            yield bucket.grad_shard
        elif bucket.grad_full is not None:
            yield bucket.grad_full


def _is_away(bucket: Bucket) -> bool:
    return isinstance(bucket, ShardBucket) and bucket.away


def _states_of(flat: FlatOptimizer, bucket: Bucket) -> list[torch.Tensor]:
    """Element-wise optimizer state in memory."""
    if flat.stage and not flat.states.in_memory(bucket):
        return []
    states = (flat.optimizer.state.get(master, {}) for master in flat.master_of(bucket))
    return [value for state in states for value in state.values() if is_elementwise(value)]


def offload(
    flat: FlatOptimizer,
    include: Container[OffloadStateTypeEnum] | None,
    device: OffloadDeviceEnum | str,
    pin_memory: bool,
    non_blocking: bool,
) -> None:
    """See ``DeepSpeedEngine.offload_states``."""
    if OffloadDeviceEnum(device) != OffloadDeviceEnum.cpu:
        raise ValueError(
            f"offload_states moves to the cpu, not to {OffloadDeviceEnum(device).value}; for states that live on NVMe, set "
            "zero_optimization.offload_optimizer"
        )
    if include is not None and isinstance(include, (list, tuple, set, frozenset)):
        for state in include:
            _kind(state)
    if flat.reducer.has_gradients or any(bucket.touched or bucket.seen for bucket in flat.buckets):
        raise RuntimeError(
            "offload_states in the middle of an accumulation window would lose its gradients: call it after step()"
        )
    flat.require_intact()
    kinds = [kind for kind in _KINDS if include is None or kind in include or kind.value in include]
    _relocate(flat, kinds, _to_host(pin_memory, non_blocking), back=False)
    flat.moved = sorted({*flat.moved, *(kind.value for kind in kinds)})


def reload(flat: FlatOptimizer, non_blocking: bool) -> None:
    """See ``DeepSpeedEngine.reload_states``."""
    device = flat.buckets[0].device if flat.buckets else torch.device("cpu")
    kinds = [OffloadStateTypeEnum(name) for name in flat.moved]
    _relocate(flat, kinds, lambda t: t.to(device, non_blocking=non_blocking), back=True)
    flat.moved = []


def _to_host(pin: bool, non_blocking: bool) -> Mover:
    def move(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.device.type == "cpu":
            return tensor
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=pin and tensor.device.type == "cuda")
        return host.copy_(tensor, non_blocking=non_blocking)

    return move


def _relocate(flat: FlatOptimizer, kinds: list[OffloadStateTypeEnum], move: Mover, *, back: bool) -> None:
    before_change()
    steps: dict[OffloadStateTypeEnum, Callable[[FlatOptimizer, Bucket, Mover], None]] = {
        OffloadStateTypeEnum.optim_states: _move_states,
        OffloadStateTypeEnum.hp_params: _move_masters,
        OffloadStateTypeEnum.lp_params: _move_weights,
        OffloadStateTypeEnum.lp_grads: _allocate_shard if back else _free_shard,
        OffloadStateTypeEnum.contiguous_grad_buffer: _keep if back else _free_buffer,
    }
    if OffloadStateTypeEnum.lp_params in kinds:
        flat.release_weights()
    for bucket in flat.buckets:
        for kind in kinds:
            steps[kind](flat, bucket, move)
    if OffloadStateTypeEnum.contiguous_grad_buffer in kinds:
        flat.reducer.free_buffers()
    if OffloadStateTypeEnum.lp_params in kinds and back:
        flat.restore_weights()


def _move_states(flat: FlatOptimizer, bucket: Bucket, move: Mover) -> None:
    for value in _states_of(flat, bucket):
        if not (flat.stage and flat.states.is_offloaded(bucket)):
            value.data = move(value)


def _move_masters(flat: FlatOptimizer, bucket: Bucket, move: Mover) -> None:
    # Offloaded ones are where they belong; those that are the weights go with these.
    if bucket.full_precision or (flat.stage and flat.states.is_offloaded(bucket)):
        return
    bucket.master = move(bucket.master)
    _point_masters(flat, bucket)


def _point_masters(flat: FlatOptimizer, bucket: Bucket) -> None:
    """The tensors that the optimizer knows are views of the master again."""
    if flat.stage == 0:
        for slot, master in zip(bucket.slots, flat.master_of(bucket), strict=True):
            if master is not slot.param:
                master.data = slot.view(bucket.master)
    else:
        for tile in flat.states.tiles(bucket):
            if tile.param is not bucket.master:
                tile.param.data = bucket.master[tile.begin : tile.end]


def _move_weights(flat: FlatOptimizer, bucket: Bucket, move: Mover) -> None:
    if _is_away(bucket):
        return
    moved = move(bucket.weights)
    if moved is bucket.weights:
        return
    bucket.weights = moved
    for position, slot in enumerate(bucket.slots):
        handle = handle_of(slot.param)
        if isinstance(bucket, ShardBucket) and handle is not None:
            handle.adopt(bucket.piece(moved, position))
        else:
            slot.param.data = slot.view(moved)
    if bucket.full_precision:
        master = moved if flat.stage in (0, 3) else bucket.slice_of(moved)
        # The tensor that the optimizer knows stays the same object.
        bucket.master.data = master
        _point_masters(flat, bucket)


def _free_shard(flat: FlatOptimizer, bucket: Bucket, move: Mover) -> None:
    # Between two windows it has no value that is needed.
    bucket.grad_shard = torch.empty(0, dtype=bucket.accum_dtype)


def _allocate_shard(flat: FlatOptimizer, bucket: Bucket, move: Mover) -> None:
    bucket.grad_shard = empty_flat(bucket.shard_numel, bucket.accum_dtype, bucket.device)


def _free_buffer(flat: FlatOptimizer, bucket: Bucket, move: Mover) -> None:
    if bucket.grad_full is None:
        return
    if bucket.grad_shard._base is not None:  # stage 0 reduces into the buffer
        bucket.grad_shard = torch.empty(0, dtype=bucket.accum_dtype)
        _allocate_shard(flat, bucket, move)
    for slot in bucket.slots:
        slot.param.grad = None
    bucket.grad_full = None


def _keep(flat: FlatOptimizer, bucket: Bucket, move: Mover) -> None:
    """The next backward makes its own."""
