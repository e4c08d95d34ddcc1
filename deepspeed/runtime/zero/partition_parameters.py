"""Partitioned construction and manual coordination of parameters (ZeRO-3).

Source: chapters 5.1.2 and 5.1.3 of the API documentation. What a partitioned parameter shows of itself:

| attribute | meaning |
| --- | --- |
| ``ds_id``, ``ds_shape``, ``ds_numel`` | identity, true shape, elements |
| ``ds_status`` | :class:`ZeroParamStatus` |
| ``ds_tensor`` | this rank's shard: 1-D, ceil(numel / ranks) elements, the last rank's padded |
| ``ds_persist`` | whether it stays whole between uses |
| ``all_gather()``, ``partition()`` | make it whole, and release it; collective |
| ``partition_numel()``, ``padding_size()`` | elements of a shard, and of the padding |
"""

from __future__ import annotations

import contextlib
import copy
import types
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import TracebackType
from typing import Any

import torch

from deepspeed import comm as dist
from deepspeed._core.params.construct import (
    CONSTRUCTORS,
    ORIGINALS,
    construction,
    plain_constructors,
    set_constructors,
)
from deepspeed._core.params.handle import (
    ParamHandle,
    ZeroParamStatus,
    fetch,
    handle_of,
    handles_of,
    shard_numel_of,
)
from deepspeed._core.params.hooks import coordinator_of
from deepspeed._core.params.transport import ParamTransport
from deepspeed.accelerator import get_accelerator
from deepspeed.errors import ConfigError, MissingFeatureError
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.runtime.zero.module_state import watch_state
from deepspeed.runtime.zero.topology import param_transport
from deepspeed.utils.tensor_fragment import weights_written

__all__ = [
    "GatheredParameters",
    "Init",
    "MiCS_Init",
    "ZeroParamStatus",
    "get_accelerator",
    "is_zero_param",
    "param_transport",
    "partition_parameter",
    "register_external_parameter",
    "unpartition",
    "unregister_external_parameter",
    "zero_wrapper_for_fp_tensor_constructor",
]

# Transformers compares with this to treat torch.arange on its own.
_orig_torch_arange = ORIGINALS["arange"]


def is_zero_param(parameter: Any) -> bool:
    """Whether the parameter is partitioned."""
    return handle_of(parameter) is not None


# -- one parameter -----------------------------------------------------------------------------------------------------


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
    if hasattr(param, "placements"):
        raise ValueError(f"parameter {name} is a DTensor, which is sharded already: give plain tensors to ZeRO-3")
    target = dtype if dtype is not None and param.is_floating_point() else param.dtype
    where = device if device is not None else param.device
    numel = shard_numel_of(param.numel(), transport.world_size)
    shard = torch.empty(numel, dtype=target, device=where)
    empty = param.is_meta
    if empty:
        shard.fill_(float("nan") if target.is_floating_point else 0)
    else:
        flat = param.detach().reshape(-1)
        source = flat.to(device=where, dtype=target) if transport.rank == 0 else None
        transport.scatter(source, shard)
        transport.replicate(shard)
    handle = ParamHandle(param, shard, transport, name=name)
    handle.born_empty = empty
    _give_methods(param)
    return handle


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
        setattr(param, function.__name__, types.MethodType(function, param))
    vars(param)["__deepcopy__"] = types.MethodType(_deepcopy, param)


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


def all_gather_coalesced(self: torch.nn.Parameter, params: Iterable[Any], safe_mode: bool = False) -> Any:
    """Makes all of ``params`` whole in one operation; ``wait()`` on the result finishes it. Collective."""
    handles = handles_of(params)
    fetch(handles)
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
        "ds_tensor.shape": tuple(handle.shard.shape),
    }


def _deepcopy(self: torch.nn.Parameter, memo: dict[int, Any]) -> torch.nn.Parameter:
    """An ordinary, whole parameter. Collective while the original is released."""
    if id(self) in memo:
        return memo[id(self)]  # type: ignore[no-any-return]
    with GatheredParameters([self]):
        made = torch.nn.Parameter(self.data.clone(), self.requires_grad)
    for key, value in vars(self).items():
        if not key.startswith(("ds_", "_ds_")) and not isinstance(value, types.MethodType):
            setattr(made, key, copy.deepcopy(value, memo))
    memo[id(self)] = made
    return made


def unpartition(params: Iterable[Any]) -> int:
    """Makes partitioned parameters ordinary, whole ones again; returns how many. Collective."""
    handles = handles_of(params)
    for handle in handles:
        fetch([handle])
        handle.finish()
        handle.dissolve()
    return len(handles)


# -- gathering by hand -------------------------------------------------------------------------------------------------


