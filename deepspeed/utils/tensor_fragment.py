"""Reading and writing the fp32 weights, gradients and optimizer states behind a model parameter.

Source: chapter 5.1.5-5.1.6 of the API documentation. The ``full`` forms are collective: every rank of the
data-parallel group calls them in the same order. The ``local`` forms touch this rank's part only, a 1-D tensor that is
empty where the rank owns nothing of the parameter.

When they are right: weights and optimizer states at any time (they change in ``step``); gradients after a backward at
the accumulation boundary and before ``step``.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from deepspeed import comm as dist
from deepspeed._core.ckpt.guard import before_change
from deepspeed._core.reduce.bucket import Bucket, Slot

if TYPE_CHECKING:
    from deepspeed.runtime.flat_optimizer import FlatOptimizer

__all__ = [
    "fragment_address",
    "safe_get_full_fp32_param",
    "safe_get_full_grad",
    "safe_get_full_optimizer_state",
    "safe_get_local_fp32_param",
    "safe_get_local_grad",
    "safe_get_local_optimizer_state",
    "safe_set_full_fp32_param",
    "safe_set_full_grad",
    "safe_set_full_optimizer_state",
    "safe_set_local_fp32_param",
    "safe_set_local_grad",
    "safe_set_local_optimizer_state",
]


@dataclass
class fragment_address:
    """``numel`` elements from element ``start`` of a flat buffer."""

    numel: int
    start: int


# Weak on both sides: a parameter does not keep its engine alive, nor the table a parameter.
_owners: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def register_owner(param: torch.nn.Parameter, owner: FlatOptimizer, slot: Slot) -> None:
    """Notes who updates the parameter; the latest engine wins, the earlier one stops reducing it."""
    known = _owners.get(param)
    previous = known[0]() if known is not None else None
    if previous is not None and previous is not owner:
        previous.destroy()
    _owners[param] = (weakref.ref(owner), weakref.ref(slot))


def unregister_owner(param: torch.nn.Parameter, owner: FlatOptimizer) -> None:
    """Forgets the parameter if it is still the owner's."""
    known = _owners.get(param)
    if known is not None and known[0]() in (owner, None):
        del _owners[param]


def weights_written(param: torch.nn.Parameter) -> None:
    """Tells the engine that trains the parameter, if any, that somebody changed this rank's shard of it."""
    known = _owners.get(param)
    owner, slot = (known[0](), known[1]()) if known is not None else (None, None)
    if owner is not None and slot is not None:
        owner.weight_written(slot)


def _find(param: torch.nn.Parameter) -> tuple[FlatOptimizer, Slot] | None:
    """Owner and place of a parameter; None for a frozen one, an error for a foreign one."""
    known = _owners.get(param)
    owner, slot = (known[0](), known[1]()) if known is not None else (None, None)
    if owner is not None and slot is not None:
        return owner, slot
    if isinstance(param, torch.Tensor) and not param.requires_grad:
        return None
    raise ValueError(
        f"this parameter of shape {tuple(param.shape)} is not trained by a live DeepSpeed engine: call "
        "deepspeed.initialize with it first, and pass the model's own parameter, not a copy"
    )


def _whole(owner: FlatOptimizer, slot: Slot, key: str | None) -> torch.Tensor:
    """Stage 0: the parameter's master or state."""
    master = owner.master_of(slot.bucket)[slot.bucket.position[id(slot)]]
    if key is None:
        return master.detach()
    state = owner.optimizer.state.get(master, {})
    _check_key(slot, key, [k for k, v in state.items() if isinstance(v, torch.Tensor) and v.shape == master.shape])
    found: torch.Tensor = state[key]
    return found


def _own(owner: FlatOptimizer, slot: Slot, key: str | None) -> torch.Tensor:
    """Stages 1 to 3: this rank's part, 1-D; a copy if it rests in a file."""
    states = owner.states
    if key is not None:
        _check_key(slot, key, states.names(slot.bucket))
    _, at, numel = slot.overlap(owner.transport.rank)
    return states.read(slot.bucket, key, at, at + numel)


def _check_key(slot: Slot, key: str, usable: Iterable[str]) -> None:
    if key not in usable:
        have = ", ".join(sorted(usable)) or "none yet: states are made by the first step"
        raise ValueError(f"optimizer state {key!r} of {slot.name} does not exist; there are: {have}")


