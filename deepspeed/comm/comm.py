"""torch.distributed's functions under ``deepspeed.comm``, each announced to the hook of :mod:`deepspeed.comm.hooks`.

Parameters, their order, their errors and their results are torch's; ``group=None`` is the world. Every function with a
``group`` is collective over it (send and receive: over the pair). With ``async_op`` a ``Work`` comes back, and buffers
must stay untouched until its ``wait()``.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from .._core.compat import all_gather_flat, reduce_scatter_flat
from ..accelerator import get_accelerator
from . import doctor
from .hooks import observed

ReduceOp = dist.ReduceOp
Tensor = torch.Tensor


class Works:
    """Several asynchronous operations as one: ``wait()`` waits for all."""

    def __init__(self, works: Sequence[Any]) -> None:
        self._works = [work for work in works if work is not None]

    def wait(self) -> bool:
        with doctor.waiting("wait"):
            for work in self._works:
                work.wait()
        return True

    def is_completed(self) -> bool:
        return all(work.is_completed() for work in self._works)


# -- state -------------------------------------------------------------------------------------------------------------
def is_available() -> bool:
    """Whether this torch was built with torch.distributed."""
    return dist.is_available()


def is_initialized() -> bool:
    """Whether the default group exists; made by us or by anyone."""
    return dist.is_available() and dist.is_initialized()


def get_rank(group: Any = None) -> int:
    """This process's rank in the group; -1 if it is not a member."""
    return dist.get_rank(group)


def get_world_size(group: Any = None) -> int:
    """Number of ranks in the group; -1 if this process is not a member."""
    return dist.get_world_size(group)


def get_local_rank() -> int:
    """Rank among the processes of this host: ``LOCAL_RANK`` as launchers set it; 0 where there is one process only.

    Raises:
        ValueError: ``LOCAL_RANK`` is not set and the world is larger than 1, so that it cannot be known.
    """
    text = os.environ.get("LOCAL_RANK")
    if text is not None:
        return int(text)
    if is_initialized() and dist.get_world_size() > 1:
        raise ValueError("LOCAL_RANK is not set: start the ranks with a launcher (deepspeed, torchrun), or set it")
    return 0


def get_backend(group: Any = None) -> str:
    """Name of the group's backend, e.g. ``"gloo"``."""
    return dist.get_backend(group)


def get_world_group() -> Any:
    """The group of all ranks."""
    return dist.group.WORLD


def get_global_rank(group: Any, group_rank: int) -> int:
    """World rank of the group's member ``group_rank``."""
    return group_rank if group is None else dist.get_global_rank(group, group_rank)


def get_group_rank(group: Any, global_rank: int) -> int:
    """Rank in the group of world rank ``global_rank``."""
    return global_rank if group is None else dist.get_group_rank(group, global_rank)


def get_all_ranks_from_group(group: Any = None) -> list[int]:
    """World ranks of the group's members, in group order."""
    return list(dist.get_process_group_ranks(dist.group.WORLD if group is None else group))


def new_group(ranks: Sequence[int] | None = None, *args: Any, **kwargs: Any) -> Any:
    """Makes a group of these world ranks (default: all). Collective over the *world*: every rank calls it alike."""
    return dist.new_group(None if ranks is None else list(ranks), *args, **kwargs)


def destroy_process_group(group: Any = None) -> None:
    """Ends the group; without one, all groups."""
    if group is None or group is dist.group.WORLD:
        doctor.stop(everyone=True)
    dist.destroy_process_group(group)


def initialize_mesh_device(mesh_shape: tuple[int, ...], mesh_dim_names: tuple[str, ...] | None = None) -> Any:
    """The ``DeviceMesh`` of that shape over the world on this accelerator's device type. Collective."""

    return dist.init_device_mesh(get_accelerator().device_name(), mesh_shape, mesh_dim_names=mesh_dim_names)


# -- reductions --------------------------------------------------------------------------------------------------------
@observed
def all_reduce(tensor: Tensor, op: Any = ReduceOp.SUM, group: Any = None, async_op: bool = False) -> Any:
    """Reduces ``tensor`` over the group, in place on every rank."""
    return dist.all_reduce(tensor, op, group, async_op)