class GatheredParameters:
    """Inside, partitioned parameters are whole; afterwards they are released again. Collective, entering and leaving.

    Args:
        params: a parameter, or any iterable of parameters, tensors and None; what is not partitioned is left alone.
        modifier_rank: whose changes to keep: that rank's values go to all shards, and to the fp32 master weights where
            they differ. None: nothing may change; in-place operations raise when the context ends (writes through
            ``.data`` are not seen, and lost).
        fwd_module: a module that uses the parameters in its forward: they are registered as its external parameters.
        enabled: False makes the context do nothing.

    Raises:
        RuntimeError: on leaving, if a parameter was modified without ``modifier_rank``; it names the parameter.
    """

    def __init__(
        self,
        params: torch.Tensor | Iterable[torch.Tensor | None] | None,
        modifier_rank: int | None = None,
        fwd_module: torch.nn.Module | None = None,
        enabled: bool = True,
    ) -> None:
        self.enabled = enabled
        given = [params] if isinstance(params, torch.Tensor) or params is None else list(params)
        self.params = [p for p in given if p is not None]
        self.src_rank = modifier_rank
        self.fwd_module = fwd_module
        self._handles: list[ParamHandle] = []
        self._versions: list[int] = []
        self._kept: list[bool] = []

    def __enter__(self) -> None:
        if not self.enabled:
            return
        self._handles = handles_of(self.params)
        if self.fwd_module is not None:
            for handle in self._handles:
                register_external_parameter(self.fwd_module, handle.param)
        self._kept = [handle.available or handle.in_flight for handle in self._handles]
        with plain_constructors():
            fetch(self._handles, exact=True)
            for handle, kept in zip(self._handles, self._kept, strict=True):
                handle.holds[self] = 1
                handle.finish()
                handle.refine()
                if self.src_rank is None and not kept:
                    handle.detach_copy()
        self._versions = [handle.param._version for handle in self._handles]

    by_hand = True
    """As a reason to hold a parameter: users have it in their hands."""

    def __str__(self) -> str:
        return "GatheredParameters"

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self.enabled:
            return
        edited = [h for h, v in zip(self._handles, self._versions, strict=True) if h.param._version != v]
        try:
            if self.src_rank is not None and error is None:
                with plain_constructors(), torch.no_grad():
                    self._share()
        finally:
            for handle, kept in zip(self._handles, self._kept, strict=True):
                handle.holds.pop(self, None)
                if not kept and not handle.holds and not handle.persistent:
                    handle.release(by_hand=True)
            self._handles = []
        if self.src_rank is None and edited and error is None:
            raise RuntimeError(
                f"{', '.join(h.label for h in edited[:5])} {'was' if len(edited) == 1 else 'were'} modified inside "
                "GatheredParameters without modifier_rank, and the change is lost: pass modifier_rank=0 to keep rank 0's "
                "values"
            )

    def _share(self) -> None:
        """The modifier's values become everyone's."""
        for handle, kept in zip(self._handles, self._kept, strict=True):
            transport, root = handle.transport, int(self.src_rank or 0)
            # With MiCS the modifier is one rank of one of several blocks that hold the same.
            block_rank, block = root % transport.world_size, root // transport.world_size
            data = handle.param.data
            if data.numel() != handle.numel:
                handle.write_back()  # raises, and says what is wrong
            stays = kept or handle.persistent or len(handle.holds) > 1
            if transport.world_size == 1 and transport.replicas is None:
                handle.write_back()
            elif stays:
                whole = data.detach().contiguous()
                group = transport.group if transport.replicas is None else None
                source = transport.global_rank(root) if transport.replicas is None else root
                dist.broadcast(whole, src=source, group=group)
                if whole.data_ptr() != data.data_ptr():
                    data.copy_(whole)
                handle.write_back()
            else:
                flat = data.detach().reshape(-1) if transport.rank == block_rank else None
                shard = handle.shard
                transport.scatter(flat, shard, root=block_rank)
                transport.replicate(shard, block)
                handle.store(shard)
            weights_written(handle.param)


# -- external parameters -----------------------------------------------------------------------------------------------


def register_external_parameter(module: torch.nn.Module, parameter: torch.nn.Parameter) -> None:
    """Makes ``parameter`` whole during the forward and backward of ``module``, which does not own it.

    Raises:
        RuntimeError: ``parameter`` is not a ``torch.nn.Parameter``.
    """
    if not isinstance(parameter, torch.nn.Parameter):
        raise RuntimeError("Parameter is not a torch.nn.Parameter")
    externals = module.__dict__.setdefault("_external_params", {})
    key = getattr(parameter, "ds_id", id(parameter))
    if externals.get(key) is parameter:
        return
    externals[key] = parameter
    coordinator = coordinator_of(module)
    if coordinator is not None:
        coordinator.externals_changed(module)


