"""Documented settings whose feature this version does not have: one line each, deleted when the feature arrives.

A setting that would be silently ignored is worse than an error, so a gated key refuses any value but its default.
Keys that merely do nothing in the given mode are said once (:func:`inert_settings`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from deepspeed.errors import MissingFeatureError
from deepspeed.runtime.config_later import is_read
from deepspeed.runtime.config_schema import DeepSpeedConfigDocument
from deepspeed.runtime.config_utils import ConfigReport, DeepSpeedConfigModel, join

__all__ = ["GATES", "Gate", "closed_gates", "inert_settings", "refuse_missing_features"]


@dataclass(frozen=True)
class Gate:
    """A key (or with ``.*`` every key of a section) that must keep its default, or be one of ``allowed``."""

    key: str
    feature: str
    instead: str = "Leave it at its default."
    allowed: tuple[Any, ...] = ()


_OFF = "Leave it off."

GATES: tuple[Gate, ...] = (
    # ZeRO
    Gate("zero_optimization.offload_optimizer.super_offload", "the Superchip scheduler", _OFF),
    Gate("zero_optimization.zenflow", "ZenFlow"),
    # Precision and gradients
    Gate("fp16.fp16_master_weights_and_grads", "fp16 master weights", _OFF),
    Gate("bf16.bf16_master_weights_and_grads", "bf16 master weights", _OFF),
    Gate("bf16.bf16_optimizer_states", "bf16 optimizer state", _OFF),
    Gate("amp.enabled", "Apex AMP", "Use fp16, bf16 or torch_autocast."),
    Gate("data_types.param_dtype", "a parameter dtype of its own", "Use fp16 or bf16."),
    Gate("data_types.buffer_dtype", "a buffer dtype of its own", "Cast the buffers before initialize."),
    Gate("gradient_allreduce_op", "summed gradients", "Use mean, and scale the loss by the number of ranks."),
    Gate("managed_gradient_accumulation", "unmanaged accumulation", "Use set_gradient_accumulation_boundary."),
    Gate("sparse_gradients", "sparse gradients", _OFF),
    Gate("disable_allgather", "training without the all-gather", _OFF),
    Gate("graph_harvesting", "graph harvesting", _OFF),
    Gate("optimizer.legacy_fusion", "the older fused optimizers", _OFF),
    # Parallelism
    Gate("use_data_before_expert_parallelism", "expert parallelism", _OFF),
    Gate("sequence_parallel_size", "sequence parallelism"),
    Gate("tensor_parallel.autotp_size", "tensor parallelism", allowed=(0, 1)),
    Gate("tensor_parallel.tensor_parallel.tp_size", "tensor parallelism"),
    Gate("expert_parallel.enabled", "expert parallelism", _OFF),
    Gate("pipeline.*", "pipeline parallelism"),
    # Checkpoints
    Gate("checkpoint.parallel_write.pipeline_stage", "parallel writing", _OFF),
    Gate("checkpoint.checkpoint_serialization", "saving without serialisation"),
    Gate("nebula.enabled", "Nebula checkpointing", _OFF),
    Gate("checkpoint.writer.type", "a writer that writes nothing", "Use FAST or PYTHON.", allowed=("FAST", "PYTHON")),
    Gate("checkpoint.writer.data_parallel", "a choice of writers", "All ranks write their own shards."),
    # Everything else
    Gate("activation_checkpointing.*", "activation checkpointing", "Use torch.utils.checkpoint in the model."),
    Gate("flops_profiler.enabled", "the flops profiler", _OFF),
    Gate("comms_logger.enabled", "the communication logger", _OFF),
    Gate("tensorboard.enabled", "the TensorBoard monitor", _OFF),
    Gate("wandb.enabled", "the Weights & Biases monitor", _OFF),
    Gate("csv_monitor.enabled", "the CSV monitor", _OFF),
    Gate("comet.enabled", "the Comet monitor", _OFF),
    Gate("autotuning.enabled", "autotuning", _OFF),
    Gate("elasticity.enabled", "elastic training", _OFF),
    Gate("data_efficiency.enabled", "data efficiency", _OFF),
    Gate("curriculum_learning.enabled", "curriculum learning", _OFF),
    Gate("compression_training.layer_reduction.enabled", "layer reduction", _OFF),
    Gate("compression_training.weight_quantization.shared_parameters.enabled", "weight quantisation", _OFF),
    Gate("compression_training.activation_quantization.shared_parameters.enabled", "activation quantisation", _OFF),
    Gate("compression_training.sparse_pruning.shared_parameters.enabled", "sparse pruning", _OFF),
    Gate("compression_training.row_pruning.shared_parameters.enabled", "row pruning", _OFF),
    Gate("compression_training.head_pruning.shared_parameters.enabled", "head pruning", _OFF),
    Gate("compression_training.channel_pruning.shared_parameters.enabled", "channel pruning", _OFF),
    Gate("progressive_layer_drop.enabled", "progressive layer dropping", _OFF),
    Gate("quantize_training.enabled", "MoQ", _OFF),
    Gate("quantize_training.eigenvalue.enabled", "eigenvalue MoQ", _OFF),
    Gate("weight_quantization.enabled", "weight-only quantisation", "Leave the section out.", allowed=(False,)),
    Gate("hybrid_engine.enabled", "the hybrid engine", _OFF),
    Gate("compile.enabled", "compiling from the config", "Call engine.compile or torch.compile."),
    Gate("compile.deepcompile", "DeepCompile", _OFF),
    Gate("sparse_attention", "sparse attention"),
)

# Read by stage 3 only; clients write some of them at every stage.
_STAGE_3_KEYS = (
    "sub_group_size",
    "prefetch_bucket_size",
    "param_persistence_threshold",
    "model_persistence_threshold",
    "max_live_parameters",
    "max_reuse_distance",
    "gather_16bit_weights_on_model_save",
    "memory_efficient_linear",
    "pipeline_loading_checkpoint",
    "override_module_apply",
    "use_all_reduce_for_fetch_params",
    "module_granularity_threshold",
    "log_trace_cache_warnings",
    "leaf_module",
    "allgather_sequential",
    "save_muon_momentum_buffer_in_memory",
    "zero_hpz_partition_size",
    "zero_quantized_weights",
    "zero_quantized_nontrainable_weights",
    "zero_quantized_gradients",
    "zeropp_loco_param",
    "mics_shard_size",
    "mics_hierarchical_params_gather",
)

# Of offload_optimizer, read for device nvme only.
_FILE_KEYS = ("nvme_path", "buffer_count", "pipeline_read", "pipeline_write", "fast_init")


def closed_gates(document: DeepSpeedConfigDocument) -> list[tuple[str, Any, Gate]]:
    """``(key, value, gate)`` of each setting that asks for a missing feature. Pure."""
    found = []
    for gate in GATES:
        for place, value, default in _values_at(document, gate.key):
            if value not in (gate.allowed or (default,)):
                found.append((place, value, gate))
    return found


def refuse_missing_features(document: DeepSpeedConfigDocument) -> None:
    """Raises :class:`MissingFeatureError` with every setting that asks for a feature which is not there yet."""
    closed = closed_gates(document)
    if closed:
        lines = [f"  {place} = {_plain(value)}: {gate.feature}. {gate.instead}" for place, value, gate in closed]
        raise MissingFeatureError("this version of deepspeed does not have yet:\n" + "\n".join(lines))


def inert_settings(document: DeepSpeedConfigDocument, report: ConfigReport) -> list[str]:
    """A sentence for each setting of the user's that does nothing in this run. Pure."""
    said = []
    zero = document.zero_optimization
    if zero.stage < 3:
        for name in _STAGE_3_KEYS:
            place = join("zero_optimization", name)
            if report.origin(place) == "user" and getattr(zero, name) != _default(zero, name):
                said.append(f"{report.written[place]} has no effect below ZeRO stage 3 (stage is {int(zero.stage)})")
    section = zero.offload_optimizer
    if section is not None and section.device.value != "none":
        unused = ("cpuadam_cores_perc",) if section.device.value == "nvme" else ("cpuadam_cores_perc", *_FILE_KEYS)
        for name in unused:
            place = join("zero_optimization.offload_optimizer", name)
            if report.origin(place) == "user" and getattr(section, name) != _default(section, name):
                why = "without files (device is cpu)" if name in _FILE_KEYS else "without super_offload"
                said.append(f"{report.written[place]} has no effect {why}")
    offloads = (zero.offload_optimizer, zero.offload_param)
    reads_files = any(section is not None and section.device.value == "nvme" for section in offloads)
    for name in type(document.aio).model_fields if not reads_files else ():
        place = join("aio", name)
        if report.origin(place) != "default" and getattr(document.aio, name) != _default(document.aio, name):
            said.append(f"{report.written[place]} has no effect without offload to NVMe")
    size = document.vocabulary_size
    if size is not None and size % 8:
        said.append(f"vocabulary_size = {size} is not a multiple of 8, which may cost speed on tensor cores")
    return said


def _values_at(document: DeepSpeedConfigModel, key: str) -> Iterator[tuple[str, Any, Any]]:
    """``(place, value, default)`` at a dotted key, or at every key of a section for ``section.*``; none if absent."""
    *path, last = key.split(".")
    holder: Any = document
    for name in path:
        if not is_read(holder, name):  # nobody has set anything there
            return
        holder = getattr(holder, name)
        if holder is None:
            return
    for name in type(holder).model_fields if last == "*" else [last]:
        yield join(".".join(path), name), getattr(holder, name), _default(holder, name)
    if last == "*":
        yield from ((join(".".join(path), name), value, None) for name, value in (holder.model_extra or {}).items())


def _default(holder: DeepSpeedConfigModel, name: str) -> Any:
    return type(holder).model_fields[name].get_default(call_default_factory=True)


def _plain(value: Any) -> Any:
    if isinstance(value, DeepSpeedConfigModel):
        return value.model_dump(exclude_defaults=True)
    return getattr(value, "value", value)
