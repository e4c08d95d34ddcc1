"""Partitioning one parameter, and what a partitioned parameter can do by itself: gather, release, copy, pickle.

Public through :mod:`deepspeed.runtime.zero.partition_parameters`.
"""

from __future__ import annotations

import copy
import functools
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from deepspeed._core.params.construct import building, unwatched
from deepspeed._core.params.handle import ParamHandle, fetch, handle_of, handles_of, shard_numel_of
from deepspeed._core.params.transport import ParamTransport
from deepspeed.runtime.zero import shard_homes
from deepspeed.runtime.zero.gathered import GatheredParameters, gather_exactly
from deepspeed.utils.tensor_fragment import weights_written

__all__ = ["partition_parameter", "unpartition"]


def partition_parameter(
    param: torch.nn.Parameter,
    transport: ParamTransport,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
    name: str = "",
) -> ParamHandle:
    """Cuts a whole parameter into shards with rank 0's values; it is released afterwards. Collective.

    A parameter on the meta device has no values: its shards are NaN until someone writes them.
    """
    known = handle_of(param)
    if known is not None:
        return known
    if torch.nn.parameter.is_lazy(param):
        raise ValueError(
            f"parameter {name} is lazy and has no shape yet: run the module once before it is partitioned, or give it its "
            "sizes"
        )
    if hasattr(param, "placements"):
        raise ValueError(f"parameter {name} is a DTensor, which is sharded already: give plain tensors to ZeRO-3")
    target = dtype if dtype is not None and param.is_floating_point() else param.dtype
    where = device if device is not None else param.device
    numel = shard_numel_of(param.numel(), transport.world_size)
    shard = torch.empty(numel, dtype=target, device=where)
    empty = param.is_meta
    if empty:
        shard.fill_(float("nan") if target.is_floating_point else 0)
        _leave_meta(param, shard)
    else:
        flat = param.detach().reshape(-1)
        source = flat.to(device=where, dtype=target) if transport.rank == 0 else None
        transport.scatter(source, shard)
        transport.replicate(shard)
    handle = ParamHandle(param, shard, transport, name=name)
    handle.born_empty = empty
    _give_methods(param)
    return handle


def _leave_meta(param: torch.nn.Parameter, like: torch.Tensor) -> None:
    """Puts a parameter that was made on the meta device, where no data can be set, on the device of ``like``."""
    twin = _like(param, like.new_empty(()).expand(param.shape))
    vars(twin).update(vars(param))
    torch.utils.swap_tensors(param, twin)


class _Method:
    """A function bound to a parameter that it does not keep alive: a cycle would leave memory to the collector."""

    def __init__(self, function: Callable[..., Any], param: torch.nn.Parameter) -> None:
        self._function, self._param = function, weakref.ref(param)
        functools.update_wrapper(self, function)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._function(self._param(), *args, **kwargs)


def _give_methods(param: torch.nn.Parameter) -> None:
    for function in (
        all_gather,
        all_gather_coalesced,
        partition,
        partition_numel,
        padding_size,
        aligned_size,
        item,
        ds_summary,
    ):
        setattr(param, function.__name__, _Method(function, param))
    vars(param)["__deepcopy__"] = _Method(_deepcopy, param)
    vars(param)["__reduce_ex__"] = _Method(_reduce, param)


def _handle(param: torch.Tensor) -> ParamHandle:
    handle = handle_of(param)
    if handle is None:
        raise AssertionError("a method of partitioned parameters was called on an ordinary one; please report this")
    return handle


def all_gather(
    self: torch.nn.Parameter, param_list: Sequence[Any] | None = None, async_op: bool = False, hierarchy: int = 0
) -> Any:
    """Makes the parameter (or all of ``param_list``) whole, until :func:`partition`. Collective.

    With ``async_op`` returns an object whose ``wait()`` finishes it.
    """
    return all_gather_coalesced(self, [self] if param_list is None else param_list, not async_op)


class _Gather:
    def __init__(self, handles: Sequence[ParamHandle]) -> None:
        self._handles = handles

    def wait(self) -> None:
        for handle in self._handles:
            handle.finish()
            handle.refine()


def all_gather_coalesced(self: torch.nn.Parameter, params: Iterable[Any], safe_mode: bool = False) -> Any:
    """Makes all of ``params`` whole in one operation; ``wait()`` on the result finishes it. Collective."""
    handles = handles_of(params)
    fetch(handles, exact=True)
    result = _Gather(handles)
    if safe_mode:
        result.wait()
    return result