def unregister_external_parameter(module: torch.nn.Module, parameter: torch.nn.Parameter) -> None:
    """Undoes :func:`register_external_parameter`.

    Raises:
        RuntimeError: the parameter is not registered with the module.
    """
    externals = module.__dict__.get("_external_params", {})
    found = [key for key, value in externals.items() if value is parameter]
    if not found:
        raise RuntimeError("the parameter is not registered with this module")
    for key in found:
        del externals[key]
    coordinator = coordinator_of(module)
    if coordinator is not None:
        coordinator.externals_changed(module)


# -- construction ------------------------------------------------------------------------------------------------------


def zero_wrapper_for_fp_tensor_constructor(
    fn: Callable[..., torch.Tensor], target_fp_dtype: torch.dtype, target_device: Any = None
) -> Callable[..., torch.Tensor]:
    """``fn`` with floating-point results in ``target_fp_dtype``, on ``target_device`` unless a device is given.

    Looked up in this module whenever :class:`Init` is entered, so that clients can replace it.
    """

    def make(*args: Any, **kwargs: Any) -> torch.Tensor:
        if kwargs.get("device") is None and target_device is not None:
            kwargs["device"] = target_device
        tensor = fn(*args, **kwargs)
        if tensor.is_floating_point() and tensor.dtype != target_fp_dtype:
            tensor.data = tensor.data.to(target_fp_dtype)
        return tensor

    return make


class Init:
    """Constructs models partitioned: each module's parameters are cut into shards when its ``__init__`` returns.

    ``with deepspeed.zero.Init(): model = Model()``, or ``Init(module=model)`` for a model that is there already.
    Collective: all ranks construct the same modules in the same order; rank 0's initial values count.

    Args:
        module: partitioned at once; the context then does nothing more.
        data_parallel_group: the ranks that share the shards; default all, or the mpu's data-parallel group.
        mem_efficient_linear: accepted; autograd never saves a second copy of a weight here.
        remote_device: where the shards live; ``None`` or ``"cpu"`` (on a CPU), else refused.
        pin_memory: for ``remote_device="cpu"``.
        config_dict_or_path: the DeepSpeed config; gives the dtype and the keys of ``zero_optimization``. ``"auto"``
            means the default.
        config: old name of ``config_dict_or_path``.
        enabled: False makes the context do nothing.
        dtype: of floating-point parameters and new tensors; default the config's, else torch's default dtype.
        mpu: gives ``get_data_parallel_group()``.
        zero_param_parallel_group: the smaller group of hpZ (ZeRO++).
        zero_quantized_weights: gather int8 blocks (ZeRO++ qwZ).
        zero_quantized_nontrainable_weights: as ``zero_quantized_weights`` for frozen parameters.
        sequence_data_parallel_group: used like ``data_parallel_group``.
        param_swapper: refused; shards on NVMe are not available yet.
    """

    def __init__(
        self,
        module: torch.nn.Module | None = None,
        data_parallel_group: Any = None,
        mem_efficient_linear: bool = True,
        remote_device: str | None = None,
        pin_memory: bool = False,
        config_dict_or_path: Any = None,
        config: Any = None,
        enabled: bool = True,
        dtype: torch.dtype | None = None,
        mpu: Any = None,
        zero_param_parallel_group: Any = None,
        zero_quantized_weights: bool = False,
        zero_quantized_nontrainable_weights: bool = False,
        sequence_data_parallel_group: Any = None,
        param_swapper: Any = None,
    ) -> None:
        self.enabled = enabled
        self._contexts: list[contextlib.ExitStack] = []
        if not enabled:
            return
        if not dist.is_initialized():
            dist.init_distributed(verbose=False)
        parsed = _parse(config_dict_or_path if config_dict_or_path is not None else config)
        _check_remote(remote_device, param_swapper)
        self.dtype = dtype or _config_dtype(parsed)
        self.override_module_apply = parsed is None or parsed.zero_config.override_module_apply
        self._group = self._choose_group(data_parallel_group, sequence_data_parallel_group, mpu)
        self.local_device = _device()
        zero = parsed.zero_config if parsed is not None else DeepSpeedZeroConfig()
        flags = {
            "zero_quantized_weights": zero_quantized_weights,
            "zero_quantized_nontrainable_weights": zero_quantized_nontrainable_weights,
        }
        self.transport = self._make_transport(zero.model_copy(update={k: v for k, v in flags.items() if v}))
        if module is not None:
            self._partition(module, top=True)

    def _make_transport(self, zero: DeepSpeedZeroConfig) -> ParamTransport:
        return param_transport(self._group, self.local_device, zero)

    @staticmethod
    def _choose_group(data_parallel_group: Any, sequence_group: Any, mpu: Any) -> Any:
        if data_parallel_group is not None:
            return data_parallel_group
        if sequence_group is not None:
            return sequence_group
        return mpu.get_data_parallel_group() if mpu is not None else None

    def get_dp_process_group(self) -> Any:
        """Return the communication group with all data-parallel ranks"""
        return self._group

    def get_partition_rank(self) -> int:
        """This rank's place among those that share the shards."""
        return self.transport.rank

    def __enter__(self) -> Init:
        stack = contextlib.ExitStack()
        if self.enabled:
            try:
                stack.enter_context(self._constructors())
                stack.enter_context(construction(self._partition))
                if self.override_module_apply:
                    stack.enter_context(_gathering_apply())
            except BaseException:
                stack.close()
                raise
        self._contexts.append(stack)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._contexts.pop().__exit__(kind, error, trace)

    @contextlib.contextmanager
    def _constructors(self) -> Iterator[None]:
        wrap, device = zero_wrapper_for_fp_tensor_constructor, self.local_device
        wrapped = {n: wrap(ORIGINALS[n], target_fp_dtype=self.dtype, target_device=device) for n in CONSTRUCTORS}
        before = set_constructors(wrapped)
        try:
            yield
        finally:
            set_constructors(before)

    def _partition(self, module: torch.nn.Module, top: bool = False) -> None:
        """Cuts everything in the module that is still whole."""
        if not top and not any(handle_of(p) is None for p in module.parameters()):
            return
        with plain_constructors():
            for name, param in module.named_parameters():
                if handle_of(param) is None:
                    path = f"{type(module).__name__}.{name}"
                    partition_parameter(param, self.transport, dtype=self.dtype, device=self.local_device, name=path)
        watch_state(module)


