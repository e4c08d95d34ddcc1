"""``zero_optimization``: partitioning of optimizer state, gradients and parameters."""

from __future__ import annotations

import sys
from enum import IntEnum
from typing import Annotated, Any, ClassVar

from pydantic import BeforeValidator, model_validator
from typing_extensions import Self

from deepspeed.errors import ConfigError
from deepspeed.runtime.config_types import Bool, Fraction, Int, NonNegInt, PosInt, as_bool, as_int
from deepspeed.runtime.config_utils import DeepSpeedConfigModel, Forward, key, section
from deepspeed.runtime.zero.leaf_module_config import DeepSpeedZeroLeafModuleConfig
from deepspeed.runtime.zero.offload_config import (
    DeepSpeedZeroOffloadOptimizerConfig,
    DeepSpeedZeroOffloadParamConfig,
    OffloadDeviceEnum,
)
from deepspeed.runtime.zero.zenflow_config import ZenFlowConfig

__all__ = [
    "DeepSpeedZeroConfig",
    "DeepSpeedZeroOffloadOptimizerConfig",
    "DeepSpeedZeroOffloadParamConfig",
    "LoCoConfig",
    "OffloadDeviceEnum",
    "ZeroStageEnum",
]


class ZeroStageEnum(IntEnum):
    """What is partitioned over the data-parallel ranks. Checkpoints pickle this class by its path."""

    disabled = 0
    optimizer_states = 1
    gradients = 2
    weights = 3


def _stage(value: Any) -> Any:
    number = as_int(value)
    if isinstance(number, int) and number not in list(ZeroStageEnum):
        raise ConfigError(f"the ZeRO stage is 0, 1, 2 or 3, got {number}")
    return number


def _offload_to_cpu(value: Any) -> dict[str, str] | None:
    return {"device": "cpu"} if as_bool(value) else None


class LoCoConfig(DeepSpeedConfigModel):
    """``zeropp_loco_param``: error feedback for quantised gradients."""

    place: ClassVar[str] = "zero_optimization.zeropp_loco_param"

    err_beta: Fraction = key(0.8, "Weight of the running error average.", since="0.16.2")
    reset_T: PosInt = key(1024, "Steps after which the error is cleared.", since="0.16.2")


