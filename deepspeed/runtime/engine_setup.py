"""What ``DeepSpeedEngine.__init__`` is made of: device and dtype of the model, the optimizer, the scheduler.

Plain functions from config to objects, so that the engine itself holds phases only.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, cast

import torch

from deepspeed import comm as dist
from deepspeed._core.lazy import on_first_use
from deepspeed._core.pages import keep_freed_memory
from deepspeed._core.params import is_partitioned
from deepspeed._core.precision.policy import PrecisionPolicy
from deepspeed._core.reduce.reducer import ReducePolicy
from deepspeed.accelerator import get_accelerator
from deepspeed.accelerator.placement import own_device_index
from deepspeed.comm import doctor
from deepspeed.errors import ConfigError
from deepspeed.ops.registry import build_optimizer, is_zero_tested
from deepspeed.runtime import optimizer_offload
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.flat_optimizer import FlatOptimizer, FlatSettings, take_back
from deepspeed.runtime.fp16.fused_optimizer import FP16_Optimizer
from deepspeed.runtime.fp16.loss_scaler import make_loss_scaler
from deepspeed.runtime.lr_schedules import build_scheduler
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from deepspeed.utils.logging import log_dist, warning_once

if TYPE_CHECKING:
    from deepspeed._core.params import hooks
    from deepspeed.runtime.zero import (
        module_state,
        parameter_offload,
        partition_parameters,
        shard_homes,
        stage3,
        topology,
    )
    from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload
    from deepspeed.utils import z3_leaf_module
else:
    # For partitioned parameters only.
    hooks = on_first_use("deepspeed._core.params.hooks")
    module_state = on_first_use("deepspeed.runtime.zero.module_state")
    parameter_offload = on_first_use("deepspeed.runtime.zero.parameter_offload")
    partition_parameters = on_first_use("deepspeed.runtime.zero.partition_parameters")
    shard_homes = on_first_use("deepspeed.runtime.zero.shard_homes")
    stage3 = on_first_use("deepspeed.runtime.zero.stage3")
    topology = on_first_use("deepspeed.runtime.zero.topology")
    z3_leaf_module = on_first_use("deepspeed.utils.z3_leaf_module")

__all__ = [
    "choose_device",
    "data_parallel_group",
    "make_flat_optimizer",
    "make_inner_optimizer",
    "make_scheduler",
    "partition_or_unite",
    "precision_policy",
    "prepare_module",
]

DEFAULT_BUCKET_NUMEL = 1 << 23
"""Elements of a bucket when ``reduce_bucket_size`` is not given: small enough to overlap, large enough to amortise."""

DEFAULT_BUCKET_NUMEL_STAGE_3 = 1 << 21
"""The same for stage 3, where the buffers would otherwise outweigh the parameters that are gathered at a time."""

AUTOCAST_SAFE_MODULES = ("torch.nn.Linear", "torch.nn.Conv1d", "torch.nn.Conv2d", "torch.nn.Conv3d")

OptimizerLike = torch.optim.Optimizer | Callable[[Any], torch.optim.Optimizer] | None


def choose_device(args: Any) -> torch.device:
    """This rank's device: ``args.device_rank`` if given, else LOCAL_RANK's on an accelerator, else the CPU."""
    accelerator = get_accelerator()
    if accelerator.device_name() == "cpu":
        return torch.device("cpu")
    index = getattr(args, "device_rank", None)
    if index is None:
        index = own_device_index(dist.get_local_rank(), accelerator)
    accelerator.set_device(index)
    return torch.device(accelerator.device_name(index))


def data_parallel_group(mpu: Any) -> torch.distributed.ProcessGroup | None:
    """The group that shares gradients: the mpu's data-parallel group, or None for the whole world."""
    return mpu.get_data_parallel_group() if mpu is not None and hasattr(mpu, "get_data_parallel_group") else None