class MiCS_Init(Init):
    """As :class:`Init`, for a config whose ``zero_optimization.mics_shard_size`` cuts models over blocks of ranks."""

    def _make_transport(self, zero: DeepSpeedZeroConfig) -> ParamTransport:
        if zero.mics_shard_size <= 0:
            raise ConfigError(
                "zero.MiCS_Init needs config_dict_or_path with zero_optimization.mics_shard_size, the number of ranks that "
                "hold one model; without it use zero.Init"
            )
        return super()._make_transport(zero)


def _parse(config: Any) -> DeepSpeedConfig | None:
    if config is None:
        return None
    parsed = DeepSpeedConfig(config)
    stage = parsed.zero_optimization_stage
    if stage != 3:
        raise ConfigError(
            f"zero.Init partitions parameters, which is ZeRO stage 3, but the config's zero_optimization.stage is "
            f"{int(stage)}: set it to 3, or construct the model without zero.Init (or with enabled=False)"
        )
    return parsed


def _check_remote(remote_device: str | None, param_swapper: Any) -> None:
    if param_swapper is not None or remote_device == "nvme":
        raise MissingFeatureError("zero.Init: shards on NVMe are not available yet; leave remote_device out")
    if remote_device not in (None, "none", "cpu", get_accelerator().device_name()):
        raise ConfigError(f"zero.Init: remote_device is None, 'cpu' or 'nvme', not {remote_device!r}")
    if remote_device == "cpu" and get_accelerator().device_name() != "cpu":
        raise MissingFeatureError("zero.Init: shards on the host are not available yet; leave remote_device out")


def _config_dtype(parsed: DeepSpeedConfig | None) -> torch.dtype:
    if parsed is None:
        return torch.get_default_dtype()
    if parsed.fp16.enabled:
        return torch.float16
    return torch.bfloat16 if parsed.bf16.enabled else torch.float32


def _device() -> torch.device:
    accelerator = get_accelerator()
    if accelerator.device_name() == "cpu":
        return torch.device("cpu")
    return torch.device(accelerator.device_name(dist.get_local_rank()))


@contextlib.contextmanager
def _gathering_apply() -> Iterator[None]:
    """``Module.apply`` that makes each module's own parameters whole around the call and keeps rank 0's changes."""
    original = torch.nn.Module.apply

    def apply(self: torch.nn.Module, fn: Callable[[torch.nn.Module], None]) -> torch.nn.Module:
        for child in self.children():
            child.apply(fn)
        with GatheredParameters(self.parameters(recurse=False), modifier_rank=0):
            fn(self)
        return self

    torch.nn.Module.apply = apply  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        torch.nn.Module.apply = original  # type: ignore[method-assign]