def partition(
    self: torch.nn.Parameter,
    param_list: Sequence[Any] | None = None,
    hierarchy: int = 0,
    has_been_updated: bool = False,
) -> None:
    """Releases the parameter (or all of ``param_list``), with ``has_been_updated`` after taking this rank's part back.

    Persistent parameters stay whole. Not collective: every rank keeps its own part.
    """
    for handle in handles_of([self] if param_list is None else param_list):
        if has_been_updated and handle.available:
            handle.write_back()
            weights_written(handle.param)
        if not handle.holds and not handle.persistent:
            handle.release(by_hand=True)


def partition_numel(self: torch.nn.Parameter) -> int:
    """Elements of a shard."""
    return _handle(self).shard_numel


def aligned_size(self: torch.nn.Parameter) -> int:
    """Elements of all shards together."""
    handle = _handle(self)
    return handle.shard_numel * handle.transport.world_size


def padding_size(self: torch.nn.Parameter) -> int:
    """Elements that the shards have more than the parameter."""
    return aligned_size(self) - _handle(self).numel


def item(self: torch.nn.Parameter) -> Any:
    """The value of a one-element parameter. Collective while it is released."""
    with GatheredParameters([self]):
        return torch.Tensor.item(self)


def ds_summary(self: torch.nn.Parameter, use_debug_name: bool = False) -> dict[str, Any]:
    """What is known about the parameter, as plain values."""
    handle = _handle(self)
    return {
        "id": handle.name if use_debug_name else handle.id,
        "status": handle.status.name,
        "numel": handle.numel if handle.available else 0,
        "ds_numel": handle.numel,
        "shape": tuple(self.shape),
        "ds_shape": tuple(handle.shape),
        "requires_grad": self.requires_grad,
        "grad_shape": tuple(self.grad.shape) if self.grad is not None else None,
        "persist": handle.persistent,
        "active_sub_modules": sorted(str(hold) for hold in handle.holds),
        "ds_tensor.shape": (handle.shard_numel,),
    }


def _deepcopy(self: torch.nn.Parameter, memo: dict[int, Any]) -> torch.nn.Parameter:
    """An ordinary, whole parameter. Collective while the original is released.

    Inside ``zero.Init`` the copy of a released parameter is partitioned like it, so that copies of a layer (as
    ``torch.nn.TransformerEncoder`` makes them) never are whole.
    """
    if id(self) in memo:
        return memo[id(self)]  # type: ignore[no-any-return]
    handle = _handle(self)
    if building() and not handle.available:
        with unwatched():
            made = _like(self, torch.empty((), dtype=handle.dtype, device=handle.device).expand(handle.shape))
            twin = ParamHandle(made, handle.shard.clone(), handle.transport, name=handle.name)
            shard_homes.settle([twin], handle.rest or getattr(handle.kept, "store", None), ())
            twin.born_empty = handle.born_empty
            _give_methods(made)
    else:
        with GatheredParameters([self]):
            made = _like(self, self.data.clone())
    _copy_attributes(self, made, memo)
    memo[id(self)] = made
    return made


def _like(param: torch.nn.Parameter, data: torch.Tensor) -> torch.nn.Parameter:
    made: torch.nn.Parameter = torch.Tensor._make_subclass(type(param), data, param.requires_grad)
    return made


def _copy_attributes(param: torch.nn.Parameter, to: torch.nn.Parameter, memo: dict[int, Any]) -> None:
    for key, value in vars(param).items():
        if not key.startswith(("ds_", "_ds_")) and not isinstance(value, _Method):
            setattr(to, key, copy.deepcopy(value, memo))


def _reduce(self: torch.nn.Parameter, protocol: Any) -> Any:
    """Pickles the parameter as an ordinary one, if it is whole."""
    handle = _handle(self)
    if not handle.available:
        raise RuntimeError(
            f"parameter {handle.label} is partitioned, and pickling it now would lose its values. Save with "
            "engine.save_checkpoint() or engine.save_16bit_model(), or pickle inside "
            "`with deepspeed.zero.GatheredParameters(module.parameters()):`"
        )
    made = _like(self, self.data.clone())
    _copy_attributes(self, made, {})
    return made.__reduce_ex__(protocol)


def unpartition(params: Iterable[Any]) -> int:
    """Makes partitioned parameters ordinary, whole ones again; returns how many. Collective."""
    handles = handles_of(params)
    for handle in handles:
        gather_exactly([handle])
        handle.dissolve()
    return len(handles)