def _pieces(owner: FlatOptimizer, slot: Slot) -> Iterator[tuple[int, int, int, int]]:
    """``(rank, start in the parameter, start in the rank's slice, numel)`` of every rank that owns a part."""
    for rank in range(owner.transport.world_size):
        begin, at, numel = slot.overlap(rank)
        if numel:
            yield rank, begin, at, numel


def _gather(owner: FlatOptimizer, slot: Slot, local: torch.Tensor) -> torch.Tensor:
    """The whole parameter-shaped fp32 tensor from every rank's own elements."""
    full = torch.empty(slot.numel, dtype=torch.float32, device=slot.bucket.device)
    for rank, begin, _, numel in _pieces(owner, slot):
        part = full[begin : begin + numel]
        if rank == owner.transport.rank:
            part.copy_(local)
        if owner.transport.world_size > 1:
            dist.broadcast(part, src=owner.transport.global_rank(rank), group=owner.transport.group)
    return full.view(slot.param.shape)


def _get_full(param: torch.nn.Parameter, key: str | None) -> torch.Tensor | None:
    found = _find(param)
    if found is None:
        return None
    owner, slot = found
    if owner.stage == 0:
        return _whole(owner, slot, key).detach().float().reshape(slot.param.shape).clone()
    local, failure = slot.param.new_empty(0), None
    try:
        local = _own(owner, slot, key)
    except OSError as error:
        failure = error
    owner.agree_on_files(failure)
    return _gather(owner, slot, local)


def _get_local(param: torch.nn.Parameter, key: str | None) -> torch.Tensor | None:
    found = _find(param)
    if found is None:
        return None
    owner, slot = found
    return _whole(owner, slot, key).reshape(-1) if owner.stage == 0 else _own(owner, slot, key)


def _set_full(param: torch.nn.Parameter, value: torch.Tensor, key: str | None) -> None:
    found = _find(param)
    if found is None:
        raise ValueError("this parameter is frozen: it has no optimizer state; write to the parameter itself")
    owner, slot = found
    if tuple(value.shape) != tuple(slot.param.shape):
        raise ValueError(f"{slot.name} has shape {tuple(slot.param.shape)}; the given value has {tuple(value.shape)}")
    begin, _, numel = (0, 0, slot.numel) if owner.stage == 0 else slot.overlap(owner.transport.rank)
    _put(owner, slot, key, value.reshape(-1)[begin : begin + numel])
    with torch.no_grad():
        if key is None:
            owner.store_weight(slot, 0, value.reshape(-1))


def _set_local(param: torch.nn.Parameter, value: torch.Tensor, key: str | None) -> None:
    found = _find(param)
    if found is None:
        raise ValueError("this parameter is frozen: it has no optimizer state; write to the parameter itself")
    owner, slot = found
    begin, _, numel = (0, 0, slot.numel) if owner.stage == 0 else slot.overlap(owner.transport.rank)
    if value.numel() != numel:
        raise ValueError(f"this rank owns {numel} elements of {slot.name}; the given value has {value.numel()}")
    _put(owner, slot, key, value.reshape(-1))
    with torch.no_grad():
        if key is None:
            owner.store_weight(slot, begin, value.reshape(-1))


def _put(owner: FlatOptimizer, slot: Slot, key: str | None, values: torch.Tensor) -> None:
    """Replaces this rank's own elements by ``values``, 1-D."""
    before_change()
    with torch.no_grad():
        if owner.stage == 0:
            _whole(owner, slot, key).view(-1).copy_(values)
            return
        if key is not None:
            _check_key(slot, key, owner.states.names(slot.bucket))
        _, at, _ = slot.overlap(owner.transport.rank)
        owner.states.write(slot.bucket, key, at, values.detach())


def _reduced_bucket(owner: FlatOptimizer, slot: Slot) -> Bucket:
    owner.reducer.end_backward()
    if not slot.bucket.reduced:
        raise RuntimeError(
            f"there is no reduced gradient of {slot.name} now: gradients can be read after a backward at the "
            "accumulation boundary and before step()"
        )
    return slot.bucket


def safe_get_full_fp32_param(param: torch.nn.Parameter) -> torch.Tensor | None:
    """The fp32 master weight, whole, as a copy; None for a frozen parameter. Collective."""
    return _get_full(param, None)


def safe_get_full_optimizer_state(param: torch.nn.Parameter, optim_state_key: str) -> torch.Tensor | None:
    """An fp32 optimizer state such as ``exp_avg``, whole, as a copy; None for a frozen parameter. Collective."""
    return _get_full(param, optim_state_key)