@observed
def inference_all_reduce(tensor: Tensor, op: Any = ReduceOp.SUM, group: Any = None) -> Any:
    """:func:`all_reduce` that has ended when it returns; a name of its own so that logs tell inference traffic."""
    return dist.all_reduce(tensor, op, group)


@observed
def reduce(tensor: Tensor, dst: int, op: Any = ReduceOp.SUM, group: Any = None, async_op: bool = False) -> Any:
    """Reduces ``tensor`` to world rank ``dst``; elsewhere its content is undefined afterwards."""
    return dist.reduce(tensor, dst, op, group, async_op)


@observed
def reduce_scatter(
    output: Tensor, input_list: list[Tensor], op: Any = ReduceOp.SUM, group: Any = None, async_op: bool = False
) -> Any:
    """Reduces ``input_list[r]`` to rank r's ``output``."""
    return dist.reduce_scatter(output, input_list, op, group, async_op)


@observed
def reduce_scatter_tensor(
    output: Tensor, input: Tensor, op: Any = ReduceOp.SUM, group: Any = None, async_op: bool = False
) -> Any:
    """Reduces the r-th of the ``world`` equal pieces of ``input`` to rank r's ``output``."""
    return reduce_scatter_flat(output, input, op, group, async_op)


@observed
def all_reduce_coalesced(
    tensors: list[Tensor], op: Any = ReduceOp.SUM, group: Any = None, async_op: bool = False
) -> Works | None:
    """:func:`all_reduce` of each tensor, all in flight together."""
    return _together([dist.all_reduce(tensor, op, group, True) for tensor in tensors], async_op)


@observed
def reduce_scatter_coalesced(
    outputs: list[Tensor], inputs: list[Tensor], op: Any = ReduceOp.SUM, group: Any = None, async_op: bool = False
) -> Works | None:
    """:func:`reduce_scatter_tensor` of each pair, all in flight together."""
    pairs = zip(outputs, inputs, strict=True)
    return _together([reduce_scatter_flat(output, input, op, group, True) for output, input in pairs], async_op)


# -- gathers -----------------------------------------------------------------------------------------------------------
@observed
def all_gather(tensor_list: list[Tensor], tensor: Tensor, group: Any = None, async_op: bool = False) -> Any:
    """``tensor_list[r]`` becomes rank r's ``tensor``."""
    return dist.all_gather(tensor_list, tensor, group, async_op)


@observed
def all_gather_into_tensor(
    output_tensor: Tensor, input_tensor: Tensor, group: Any = None, async_op: bool = False
) -> Any:
    """The r-th of the ``world`` equal pieces of ``output_tensor`` becomes rank r's ``input_tensor``."""
    return all_gather_flat(output_tensor, input_tensor, group, async_op)


@observed
def all_gather_coalesced(
    output_tensors: list[Tensor], input_tensors: list[Tensor], group: Any = None, async_op: bool = False
) -> Works | None:
    """:func:`all_gather_into_tensor` of each pair, all in flight together."""
    pairs = zip(output_tensors, input_tensors, strict=True)
    return _together([all_gather_flat(output, input, group, True) for output, input in pairs], async_op)


@observed
def gather(
    tensor: Tensor,
    gather_list: list[Tensor] | None = None,
    dst: int | None = None,
    group: Any = None,
    async_op: bool = False,
) -> Any:
    """``gather_list[r]`` on world rank ``dst`` (default 0) becomes rank r's ``tensor``."""
    return dist.gather(tensor, gather_list, dst=dst, group=group, async_op=async_op)


@observed
def scatter(
    tensor: Tensor,
    scatter_list: list[Tensor] | None = None,
    src: int | None = None,
    group: Any = None,
    async_op: bool = False,
) -> Any:
    """Rank r's ``tensor`` becomes ``scatter_list[r]`` of world rank ``src`` (default 0)."""
    return dist.scatter(tensor, scatter_list, src=src, group=group, async_op=async_op)


