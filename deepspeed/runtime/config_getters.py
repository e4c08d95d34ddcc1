"""The engine's config getters (``engine.zero_optimization_stage()``, ...), generated from one table.

Each entry maps a public method name to the path of its value below ``engine._config``.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from typing import Any

__all__ = ["GETTERS", "ConfigGetters"]

_ZERO = "zero_config."

GETTERS: dict[str, str] = {
    "train_batch_size": "train_batch_size",
    "train_micro_batch_size_per_gpu": "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "gradient_clipping": "gradient_clipping",
    "gradient_predivide_factor": "gradient_predivide_factor",
    "prescale_gradients": "prescale_gradients",
    "sparse_gradients_enabled": "sparse_gradients",
    "communication_data_type": "communication_data_type",
    "steps_per_print": "steps_per_print",
    "wall_clock_breakdown": "wall_clock_breakdown",
    "memory_breakdown": "memory_breakdown",
    "dump_state": "dump_state",
    "dataloader_drop_last": "dataloader_drop_last",
    "fp16_enabled": "fp16.enabled",
    "fp16_auto_cast": "fp16.auto_cast",
    "fp16_master_weights_and_gradients": "fp16.fp16_master_weights_and_grads",
    "dynamic_loss_scale": "fp16.dynamic_loss_scale",
    "bfloat16_enabled": "bf16.enabled",
    "amp_enabled": "amp.enabled",
    "torch_autocast_enabled": "torch_autocast.enabled",
    "optimizer_name": "optimizer.type",
    "optimizer_params": "optimizer.params",
    "optimizer_legacy_fusion": "optimizer.legacy_fusion",
    "scheduler_name": "scheduler.type",
    "scheduler_params": "scheduler.params",
    "zero_allow_untested_optimizer": "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer": "zero_force_ds_cpu_optimizer",
    "zero_optimization": "zero_enabled",
    "zero_optimization_stage": "zero_optimization_stage",
    "zero_reduce_bucket_size": _ZERO + "reduce_bucket_size",
    "zero_reduce_scatter": _ZERO + "reduce_scatter",
    "zero_overlap_comm": _ZERO + "overlap_comm",
    "zero_contiguous_gradients": _ZERO + "contiguous_gradients",
    "zero_allgather_partitions": _ZERO + "allgather_partitions",
    "zero_allgather_bucket_size": _ZERO + "allgather_bucket_size",
    "zero_load_from_fp32_weights": _ZERO + "load_from_fp32_weights",
    "zero_elastic_checkpoint": _ZERO + "elastic_checkpoint",
    "zero_ignore_unused_parameters": _ZERO + "ignore_unused_parameters",
    "zero_legacy_stage1": _ZERO + "legacy_stage1",
    "zero_round_robin_gradients": _ZERO + "round_robin_gradients",
    "zero_sub_group_size": _ZERO + "sub_group_size",
    "zero_max_live_parameters": _ZERO + "max_live_parameters",
    "zero_max_reuse_distance": _ZERO + "max_reuse_distance",
    "zero_prefetch_bucket_size": _ZERO + "prefetch_bucket_size",
    "zero_param_persistence_threshold": _ZERO + "param_persistence_threshold",
    "zero_model_persistence_threshold": _ZERO + "model_persistence_threshold",
    "zero_gather_16bit_weights_on_model_save": _ZERO + "gather_16bit_weights_on_model_save",
    "zero_offload_optimizer": _ZERO + "offload_optimizer",
    "zero_offload_param": _ZERO + "offload_param",
    "zero_hpz_partition_size": _ZERO + "zero_hpz_partition_size",
    "zero_quantized_weights": _ZERO + "zero_quantized_weights",
    "zero_quantized_nontrainable_weights": _ZERO + "zero_quantized_nontrainable_weights",
    "zero_quantized_gradients": _ZERO + "zero_quantized_gradients",
    "mics_shard_size": _ZERO + "mics_shard_size",
    "checkpoint_tag_validation_mode": "checkpoint.tag_validation",
    "load_universal_checkpoint": "checkpoint.load_universal",
    "use_node_local_storage": "checkpoint.use_node_local_storage",
    "flops_profiler_enabled": "flops_profiler.enabled",
    "flops_profiler_profile_step": "flops_profiler.profile_step",
    "flops_profiler_module_depth": "flops_profiler.module_depth",
    "flops_profiler_top_modules": "flops_profiler.top_modules",
    "flops_profiler_detailed": "flops_profiler.detailed",
    "flops_profiler_output_file": "flops_profiler.output_file",
    "flops_profiler_recompute_fwd_factor": "flops_profiler.recompute_fwd_factor",
    "eigenvalue_enabled": "eigenvalue.enabled",
    "pld_enabled": "progressive_layer_drop.enabled",
    "autotuning_enabled": "autotuning.enabled",
    "elasticity_enabled": "elasticity.enabled",
    "aio_config": "aio",
    "graph_harvesting": "graph_harvesting",
    "use_data_before_expert_parallel": "use_data_before_expert_parallelism",
}


def _getter(name: str, path: str) -> Callable[[Any], Any]:
    def get(self: Any) -> Any:
        # A section that is not configured (optimizer, scheduler) has no values.
        return reduce(lambda at, key: None if at is None else getattr(at, key), path.split("."), self._config)

    get.__name__ = get.__qualname__ = name
    get.__doc__ = f"The configured value of ``{path.replace('zero_config', 'zero_optimization')}``."
    return get


class ConfigGetters:
    """Mixin with one method for each entry of :data:`GETTERS`."""

    def zero_optimization_partition_gradients(self) -> bool:
        """Whether the stage partitions gradients."""
        return bool(self._config.zero_optimization_stage >= 2)  # type: ignore[attr-defined]

    def zero_optimization_partition_weights(self) -> bool:
        """Whether the stage partitions the weights themselves."""
        return bool(self._config.zero_optimization_stage >= 3)  # type: ignore[attr-defined]

    def print_config(self) -> None:
        """Logs the resolved config with where each value came from, on rank 0, whatever the log level."""
        self._config.print("DeepSpeedEngine configuration")  # type: ignore[attr-defined]


for _name, _path in GETTERS.items():
    setattr(ConfigGetters, _name, _getter(_name, _path))