class DeepSpeedZeroConfig(DeepSpeedConfigModel):
    """ZeRO: stage 1 partitions optimizer state, 2 also gradients, 3 also parameters. Sizes are in elements."""

    place: ClassVar[str] = "zero_optimization"

    stage: Annotated[ZeroStageEnum, BeforeValidator(_stage)] = key(ZeroStageEnum.disabled, "0, 1, 2 or 3; see above.")
    contiguous_gradients: Bool = key(True, "Copy gradients into one buffer as they are produced.")
    reduce_scatter: Bool = key(True, "Reduce or reduce-scatter gradients rather than all-reduce them.")
    reduce_bucket_size: NonNegInt = key(500_000_000, "Elements in one gradient reduction.")
    use_multi_rank_bucket_allreduce: Bool = key(True, "Merge the buckets of all ranks into one all-reduce.")
    allgather_partitions: Bool = key(True, "All-gather updated parameters rather than broadcast each part.")
    allgather_bucket_size: NonNegInt = key(500_000_000, "Elements in one all-gather of updated parameters.")
    overlap_comm: Bool | None = key(None, "Reduce gradients while backward runs; unset = only with stage 3.")
    load_from_fp32_weights: Bool = key(
        True, "Restore master weights from the fp32 copies of a checkpoint, not from its 16-bit weights."
    )
    elastic_checkpoint: Bool = key(
        False, "Legacy.", inert="every checkpoint loads at any number of ranks, with or without this key"
    )
    offload_param: DeepSpeedZeroOffloadParamConfig | None = key(None, "Parameter offload; stage 3.")
    offload_optimizer: DeepSpeedZeroOffloadOptimizerConfig | None = key(None, "Optimizer-state offload; stages 1 to 3.")
    sub_group_size: NonNegInt = key(1_000_000_000, "Elements in one tile of the optimizer step; stage 3.")
    cpu_offload_param: Bool | None = key(
        None, "Deprecated for offload_param.", forward=Forward("offload_param", _offload_to_cpu)
    )
    cpu_offload_use_pin_memory: Bool | None = key(
        None,
        "Deprecated; its value is not transferred.",
        forward=Forward(None, note="Write pin_memory in offload_param or offload_optimizer."),
    )
    cpu_offload: Bool | None = key(
        None, "Deprecated for offload_optimizer.", forward=Forward("offload_optimizer", _offload_to_cpu)
    )
    prefetch_bucket_size: NonNegInt = key(
        50_000_000, "Parameter elements fetched ahead of use.", aliases=("stage3_prefetch_bucket_size",)
    )
    param_persistence_threshold: NonNegInt = key(
        100_000, "Parameters smaller than this stay whole.", aliases=("stage3_param_persistence_threshold",)
    )
    model_persistence_threshold: NonNegInt = key(
        sys.maxsize, "Cap on the elements that stay whole.", aliases=("stage3_model_persistence_threshold",)
    )
    max_live_parameters: NonNegInt = key(
        1_000_000_000, "Cap on gathered parameter elements.", aliases=("stage3_max_live_parameters",)
    )
    max_reuse_distance: NonNegInt = key(
        1_000_000_000,
        "Keep a parameter gathered if it is used again within so many elements.",
        aliases=("stage3_max_reuse_distance",),
    )
    gather_16bit_weights_on_model_save: Bool = key(
        False,
        "Gather the whole 16-bit weights for save_16bit_model.",
        aliases=("stage3_gather_16bit_weights_on_model_save",),
    )
    stage3_gather_fp16_weights_on_model_save: Bool = key(
        False,
        "Deprecated for gather_16bit_weights_on_model_save.",
        forward=Forward("gather_16bit_weights_on_model_save"),
    )
    ignore_unused_parameters: Bool = key(True, "Tolerate parameters that took no part in a step; false names them.")
    legacy_stage1: Bool = key(False, "Old stage 1.", inert="there is one implementation of stage 1")
    round_robin_gradients: Bool = key(
        False,
        "Spread the copying of gradients over the ranks; stages 1 and 2 with CPU offload.",
        inert="every rank copies its share of each bucket, so that nothing is left to spread",
    )
    zero_hpz_partition_size: NonNegInt = key(1, "ZeRO++ hpZ: ranks in the secondary group, 1 = off.")
    zero_quantized_weights: Bool = key(False, "ZeRO++ qwZ: quantise weights for the all-gather.")
    zero_quantized_nontrainable_weights: Bool = key(False, "Store frozen weights quantised.")
    zero_quantized_gradients: Bool = key(False, "ZeRO++ qgZ: quantise gradients for the reduction.")
    mics_shard_size: Int = key(-1, "MiCS: ranks that share one model state, -1 = off; stage 3.")
    mics_hierarchical_params_gather: Bool = key(False, "MiCS: gather parameters in two stages.")
    memory_efficient_linear: Bool = key(
        True,
        "Save memory in linear layers; stage 3.",
        inert="linear layers never keep a gathered weight for the backward, whatever this says",
    )
    pipeline_loading_checkpoint: Bool = key(
        False,
        "Load checkpoint parts in a pipeline; stage 3.",
        inert="each rank reads only its own byte ranges of a checkpoint, and all of them at the same time",
    )
    override_module_apply: Bool = key(True, "Gather parameters inside Module.apply; stage 3.")
    grad_hooks: Bool = key(True, "Listed in old documents only.", inert="gradients are always reduced from hooks")
    use_all_reduce_for_fetch_params: Bool = key(
        False,
        "Fetch parameters by all-reduce.",
        aliases=("stage3_use_all_reduce_for_fetch_params",),
        since="0.14.3",
    )
    module_granularity_threshold: NonNegInt = key(
        0,
        "Modules with fewer parameters per descendant than this are fetched as one unit; 0 = off.",
        aliases=("stage3_module_granularity_threshold",),
        since="0.16.0",
    )
    zeropp_loco_param: LoCoConfig | None = key(None, "LoCo error feedback for qgZ.", since="0.16.2")
    log_trace_cache_warnings: Bool = key(False, "Log events of the prefetch trace.", since="0.16.4")
    zenflow: ZenFlowConfig | None = key(None, "ZenFlow updates.", since="0.17.5")
    enable_sanity_checks: Bool = key(
        False, "Internal checks.", since="0.17.6", inert="the internal checks are always on"
    )
    leaf_module: DeepSpeedZeroLeafModuleConfig = section(
        DeepSpeedZeroLeafModuleConfig, "Modules fetched as one unit; stage 3.", since="0.18.0"
    )
    allgather_sequential: Bool = key(
        False, "Gather one parameter at a time.", aliases=("stage3_allgather_sequential",), since="0.18.5"
    )
    save_muon_momentum_buffer_in_memory: Bool = key(
        False, "Keep Muon's momentum in memory under NVMe offload; stage 3.", since="0.18.9"
    )

    @model_validator(mode="after")
    def _settle(self) -> Self:
        if self.overlap_comm is None:
            # Written past the assignment validation, which would call this validator again without end.
            self.__dict__["overlap_comm"] = self.stage == ZeroStageEnum.weights
        offload = self.offload_optimizer
        if offload is not None and offload.device != OffloadDeviceEnum.none:
            if self.stage == ZeroStageEnum.disabled:
                raise ConfigError("offload_optimizer needs stage 1, 2 or 3, and stage is 0")
            if offload.device == OffloadDeviceEnum.nvme and offload.nvme_path is None:
                raise ConfigError(
                    "offload_optimizer.device = nvme needs offload_optimizer.nvme_path, an existing directory"
                )
        param = self.offload_param
        if param is not None and param.device != OffloadDeviceEnum.none and self.stage != ZeroStageEnum.weights:
            raise ConfigError(f"offload_param to {param.device.value} needs stage 3, and stage is {int(self.stage)}")
        return self