def safe_get_full_grad(param: torch.nn.Parameter) -> torch.Tensor | None:
    """The fp32 gradient, averaged over ranks and micro-batches, without loss scale; None if frozen. Collective."""
    found = _find(param)
    if found is None:
        return None
    owner, slot = found
    owner.settle_gradients()
    bucket = _reduced_bucket(owner, slot)
    _, at, numel = slot.overlap(owner.transport.rank)
    return _gather(owner, slot, bucket.grad_shard[at : at + numel]).div_(owner.loss_scale)


def safe_get_local_fp32_param(param: torch.nn.Parameter) -> torch.Tensor | None:
    """This rank's part of the fp32 master weight, 1-D; a view, or a copy if it rests in a file."""
    return _get_local(param, None)


def safe_get_local_optimizer_state(param: torch.nn.Parameter, optim_state_key: str) -> torch.Tensor | None:
    """This rank's part of an optimizer state, 1-D; a view, or a copy if it rests in a file."""
    return _get_local(param, optim_state_key)


def safe_get_local_grad(param: torch.nn.Parameter) -> torch.Tensor | None:
    """This rank's part of the reduced gradient (all of it in stage 0), 1-D fp32, without loss scale, a copy.

    Not collective after ``engine.backward``; it is after a plain ``loss.backward()``. Contributions of a parameter that
    two reentrant checkpoints use may be missing; :func:`safe_get_full_grad` has them.
    """
    found = _find(param)
    if found is None:
        return None
    owner, slot = found
    bucket = _reduced_bucket(owner, slot)
    if owner.stage == 0 and bucket.grad_full is not None:
        return slot.view(bucket.grad_full).reshape(-1).float() / owner.loss_scale
    _, at, numel = slot.overlap(owner.transport.rank)
    return bucket.grad_shard[at : at + numel].float() / owner.loss_scale


def safe_set_full_fp32_param(param: torch.nn.Parameter, value: torch.Tensor) -> None:
    """Writes the master weight and the model's weight. Every rank calls it with the same value."""
    _set_full(param, value, None)


def safe_set_full_optimizer_state(param: torch.nn.Parameter, value: torch.Tensor, optim_state_key: str) -> None:
    """Writes an optimizer state. Every rank calls it with the same value."""
    _set_full(param, value, optim_state_key)


def _set_grad(param: torch.nn.Parameter, value: torch.Tensor, *, full: bool) -> None:
    found = _find(param)
    if found is None:
        raise ValueError("this parameter is frozen: it has no gradient")
    owner, slot = found
    if full:
        owner.settle_gradients()
    bucket = _reduced_bucket(owner, slot)
    begin, at, numel = slot.overlap(owner.transport.rank)
    whole = full or owner.stage == 0
    if full and tuple(value.shape) != tuple(slot.param.shape):
        raise ValueError(f"{slot.name} has shape {tuple(slot.param.shape)}; the given value has {tuple(value.shape)}")
    if value.numel() != (slot.numel if whole else numel):
        expected = slot.numel if whole else numel
        raise ValueError(f"this rank owns {expected} elements of {slot.name}; the given value has {value.numel()}")
    scaled = value.detach().reshape(-1).to(torch.float32) * owner.loss_scale
    if owner.stage == 0 and bucket.grad_full is not None:
        # The step reads this copy; the shard below gives the norm.
        slot.view(bucket.grad_full).view(-1).copy_(scaled)
    bucket.grad_shard[at : at + numel].copy_(scaled[begin : begin + numel] if whole else scaled)


def safe_set_full_grad(param: torch.nn.Parameter, value: torch.Tensor) -> None:
    """Replaces the reduced gradient, given without loss scale. Every rank calls it with the same value. Collective."""
    _set_grad(param, value, full=True)


def safe_set_local_grad(param: torch.nn.Parameter, value: torch.Tensor) -> None:
    """Replaces this rank's part of the reduced gradient (all of it in stage 0; 1-D), given without loss scale."""
    _set_grad(param, value, full=False)


def safe_set_local_fp32_param(param: torch.nn.Parameter, value: torch.Tensor) -> None:
    """Writes this rank's part of the master weight (1-D) and of this rank's model weight.

    Other ranks' copies of the weight follow at the next step, or at once if they set the same part there.
    """
    _set_local(param, value, None)


def safe_set_local_optimizer_state(param: torch.nn.Parameter, value: torch.Tensor, optim_state_key: str) -> None:
    """Writes this rank's part of an optimizer state (1-D)."""
    _set_local(param, value, optim_state_key)