def precision_policy(config: DeepSpeedConfig, module: torch.nn.Module) -> PrecisionPolicy:
    """Dtypes from the fp16, bf16, torch_autocast, data_types and communication_data_type settings."""
    param: torch.dtype | None = None
    if config.fp16.enabled:
        param = torch.float16
    elif config.bf16.enabled:
        param = torch.bfloat16
    check = bool(config.bf16.check_grad_overflow) if config.bf16.enabled else True
    return PrecisionPolicy(
        param_dtype=param,
        comm_dtype=config.communication_dtype,
        accum_dtype=config.grad_accum_dtype,
        loss_scaling=config.fp16.enabled,
        check_overflow=check,
        cast_inputs=config.fp16.enabled and config.fp16.auto_cast,
        autocast_dtype=config.autocast_dtype if config.torch_autocast.enabled else None,
        autocast_names=_safe_module_parameters(config, module),
    )


def _safe_module_parameters(config: DeepSpeedConfig, module: torch.nn.Module) -> frozenset[str]:
    """Names of the parameters of torch_autocast's safe modules, by class name or dotted class path."""
    if not config.torch_autocast.enabled:
        return frozenset()
    safe = set(config.torch_autocast.lower_precision_safe_modules or AUTOCAST_SAFE_MODULES)
    return frozenset(
        f"{path}.{name}" if path else name
        for path, owner in module.named_modules()
        if safe & {type(owner).__name__, f"{type(owner).__module__}.{type(owner).__qualname__}", _torch_path(owner)}
        for name, _ in owner.named_parameters(recurse=False)
    )


def _torch_path(module: torch.nn.Module) -> str:
    """``torch.nn.Linear``, as users write it, for a class that lives in ``torch.nn.modules.linear``."""
    kind = type(module)
    return f"torch.nn.{kind.__name__}" if getattr(torch.nn, kind.__name__, None) is kind else ""


def prepare_module(
    module: torch.nn.Module,
    policy: PrecisionPolicy,
    device: torch.device,
    group: torch.distributed.ProcessGroup | None,
    skip: set[torch.nn.Parameter],
) -> None:
    """Moves what no bucket takes over (frozen parameters, buffers) to the device, casts parameters, syncs to rank 0.

    Buffers keep their dtype. Partitioned parameters are left alone. Collective.
    """
    tensors: list[torch.Tensor] = []
    for param in module.parameters():
        if param not in skip and not is_partitioned(param):
            dtype = policy.param_dtype if policy.param_dtype is not None and param.is_floating_point() else param.dtype
            if param.dtype != dtype or param.device != device:
                param.data = param.data.to(device=device, dtype=dtype)
            tensors.append(param.data)
    for owner in module.modules():
        for name, buffer in owner._buffers.items():
            if buffer is not None:
                if buffer.device != device:
                    owner._buffers[name] = buffer.to(device)
                tensors.append(cast(torch.Tensor, owner._buffers[name]))
    if dist.is_initialized() and dist.get_world_size(group) > 1:
        source = 0 if group is None else torch.distributed.get_global_rank(group, 0)
        unique = {id(t): t for t in tensors if t.numel()}.values()
        copies = [t.contiguous() for t in unique]
        works = [dist.broadcast(t, source, group=group, async_op=True) for t in copies]
        for work, tensor, copy in zip(works, unique, copies, strict=True):
            with doctor.waiting("broadcast", "buffers and frozen parameters"):
                work.wait()
            if copy is not tensor:
                tensor.copy_(copy)


def partition_or_unite(
    config: DeepSpeedConfig,
    module: torch.nn.Module,
    policy: PrecisionPolicy,
    device: torch.device,
    group: torch.distributed.ProcessGroup | None,
    trained: set[torch.nn.Parameter],
) -> DeepSpeedZeRoOffload | None:
    """Stage 3: partitions the module. Below: makes what zero.Init or an earlier engine partitioned whole. Collective."""
    if config.zero_optimization_stage == 3:
        z3_leaf_module.apply_zero_leaf_module_config(module, config.zero_config.leaf_module)
        return parameter_offload.partition_module(
            module,
            config.zero_config,
            group=group,
            device=device,
            dtype=policy.param_dtype,
            keep_dtype=trained,
            store=shard_homes.shard_store(config.zero_config, config.document.aio, device),
        )
    if any(map(is_partitioned, module.parameters())):
        united = partition_parameters.unpartition(module.parameters())
        for part in module.modules():
            earlier = hooks.coordinator_of(part)
            if earlier is not None:
                earlier.detach()
        module_state.unwatch_state(module)
        log_dist(
            f"{united} partitioned parameters were made whole for ZeRO stage {int(config.zero_optimization_stage)}"
        )
    return None