@observed
def broadcast(tensor: Tensor, src: int, group: Any = None, async_op: bool = False) -> Any:
    """``tensor`` becomes that of world rank ``src``."""
    return dist.broadcast(tensor, src, group, async_op)


@observed
def all_to_all_single(
    output: Tensor,
    input: Tensor,
    output_split_sizes: list[int] | None = None,
    input_split_sizes: list[int] | None = None,
    group: Any = None,
    async_op: bool = False,
) -> Any:
    """Piece r of ``input`` goes to rank r, whose pieces of ``output`` come from ranks 0, 1, ...; split along dim 0."""
    return dist.all_to_all_single(output, input, output_split_sizes, input_split_sizes, group, async_op)


@observed
def all_to_all(
    output_tensor_list: list[Tensor], input_tensor_list: list[Tensor], group: Any = None, async_op: bool = False
) -> Any:
    """``input_tensor_list[r]`` goes to rank r."""
    return dist.all_to_all(output_tensor_list, input_tensor_list, group, async_op)


# -- pairs -------------------------------------------------------------------------------------------------------------
@observed
def send(tensor: Tensor, dst: int, group: Any = None, tag: int = 0) -> None:
    """Sends to world rank ``dst``; returns when the buffer may be used again."""
    dist.send(tensor, dst, group, tag)


@observed
def recv(tensor: Tensor, src: int | None = None, group: Any = None, tag: int = 0) -> int:
    """Receives from world rank ``src`` (default: any); returns the sender's rank."""
    return dist.recv(tensor, src, group, tag)


@observed
def isend(tensor: Tensor, dst: int, group: Any = None, tag: int = 0) -> Any:
    """:func:`send` that returns a ``Work`` at once."""
    return dist.isend(tensor, dst, group, tag)


@observed
def irecv(tensor: Tensor, src: int | None = None, group: Any = None, tag: int = 0) -> Any:
    """:func:`recv` that returns a ``Work`` at once."""
    return dist.irecv(tensor, src, group, tag)


@observed
def batch_isend_irecv(p2p_op_list: list[Any]) -> list[Any]:
    """Starts several ``P2POp`` together; one ``Work`` each."""
    return dist.batch_isend_irecv(p2p_op_list)


# -- objects and barriers ----------------------------------------------------------------------------------------------
@observed
def broadcast_object_list(object_list: list[Any], src: int = 0, group: Any = None, device: Any = None) -> None:
    """The picklable objects in the list become those of world rank ``src``."""
    dist.broadcast_object_list(object_list, src, group, device)


@observed
def all_gather_object(object_list: list[Any], obj: Any, group: Any = None) -> None:
    """``object_list[r]`` becomes rank r's picklable ``obj``."""
    dist.all_gather_object(object_list, obj, group)


@observed
def gather_object(
    obj: Any, object_gather_list: list[Any] | None = None, dst: int | None = None, group: Any = None
) -> None:
    """``object_gather_list[r]`` on world rank ``dst`` (default 0) becomes rank r's picklable ``obj``."""
    dist.gather_object(obj, object_gather_list, dst=dst, group=group)


@observed
def barrier(group: Any = None, async_op: bool = False, device_ids: list[int] | None = None) -> Any:
    """Returns when every rank of the group has called it."""
    if device_ids is None and dist.get_backend(group) == "nccl":
        # NCCL has no barrier: torch all-reduces on a device that it guesses from the rank unless it is told which.
        device_ids = [torch.cuda.current_device()]
    return dist.barrier(group, async_op, device_ids)


@observed
def monitored_barrier(group: Any = None, timeout: timedelta | None = None, wait_all_ranks: bool = False) -> None:
    """:func:`barrier` whose error names the ranks that did not come within ``timeout``. gloo only."""
    dist.monitored_barrier(group, timeout, wait_all_ranks)


def _together(works: list[Any], async_op: bool) -> Works | None:
    together = Works(works)
    if async_op:
        return together
    together.wait()
    return None
