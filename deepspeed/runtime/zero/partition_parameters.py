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
from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch

from deepspeed import comm as dist
from deepspeed._core.params import is_partitioned
from deepspeed._core.params.construct import CONSTRUCTORS, ORIGINALS, Builder, Loan, construction, unwatched
from deepspeed._core.params.handle import ParamHandle, PartitionedParamStatus, ZeroParamStatus, handle_of, handles_of
from deepspeed._core.params.store import ShardStore
from deepspeed._core.params.transport import ParamTransport
from deepspeed.accelerator import get_accelerator
from deepspeed.accelerator.placement import own_device_index
from deepspeed.comm.agreement import together
from deepspeed.errors import ConfigError
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.config_sections.aio import AioConfig
from deepspeed.runtime.zero import shard_homes
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.runtime.zero.gathered import (
    GatheredParameters,
    register_external_parameter,
    unregister_external_parameter,
)
from deepspeed.runtime.zero.module_state import watch_state
from deepspeed.runtime.zero.offload_config import DeepSpeedZeroOffloadParamConfig
from deepspeed.runtime.zero.param_methods import partition_parameter, unpartition
from deepspeed.runtime.zero.topology import param_transport
from deepspeed.utils.logging import warning_once

__all__ = [
    "GatheredParameters",
    "Init",
    "MiCS_Init",
    "PartitionedParamStatus",
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
    return is_partitioned(parameter)


# -- construction ------------------------------------------------------------------------------------------------------


def zero_wrapper_for_fp_tensor_constructor(
    fn: Callable[..., torch.Tensor], target_fp_dtype: torch.dtype | None, target_device: Any = None
) -> Callable[..., torch.Tensor]:
    """``fn`` with floating-point results in ``target_fp_dtype`` (None: as asked for), on ``target_device`` unless given.

    Looked up in this module whenever :class:`Init` is entered, so that clients can replace it.
    """

    def make(*args: Any, **kwargs: Any) -> torch.Tensor:
        if kwargs.get("device") is None and target_device is not None:
            kwargs["device"] = target_device
        tensor = fn(*args, **kwargs)
        if target_fp_dtype is not None and tensor.is_floating_point() and tensor.dtype != target_fp_dtype:
            tensor.data = tensor.data.to(target_fp_dtype)
        return tensor

    return make


class Init:
    """Constructs models partitioned: each module's parameters are cut into shards when its ``__init__`` returns.

    ``with deepspeed.zero.Init(): model = Model()``, or ``Init(module=model)`` for a model that is there already.
    Collective: all ranks construct the same modules in the same order; rank 0's initial values count. Contexts may be
    nested, the innermost one counts; each belongs to the thread that opened it.

    Where an ``__init__`` reads or initialises parameters that are partitioned already (those of child modules), they become
    whole by themselves until it returns, rank 0's values counting: one gather and one scatter each, on all ranks.
    Afterwards that takes :class:`GatheredParameters`.

    Args:
        module: partitioned at once, in place.
        data_parallel_group: the ranks that share the shards; default all, or the mpu's data-parallel group.
        mem_efficient_linear: accepted; autograd never saves a second copy of a weight here.
        remote_device: where the shards rest between uses: ``"cpu"``, ``"nvme"`` (needs ``offload_param.nvme_path`` in the
            config), ``"none"``; None: as the config's ``offload_param`` says. With ``"nvme"`` each module's shards go to
            the file when its ``__init__`` returns, as far as they are not persistent and ``max_in_cpu`` is used up.
        pin_memory: page-lock the memory of ``remote_device="cpu"``, as the config's ``offload_param.pin_memory`` does.
        config_dict_or_path: the DeepSpeed config; gives the dtype and the keys of ``zero_optimization``. ``"auto"``
            means the default.
        config: old name of ``config_dict_or_path``.
        enabled: False makes the context do nothing.
        dtype: of floating-point parameters and of what torch's constructors make (``torch.zeros`` and the other
            :data:`~deepspeed._core.params.construct.CONSTRUCTORS`); default the config's, or without config each its own.
        mpu: gives ``get_data_parallel_group()``.
        zero_param_parallel_group: without effect; the engine makes hpZ's groups from ``zero_hpz_partition_size``.
        zero_quantized_weights: gather int8 blocks (ZeRO++ qwZ).
        zero_quantized_nontrainable_weights: as ``zero_quantized_weights`` for frozen parameters.
        sequence_data_parallel_group: used like ``data_parallel_group``.
        param_swapper: refused: the file is made from the config.
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
        if param_swapper is not None:
            raise ConfigError(
                "zero.Init: param_swapper is not supported; set offload_param in config_dict_or_path instead"
            )
        if zero_param_parallel_group is not None:
            warning_once(
                "zero.Init ignores zero_param_parallel_group: set zero_optimization.zero_hpz_partition_size in the "
                "engine's config, which makes the groups"
            )
        self.dtype = dtype or _config_dtype(parsed)
        self.override_module_apply = parsed is None or parsed.zero_config.override_module_apply
        self._group = self._choose_group(data_parallel_group, sequence_data_parallel_group, mpu)
        self.local_device = _device()
        zero = parsed.zero_config if parsed is not None else DeepSpeedZeroConfig()
        flags = {
            "zero_quantized_weights": zero_quantized_weights,
            "zero_quantized_nontrainable_weights": zero_quantized_nontrainable_weights,
        }
        zero = zero.model_copy(update={k: v for k, v in flags.items() if v})
        self.transport = self._make_transport(zero)
        self._persistence = zero.param_persistence_threshold
        self._store = _store_of(zero, parsed, self.local_device, remote_device, pin_memory)
        if module is not None:
            with unwatched():
                self._partition(module)

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
            # Clients replace the wrapper, and look for its keywords.
            wrap = zero_wrapper_for_fp_tensor_constructor
            made = {
                ORIGINALS[name]: wrap(ORIGINALS[name], target_fp_dtype=self.dtype, target_device=self.local_device)
                for name in CONSTRUCTORS
            }
            stack.enter_context(construction(_Partitioner(self, made)))
        self._contexts.append(stack)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._contexts.pop().__exit__(kind, error, trace)

    def _partition(self, module: torch.nn.Module) -> None:
        """Cuts everything in the module that is still whole."""
        whole = [(n, p) for n, p in module.named_parameters() if handle_of(p) is None]
        for name, param in whole:
            if not torch.nn.parameter.is_lazy(param):  # it has no shape yet; ``initialize`` will see
                path = f"{type(module).__name__}.{name}"
                partition_parameter(param, self.transport, dtype=self.dtype, device=self.local_device, name=path)
        if self._store is not None and whole:
            handles = handles_of(param for _, param in whole)
            # Other ranks would wait in the next module's collectives for one whose disk is full.
            small = {handle.id for handle in handles if handle.numel < self._persistence}
            together(lambda: shard_homes.settle(handles, self._store, small))
        watch_state(module)  # deep copies of modules have partitioned parameters, and no hooks


class _Partitioner(Builder):
    """What an :class:`Init` does with what is constructed in it."""

    def __init__(self, init: Init, constructors: dict[Callable[..., Any], Callable[..., Any]]) -> None:
        self.init = init
        self.constructors = constructors

    def constructed(self, module: torch.nn.Module) -> None:
        self.init._partition(module)

    def lend(self, handles: list[ParamHandle]) -> Loan:
        return _Borrowed([handle.param for handle in handles])

    def lend_for_apply(self, module: torch.nn.Module) -> Loan | None:
        return _Borrowed(list(module.parameters(recurse=False))) if self.init.override_module_apply else None


class _Borrowed(Loan):
    """Parameters gathered for an ``__init__`` that uses them."""

    def __init__(self, params: list[torch.nn.Parameter]) -> None:
        self._context = GatheredParameters(params, modifier_rank=0)
        self._context.__enter__()
        self._params = [p for p in params if handle_of(p) is not None and p.numel()]
        self._uses = [_uses(p) for p in self._params]

    def unused(self) -> bool:
        used = any(_uses(param) > before for param, before in zip(self._params, self._uses, strict=True))
        for transport in {id(p._ds_handle.transport): p._ds_handle.transport for p in self._params}.values():  # type: ignore[attr-defined]
            if transport.world_size > 1:
                # A rank's collector may have been slower than another's, and all have to do the same.
                flag = torch.tensor(int(used), device=self._params[0].device)
                dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=transport.group)
                used = bool(flag.item())
        return not used

    def close(self, failed: bool) -> None:
        error = RuntimeError() if failed else None
        self._context.__exit__(type(error) if error is not None else None, error, None)


def _uses(param: torch.nn.Parameter) -> int:
    """How many tensors refer to the parameter's memory."""
    return int(torch._C._storage_Use_Count(param.untyped_storage()._cdata))


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


def _store_of(
    zero: DeepSpeedZeroConfig,
    parsed: DeepSpeedConfig | None,
    device: torch.device,
    remote_device: str | None,
    pin_memory: bool,
) -> ShardStore | None:
    """Where shards go as they are made. Collective if that is somewhere."""
    if remote_device is not None and remote_device == get_accelerator().device_name():
        remote_device = "none" if remote_device != "cpu" else "cpu"
    if remote_device not in (None, "none", "cpu", "nvme"):
        raise ConfigError(f"zero.Init: remote_device is None, 'none', 'cpu' or 'nvme', not {remote_device!r}")
    section = zero.offload_param or DeepSpeedZeroOffloadParamConfig()
    if pin_memory and not section.pin_memory:
        zero = zero.model_copy(update={"offload_param": section.model_copy(update={"pin_memory": True})})
    aio = parsed.document.aio if parsed is not None else AioConfig()
    return shard_homes.shard_store(zero, aio, device, remote_device=remote_device)


def _config_dtype(parsed: DeepSpeedConfig | None) -> torch.dtype | None:
    if parsed is None:
        return None
    if parsed.fp16.enabled:
        return torch.float16
    return torch.bfloat16 if parsed.bf16.enabled else torch.float32


def _device() -> torch.device:
    accelerator = get_accelerator()
    if accelerator.device_name() == "cpu":
        return torch.device("cpu")
    return torch.device(accelerator.device_name(own_device_index(dist.get_local_rank(), accelerator)))