def make_inner_optimizer(
    config: DeepSpeedConfig,
    optimizer: OptimizerLike,
    model_parameters: Iterable[Any] | None,
    module: torch.nn.Module,
) -> torch.optim.Optimizer | None:
    """The torch optimizer: the given one, what the callable makes, or the config's; None if there is none."""
    made = _find_or_make_optimizer(config, optimizer, model_parameters, module)
    stage = config.zero_optimization_stage
    if stage > 0 and getattr(made, "needs_whole_params", False):
        raise ConfigError(
            f"{type(made).__name__} scales its update by norms of whole parameters, and ZeRO stage {int(stage)} updates "
            "shards: use zero_optimization.stage 0 with it, or AdamW or Lion with this stage"
        )
    return made


def _find_or_make_optimizer(
    config: DeepSpeedConfig,
    optimizer: OptimizerLike,
    model_parameters: Iterable[Any] | None,
    module: torch.nn.Module,
) -> torch.optim.Optimizer | None:
    if isinstance(optimizer, torch.optim.Optimizer):
        if config.zero_optimization_stage > 0:
            _require_tested(optimizer, allowed=config.zero_allow_untested_optimizer)
        optimizer_offload.require_fitting(config, optimizer)
        return optimizer
    groups = _parameter_groups(model_parameters, module)
    if optimizer is not None:
        if not callable(optimizer):
            raise ConfigError(
                f"optimizer must be a torch.optim.Optimizer or a callable that makes one from parameters, not "
                f"{type(optimizer).__name__}"
            )
        made = optimizer(groups)
        if not isinstance(made, torch.optim.Optimizer):
            raise ConfigError(f"the optimizer callable returned {type(made).__name__}, not a torch.optim.Optimizer")
        optimizer_offload.require_fitting(config, made)
        return made
    section = config.optimizer
    if section is None or section.type is None:
        return None
    if not groups:
        raise ConfigError("the config names an optimizer, but the model has no trainable parameters to give it")
    offloaded = optimizer_offload.offload_policy(config.zero_config, config.document.aio) is not None
    return build_optimizer(section.type, dict(section.params), groups, use_cpu_offload=offloaded)


def _require_tested(optimizer: torch.optim.Optimizer, *, allowed: bool) -> None:
    if is_zero_tested(optimizer):
        return
    if allowed:
        # Clients set the key for every optimizer that they are given, so that its user may not know.
        warning_once(
            f"zero_allow_untested_optimizer lets {type(optimizer).__name__} update flat shards of the parameters, which "
            "is right only if its update is elementwise; factored moments or norms of whole matrices need stage 0"
        )
    else:
        error = type("UntestedOptimizerError", (ConfigError, AssertionError), {})
        raise error(
            f"{type(optimizer).__name__} is not tested with ZeRO, which updates flat shards: an optimizer that needs "
            'whole parameters would be wrong. Set "zero_allow_untested_optimizer": true if its update is elementwise'
        )


def _parameter_groups(model_parameters: Iterable[Any] | None, module: torch.nn.Module) -> list[Any]:
    """Parameters or group dicts, consumed once; by default the model's trainable parameters."""
    if model_parameters is None:
        return [p for p in module.parameters() if p.requires_grad]
    if isinstance(model_parameters, torch.nn.Module):
        return [p for p in model_parameters.parameters() if p.requires_grad]
    given = list(model_parameters)
    if given and isinstance(given[0], dict):
        return [{**group, "params": [p for p in group["params"] if p.requires_grad]} for group in given]
    return [p for p in given if p.requires_grad]


def make_flat_optimizer(
    config: DeepSpeedConfig,
    inner: torch.optim.Optimizer,
    module: torch.nn.Module,
    policy: PrecisionPolicy,
    *,
    device: torch.device,
    group: torch.distributed.ProcessGroup | None,
    reduce_now: Callable[[], bool],
    offload: DeepSpeedZeRoOffload | None = None,
) -> FlatOptimizer:
    """The wrapped optimizer of the configured stage and precision. Collective."""
    stage = config.zero_optimization_stage
    placed = optimizer_offload.offload_policy(config.zero_config, config.document.aio)
    settings = FlatSettings(
        stage=stage,
        precision=policy,
        reduce=_reduce_policy(config, dist.get_world_size(group), offloaded=placed is not None),
        bucket_numel=_bucket_numel(config),
        allgather_numel=max(1, config.zero_config.allgather_bucket_size),
        allgather_partitions=config.zero_config.allgather_partitions,
        gradient_clipping=config.gradient_clipping,
        fail_on_unused=not config.zero_config.ignore_unused_parameters,
        verify_steps=config.verify_gradients,
        sub_group_numel=config.zero_config.sub_group_size,
        offload=placed,
    )
    if device.type == "cpu" and settings.offload is None and config.zero_config.offload_param is None:
        keep_freed_memory()  # those who offload would rather have it back
    take_back(inner)
    kind: Callable[..., FlatOptimizer]
    if offload is not None:
        if config.verify_gradients and topology.is_quantised(offload.topology.reduce):
            raise ConfigError("verify_gradients compares exactly, and zero_quantized_gradients rounds: use one of them")
        kind = functools.partial(
            stage3.DeepSpeedZeroOptimizer_Stage3, parameter_offload=offload, transport=offload.topology.reduce
        )
    elif stage > 0:
        kind = DeepSpeedZeroOptimizer
    elif policy.param_dtype == torch.float16:
        kind = FP16_Optimizer
    elif policy.param_dtype == torch.bfloat16:
        kind = BF16_Optimizer
    else:
        kind = FlatOptimizer
    return kind(
        inner,
        _names(module, inner),
        settings,
        device=device,
        group=group,
        loss_scaler=make_loss_scaler(config.fp16),
        reduce_now=reduce_now,
    )


def _names(module: torch.nn.Module, inner: torch.optim.Optimizer) -> Mapping[torch.nn.Parameter, str]:
    names = {param: name for name, param in module.named_parameters()}
    for group_index, group in enumerate(inner.param_groups):
        for index, param in enumerate(group["params"]):
            if param not in names:
                names[param] = f"group{group_index}.param{index}"
                warning_once(
                    f"parameter {index} of optimizer group {group_index}, shape {tuple(param.shape)}, is not in the "
                    "model; it is trained, but saved only as a part of the optimizer"
                )
    return names


def _reduce_policy(config: DeepSpeedConfig, world_size: int, *, offloaded: bool) -> ReducePolicy:
    zero = config.zero_config
    factor = float(config.gradient_predivide_factor)
    if factor != 1.0:
        pre = 1.0 / factor
    else:
        pre = 1.0 / world_size if config.prescale_gradients else 1.0
    return ReducePolicy(
        every_backward=config.zero_optimization_stage >= 2,
        gather_result=config.zero_optimization_stage == 0,
        overlap=bool(zero.overlap_comm),
        contiguous=zero.contiguous_gradients,
        use_reduce_scatter=zero.reduce_scatter or config.zero_optimization_stage == 3,
        keep_buffers=config.zero_optimization_stage < 3 and not offloaded,
        pre_scale=pre,
        post_scale=1.0 / (world_size * pre),
    )


def _bucket_numel(config: DeepSpeedConfig) -> int:
    zero = config.zero_config
    if "reduce_bucket_size" in zero.model_fields_set:
        return max(1, zero.reduce_bucket_size)
    return DEFAULT_BUCKET_NUMEL_STAGE_3 if zero.stage == 3 else DEFAULT_BUCKET_NUMEL


def make_scheduler(config: DeepSpeedConfig, lr_scheduler: Any, inner: torch.optim.Optimizer | None) -> Any:
    """The given scheduler, what the callable makes from the inner optimizer, or the config's; None if there is none."""
    if lr_scheduler is not None:
        if callable(lr_scheduler) and not hasattr(lr_scheduler, "step"):
            return lr_scheduler(inner)
        return lr_scheduler
    section = config.scheduler
    if section is None or section.type is None or inner is None:
        return None
    return build_scheduler(section.type, dict(section.params), inner)
