"""Every documented key exists, with its documented default, and a document that sets them all is read.

The list is a transcription of the key tables of the documents, not made from the models; `-` stands for a key without a
default (null, required, or a section that is absent).
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from enum import Enum
from pathlib import Path

import pytest
import torch

from deepspeed.runtime.config import parse_document
from deepspeed.runtime.config_schema import DeepSpeedConfigDocument
from deepspeed.runtime.config_utils import DeepSpeedConfigModel, facts_of, field_names, nested_model, walk_fields

KEYS = """
train_batch_size -
train_micro_batch_size_per_gpu -
gradient_accumulation_steps -
managed_gradient_accumulation true
dataloader_drop_last false
vocabulary_size -
optimizer.type -
optimizer.params {}
optimizer.legacy_fusion false
zero_allow_untested_optimizer false
zero_force_ds_cpu_optimizer true
scheduler.type -
scheduler.params {}
communication_data_type -
seq_parallel_comm_data_type -
seq_parallel_communication_data_type "fp32"
prescale_gradients false
gradient_predivide_factor 1.0
gradient_allreduce_op "mean"
sparse_gradients false
disable_allgather false
gradient_clipping 0.0
graph_harvesting false
use_data_before_expert_parallelism false
sequence_parallel_size 1
fp16.enabled false
fp16.auto_cast false
fp16.loss_scale 0
fp16.initial_scale_power 16
fp16.loss_scale_window 1000
fp16.hysteresis 2
fp16.consecutive_hysteresis false
fp16.min_loss_scale 1
fp16.fp16_master_weights_and_grads false
bf16.enabled false
bf16.immediate_grad_update false
bf16.check_grad_overflow true
bf16.bf16_master_weights_and_grads false
bf16.bf16_optimizer_states false
bfloat16.enabled false
amp.enabled false
torch_autocast.enabled false
torch_autocast.dtype -
torch_autocast.lower_precision_safe_modules -
data_types.grad_accum_dtype -
data_types.param_dtype -
data_types.buffer_dtype -
zero_optimization.stage 0
zero_optimization.contiguous_gradients true
zero_optimization.reduce_scatter true
zero_optimization.reduce_bucket_size 500000000
zero_optimization.use_multi_rank_bucket_allreduce true
zero_optimization.allgather_partitions true
zero_optimization.allgather_bucket_size 500000000
zero_optimization.overlap_comm false
zero_optimization.load_from_fp32_weights true
zero_optimization.elastic_checkpoint false
zero_optimization.offload_param -
zero_optimization.offload_optimizer -
zero_optimization.sub_group_size 1000000000
zero_optimization.cpu_offload_param -
zero_optimization.cpu_offload_use_pin_memory -
zero_optimization.cpu_offload -
zero_optimization.prefetch_bucket_size 50000000
zero_optimization.stage3_prefetch_bucket_size 50000000
zero_optimization.param_persistence_threshold 100000
zero_optimization.stage3_param_persistence_threshold 100000
zero_optimization.model_persistence_threshold 9223372036854775807
zero_optimization.stage3_model_persistence_threshold 9223372036854775807
zero_optimization.max_live_parameters 1000000000
zero_optimization.stage3_max_live_parameters 1000000000
zero_optimization.max_reuse_distance 1000000000
zero_optimization.stage3_max_reuse_distance 1000000000
zero_optimization.gather_16bit_weights_on_model_save false
zero_optimization.stage3_gather_16bit_weights_on_model_save false
zero_optimization.stage3_gather_fp16_weights_on_model_save false
zero_optimization.ignore_unused_parameters true
zero_optimization.legacy_stage1 false
zero_optimization.round_robin_gradients false
zero_optimization.zero_hpz_partition_size 1
zero_optimization.zero_quantized_weights false
zero_optimization.zero_quantized_nontrainable_weights false
zero_optimization.zero_quantized_gradients false
zero_optimization.mics_shard_size -1
zero_optimization.mics_hierarchical_params_gather false
zero_optimization.memory_efficient_linear true
zero_optimization.pipeline_loading_checkpoint false
zero_optimization.override_module_apply true
zero_optimization.grad_hooks true
zero_optimization.use_all_reduce_for_fetch_params false
zero_optimization.stage3_use_all_reduce_for_fetch_params false
zero_optimization.module_granularity_threshold 0
zero_optimization.stage3_module_granularity_threshold 0
zero_optimization.zeropp_loco_param -
zero_optimization.zeropp_loco_param.err_beta 0.8
zero_optimization.zeropp_loco_param.reset_T 1024
zero_optimization.log_trace_cache_warnings false
zero_optimization.zenflow -
zero_optimization.enable_sanity_checks false
zero_optimization.leaf_module.classes ...
zero_optimization.leaf_module.names []
zero_optimization.leaf_module.name_suffixes []
zero_optimization.allgather_sequential false
zero_optimization.stage3_allgather_sequential false
zero_optimization.save_muon_momentum_buffer_in_memory false
zero_optimization.offload_param.device "none"
zero_optimization.offload_param.nvme_path -
zero_optimization.offload_param.buffer_count 5
zero_optimization.offload_param.buffer_size 100000000
zero_optimization.offload_param.max_in_cpu 1000000000
zero_optimization.offload_param.pin_memory false
zero_optimization.offload_optimizer.device "none"
zero_optimization.offload_optimizer.nvme_path -
zero_optimization.offload_optimizer.buffer_count 4
zero_optimization.offload_optimizer.pin_memory false
zero_optimization.offload_optimizer.pipeline_read false
zero_optimization.offload_optimizer.pipeline_write false
zero_optimization.offload_optimizer.fast_init false
zero_optimization.offload_optimizer.ratio 1.0
zero_optimization.offload_optimizer.super_offload false
zero_optimization.offload_optimizer.cpuadam_cores_perc 0.8
zero_optimization.zenflow.topk_ratio 0.1
zero_optimization.zenflow.select_strategy "auto"
zero_optimization.zenflow.select_interval "auto"
zero_optimization.zenflow.update_interval "auto"
zero_optimization.zenflow.overlap_step false
zero_optimization.zenflow.offload false
zero_optimization.zenflow.auto_ratio 0.99
zero_optimization.zenflow.full_warm_up_rounds 0
zero_optimization.zenflow.pt_reserved_cores_perc 0.5
zero_optimization.zenflow.steps_per_epoch -
allgather_size 500000000
activation_checkpointing.partition_activations false
activation_checkpointing.cpu_checkpointing false
activation_checkpointing.contiguous_memory_optimization false
activation_checkpointing.number_checkpoints -
activation_checkpointing.synchronize_checkpoint_boundary false
activation_checkpointing.profile false
flops_profiler.enabled false
flops_profiler.recompute_fwd_factor 0.0
flops_profiler.profile_step 1
flops_profiler.module_depth -1
flops_profiler.top_modules 1
flops_profiler.detailed true
flops_profiler.output_file -
comms_logger.enabled false
comms_logger.verbose false
comms_logger.prof_all true
comms_logger.debug false
comms_logger.prof_ops []
steps_per_print 10
wall_clock_breakdown false
memory_breakdown false
dump_state false
timers.throughput.enabled true
timers.throughput.synchronized true
log_level -
tensorboard.enabled false
tensorboard.output_path ""
tensorboard.job_name "DeepSpeedJobName"
csv_monitor.enabled false
csv_monitor.output_path ""
csv_monitor.job_name "DeepSpeedJobName"
wandb.enabled false
wandb.group -
wandb.team -
wandb.project "deepspeed"
comet.enabled false
comet.samples_log_interval 100
comet.project -
comet.workspace -
comet.api_key -
comet.experiment_name -
comet.experiment_key -
comet.online -
comet.mode -
autotuning.enabled false
autotuning.fast true
autotuning.results_dir "autotuning_results"
autotuning.exps_dir "autotuning_exps"
autotuning.overwrite true
autotuning.start_profile_step 3
autotuning.end_profile_step 5
autotuning.metric "throughput"
autotuning.metric_path -
autotuning.tuner_type "gridsearch"
autotuning.tuner_early_stopping 5
autotuning.tuner_num_trials 50
autotuning.arg_mappings -
autotuning.model_info.profile false
autotuning.model_info.num_params -
autotuning.model_info.hidden_size -
autotuning.model_info.num_layers -
autotuning.model_info_path -
autotuning.mp_size 1
autotuning.max_train_batch_size -
autotuning.min_train_batch_size 1
autotuning.max_train_micro_batch_size_per_gpu 1024
autotuning.min_train_micro_batch_size_per_gpu 1
autotuning.num_tuning_micro_batch_sizes 3
checkpoint.tag_validation "WARN"
checkpoint.load_universal false
checkpoint.use_node_local_storage false
checkpoint.parallel_write.pipeline_stage false
checkpoint.checkpoint_serialization true
checkpoint.writer -
checkpoint.writer.type "FAST"
checkpoint.writer.io_buffer_size 67108864
checkpoint.writer.io_buffer_double true
checkpoint.writer.io_multiplier 1
checkpoint.writer.show_statistics false
checkpoint.writer.data_parallel -
checkpoint.writer.decoupled false
aio.block_size 1048576
aio.queue_depth 8
aio.thread_count -
aio.intra_op_parallelism 1
aio.single_submit false
aio.overlap_events true
aio.use_gds false
nebula.enabled false
nebula.nebula_load_path -
nebula.enable_nebula_load true
nebula.persistent_storage_path -
nebula.persistent_time_interval 100
nebula.num_of_version_in_retention 2
datastates_ckpt -
datastates_ckpt.host_cache_size -
elasticity.enabled false
elasticity.max_train_batch_size 2000
elasticity.micro_batch_sizes [2, 4, 6]
elasticity.min_gpus 1
elasticity.max_gpus 10000
elasticity.min_time 0
elasticity.prefer_larger_batch true
elasticity.prefer_large_batch true
elasticity.ignore_non_elastic_batch_info false
elasticity.version 0.2
elasticity.num_gpus_per_node 1
elasticity.model_parallel_size 1
data_efficiency.enabled false
data_efficiency.seed 1234
data_efficiency.data_sampling.enabled false
data_efficiency.data_sampling.num_epochs 1000
data_efficiency.data_sampling.num_workers 0
data_efficiency.data_sampling.pin_memory false
data_efficiency.data_sampling.curriculum_learning.enabled false
data_efficiency.data_sampling.curriculum_learning.data_cluster_path -
data_efficiency.data_sampling.curriculum_learning.curriculum_metrics -
data_efficiency.data_sampling.curriculum_learning.curriculum_metrics.<name>.index_to_sample_path -
data_efficiency.data_sampling.curriculum_learning.curriculum_metrics.<name>.index_to_metric_path -
data_efficiency.data_sampling.curriculum_learning.curriculum_metrics.<name>.difficulty_type -
data_efficiency.data_sampling.curriculum_learning.curriculum_metrics.<name>.clustering_type -
data_efficiency.data_sampling.curriculum_learning.curriculum_metrics.<name>.min_difficulty -
data_efficiency.data_sampling.curriculum_learning.curriculum_metrics.<name>.max_difficulty -
data_efficiency.data_sampling.curriculum_learning.curriculum_metrics.<name>.schedule_type -
data_efficiency.data_sampling.curriculum_learning.curriculum_metrics.<name>.schedule_config.total_curriculum_step -
data_efficiency.data_sampling.curriculum_learning.curriculum_metrics.<name>.schedule_config.difficulty_step -
data_efficiency.data_sampling.curriculum_learning.curriculum_metrics.<name>.schedule_config.root_degree -
data_efficiency.data_sampling.curriculum_learning.curriculum_metrics.<name>.schedule_config.difficulty -
data_efficiency.data_sampling.curriculum_learning.curriculum_metrics.<name>.schedule_config.max_step -
data_efficiency.data_sampling.dynamic_batching.enabled false
data_efficiency.data_sampling.dynamic_batching.metrics_path -
data_efficiency.data_sampling.dynamic_batching.max_tokens -
data_efficiency.data_sampling.dynamic_batching.lr_scaling_method "linear"
data_efficiency.data_sampling.dynamic_batching.min_batch_size 1
data_efficiency.data_sampling.dynamic_batching.max_batch_size -
data_efficiency.data_sampling.dynamic_batching.sequence_picking_order "dataloader"
data_efficiency.data_sampling.dynamic_batching.verbose false
data_efficiency.data_routing.enabled false
data_efficiency.data_routing.random_ltd.enabled false
data_efficiency.data_routing.random_ltd.total_layer_num -
data_efficiency.data_routing.random_ltd.random_ltd_layer_num -
data_efficiency.data_routing.random_ltd.random_ltd_layer_id -
data_efficiency.data_routing.random_ltd.model_mask_name -
data_efficiency.data_routing.random_ltd.model_type -
data_efficiency.data_routing.random_ltd.hidden_state_order -
data_efficiency.data_routing.random_ltd.micro_batch_size -
data_efficiency.data_routing.random_ltd.global_batch_size -
data_efficiency.data_routing.random_ltd.random_ltd_schedule.min_value -
data_efficiency.data_routing.random_ltd.random_ltd_schedule.max_value -
data_efficiency.data_routing.random_ltd.random_ltd_schedule.schedule_type "fixed_linear"
data_efficiency.data_routing.random_ltd.random_ltd_schedule.schedule_config.require_steps -
data_efficiency.data_routing.random_ltd.random_ltd_schedule.schedule_config.seq_per_step -
data_efficiency.data_routing.random_ltd.layer_token_lr_schedule.enabled false
data_efficiency.data_routing.random_ltd.layer_token_lr_schedule.total_layer_tokens -
data_efficiency.data_routing.random_ltd.layer_token_lr_schedule.warmup_type -
data_efficiency.data_routing.random_ltd.layer_token_lr_schedule.warmup_layer_tokens -
curriculum_learning.enabled false
curriculum_learning.curriculum_type -
curriculum_learning.min_difficulty -
curriculum_learning.max_difficulty -
curriculum_learning.schedule_type -
curriculum_learning.schedule_config.total_curriculum_step -
curriculum_learning.schedule_config.difficulty_step -
curriculum_learning.schedule_config.root_degree -
curriculum_learning.schedule_config.difficulty -
curriculum_learning.schedule_config.max_step -
compression_training.layer_reduction.enabled false
compression_training.layer_reduction.keep_number_layer -
compression_training.layer_reduction.module_name_prefix -
compression_training.layer_reduction.teacher_layer -
compression_training.layer_reduction.other_module_name -
compression_training.weight_quantization.shared_parameters.enabled false
compression_training.weight_quantization.shared_parameters.quantizer_kernel false
compression_training.weight_quantization.shared_parameters.schedule_offset 0
compression_training.weight_quantization.shared_parameters.quantize_groups 1
compression_training.weight_quantization.shared_parameters.quantize_verbose false
compression_training.weight_quantization.shared_parameters.quantization_type "symmetric"
compression_training.weight_quantization.shared_parameters.quantize_weight_in_forward false
compression_training.weight_quantization.shared_parameters.rounding "nearest"
compression_training.weight_quantization.shared_parameters.fp16_mixed_quantize.enabled false
compression_training.weight_quantization.shared_parameters.fp16_mixed_quantize.quantize_change_ratio 0.001
compression_training.weight_quantization.different_groups.<name>.params.start_bits -
compression_training.weight_quantization.different_groups.<name>.params.target_bits -
compression_training.weight_quantization.different_groups.<name>.params.quantization_period 1
compression_training.weight_quantization.different_groups.<name>.modules ["*"]
compression_training.activation_quantization.shared_parameters.enabled false
compression_training.activation_quantization.shared_parameters.quantization_type "symmetric"
compression_training.activation_quantization.shared_parameters.range_calibration "dynamic"
compression_training.activation_quantization.shared_parameters.schedule_offset 1000
compression_training.activation_quantization.different_groups.<name>.params.bits -
compression_training.activation_quantization.different_groups.<name>.modules ["*"]
compression_training.sparse_pruning.shared_parameters.enabled false
compression_training.sparse_pruning.shared_parameters.method "l1"
compression_training.sparse_pruning.shared_parameters.schedule_offset 1000
compression_training.sparse_pruning.shared_parameters.schedule_offset_end -
compression_training.sparse_pruning.shared_parameters.schedule_offset_stride 1
compression_training.sparse_pruning.shared_parameters.block_pattern "4x1"
compression_training.sparse_pruning.shared_parameters.dense_ratio 0.1
compression_training.sparse_pruning.shared_parameters.excluded_modules []
compression_training.sparse_pruning.different_groups.<name>.params.dense_ratio -
compression_training.sparse_pruning.different_groups.<name>.modules ["*"]
compression_training.row_pruning.shared_parameters.enabled false
compression_training.row_pruning.shared_parameters.method "l1"
compression_training.row_pruning.shared_parameters.schedule_offset 1000
compression_training.row_pruning.different_groups.<name>.params.dense_ratio -
compression_training.row_pruning.different_groups.<name>.modules ["*"]
compression_training.row_pruning.different_groups.<name>.related_modules -
compression_training.head_pruning.shared_parameters.enabled false
compression_training.head_pruning.shared_parameters.method "topk"
compression_training.head_pruning.shared_parameters.schedule_offset 1000
compression_training.head_pruning.shared_parameters.num_heads -
compression_training.head_pruning.different_groups.<name>.params.dense_ratio -
compression_training.head_pruning.different_groups.<name>.modules ["*"]
compression_training.head_pruning.different_groups.<name>.related_modules -
compression_training.channel_pruning.shared_parameters.enabled false
compression_training.channel_pruning.shared_parameters.method "l1"
compression_training.channel_pruning.shared_parameters.schedule_offset 1000
compression_training.channel_pruning.different_groups.<name>.params.dense_ratio -
compression_training.channel_pruning.different_groups.<name>.modules ["*"]
compression_training.channel_pruning.different_groups.<name>.related_modules -
progressive_layer_drop.enabled false
progressive_layer_drop.theta 1.0
progressive_layer_drop.gamma 0.001
quantize_training.enabled false
quantize_training.quantize_verbose false
quantize_training.quantizer_kernel false
quantize_training.quantize_type "symmetric"
quantize_training.quantize_groups 1
quantize_training.quantize_bits.start_bits 16
quantize_training.quantize_bits.target_bits 16
quantize_training.quantize_schedule.quantize_period 100
quantize_training.quantize_schedule.schedule_offset 100
quantize_training.quantize_algo.q_type "symmetric"
quantize_training.quantize_algo.rounding "nearest"
quantize_training.fp16_mixed_quantize.enabled false
quantize_training.eigenvalue.enabled false
quantize_training.eigenvalue.verbose false
quantize_training.eigenvalue.max_iter 100
quantize_training.eigenvalue.tol 0.01
quantize_training.eigenvalue.stability 0.000001
quantize_training.eigenvalue.gas_boundary_resolution 1
quantize_training.eigenvalue.layer_name "bert.encoder.layer"
quantize_training.eigenvalue.layer_num 0
weight_quantization -
weight_quantization.enabled true
weight_quantization.num_bits 8
weight_quantization.q_type "symmetric"
weight_quantization.q_groups 1
weight_quantization.quantized_initialization {}
weight_quantization.post_init_quant {}
pipeline.stages "auto"
pipeline.partition "best"
pipeline.seed_layers false
pipeline.activation_checkpoint_interval 0
pipeline.pipe_partitioned true
pipeline.grad_partitioned true
hybrid_engine.enabled false
hybrid_engine.max_out_tokens 512
hybrid_engine.inference_tp_size 1
hybrid_engine.release_inference_cache false
hybrid_engine.pin_parameters true
hybrid_engine.tp_gather_partition_size 8
hybrid_engine.enable_cuda_graph false
compile.enabled false
compile.backend "inductor"
compile.kwargs {}
compile.deepcompile false
compile.free_activation false
compile.offload_activation false
compile.offload_opt_states false
compile.symmetric_memory false
compile.debug_log false
compile.offload_parameters false
compile.sync_before_reduce false
compile.sync_after_reduce false
compile.sync_before_allgather false
compile.sync_after_allgather false
compile.double_buffer true
compile.keep_int_input_tensors true
compile.keep_all_input_tensors false
compile.free_activation_threshold 10485760
compile.passes -
compile.offload_activation_pin_memory true
sparse_attention -
sparse_attention.mode "fixed"
sparse_attention.block 16
sparse_attention.different_layout_per_head false
sparse_attention.num_local_blocks 4
sparse_attention.num_global_blocks 1
sparse_attention.attention "bidirectional"
sparse_attention.horizontal_global_attention false
sparse_attention.num_different_global_patterns 1
sparse_attention.num_random_blocks 0
sparse_attention.local_window_blocks [4]
sparse_attention.global_block_indices [0]
sparse_attention.global_block_end_indices -
sparse_attention.num_sliding_window_blocks 3
tensor_parallel.dtype "fp16"
tensor_parallel.autotp_size 0
tensor_parallel.tensor_parallel.tp_size 1
tensor_parallel.tp.tp_size 1
tensor_parallel.tensor_parallel.tp_grain_size 1
tensor_parallel.tensor_parallel.mpu -
tensor_parallel.tensor_parallel.tp_group -
tensor_parallel.injection_policy_tuple -
tensor_parallel.keep_module_on_host false
tensor_parallel.replace_with_kernel_inject false
tensor_parallel.kernel_inject false
tensor_parallel.tp_overlap_comm false
tensor_parallel.preset_model -
tensor_parallel.partition_config -
tensor_parallel.partition_config.use_default_specs true
tensor_parallel.partition_config.strict_mode false
tensor_parallel.partition_config.layer_specs []
tensor_parallel.partition_config.layer_specs.<i>.patterns []
tensor_parallel.partition_config.layer_specs.<i>.partition_type "column"
tensor_parallel.partition_config.layer_specs.<i>.shape -
tensor_parallel.partition_config.layer_specs.<i>.partition_dim -
tensor_parallel.partition_config.layer_specs.<i>.model_types -
tensor_parallel.partition_config.layer_specs.<i>.gather_output false
tensor_parallel.partition_config.layer_specs.<i>.grad_allreduce false
expert_parallel.enabled false
expert_parallel.autoep_size 1
expert_parallel.expert_tensor_parallel_size 1
expert_parallel.preset_model -
expert_parallel.moe_layer_pattern -
expert_parallel.router_pattern -
expert_parallel.expert_pattern -
expert_parallel.use_grouped_mm true
expert_parallel.disable_triton_grouped_mm false
expert_parallel.score_func "auto"
expert_parallel.score_apply "auto"
expert_parallel.combine_impl "auto"
expert_parallel.route_norm -
expert_parallel.route_scale 1.0
expert_parallel.routed_scaling_factor "auto"
expert_parallel.top_k "auto"
expert_parallel.num_expert_groups -
expert_parallel.num_limited_groups -
expert_parallel.load_balance_coeff -
expert_parallel.expert_w1 -
expert_parallel.expert_w2 -
expert_parallel.expert_w3 -
expert_parallel.num_experts_attr -
expert_parallel.top_k_attr -
expert_parallel.has_shared_experts -
expert_parallel.shared_experts_pattern -
expert_parallel.shared_experts_gate_pattern -
expert_parallel.validate_folding_routing false
"""

# Keys of this implementation, which the documents do not have.
OWN_KEYS = {"strict", "verify_gradients", "fp16.consecutive_skip_limit"}
ENTRIES = [tuple(line.split(" ", 1)) for line in KEYS.strip().splitlines()]


def find(place: str) -> tuple[type[DeepSpeedConfigModel], str]:
    """The model and field of a place, where aliases count."""
    model: type[DeepSpeedConfigModel] = DeepSpeedConfigDocument
    *path, last = place.split(".")
    for part in path:
        if part in ("<name>", "<i>"):
            continue
        nested = nested_model(model, field_names(model)[part])
        assert nested is not None, place
        model = nested[1]
    return model, last


@pytest.mark.parametrize(("place", "default"), ENTRIES, ids=[place for place, _ in ENTRIES])
def test_documented_key_has_its_documented_default(place, default):
    model, last = find(place)
    assert last in field_names(model), f"{place} is missing; known: {sorted(field_names(model))}"
    if place == "zero_optimization.overlap_comm":
        assert model().overlap_comm is False and model(stage=3).overlap_comm is True
        return
    value = model.model_fields[field_names(model)[last]].get_default(call_default_factory=True)
    if isinstance(value, torch.dtype):
        value = {torch.float32: "fp32", torch.float16: "fp16"}[value]
    if isinstance(value, Enum):
        value = value.value
    if default == "-":
        assert value is None or repr(value) == "PydanticUndefined"
    elif default == "...":
        assert len(value) == 3 and all("SparseMoeBlock" in name for name in value)
    else:
        assert value == json.loads(default) and type(value) is not type(None)


def test_no_key_is_undocumented():
    known = {place for place, _ in ENTRIES} | OWN_KEYS
    for place, model, name in walk_fields(DeepSpeedConfigDocument):
        if nested_model(model, name) is not None and any(k.startswith(place + ".") for k in known):
            continue
        # The generic group and mixture models have a few keys more than the documents give each method.
        extra = r"\.related_modules$|fp16_mixed_quantize\.quantize_change_ratio$"
        assert place in known or re.search(extra, place), place


def test_every_key_has_a_description_and_a_release():
    for place, model, name in walk_fields(DeepSpeedConfigDocument):
        assert model.model_fields[name].description, place
        assert facts_of(model, name).since, place


def test_a_document_with_every_key_is_read():
    """Each documented name, aliases too, one at a time, at its default: no error, nothing unknown."""
    for place, default in ENTRIES:
        if default in ("-", "..."):
            continue
        value = json.loads(default)
        for part in reversed(place.split(".")):
            value = [value] if part == "<i>" else {part: value}
        if "<name>" in place or place.startswith("compression_training."):
            continue  # these sections have required keys beside; see below
        _, report = parse_document(value)
        assert not report.unknown, (place, report.unknown)


def test_sections_with_required_keys_are_read():
    groups = {"g1": {"params": {"dense_ratio": 0.5}, "modules": ["a", "b"], "related_modules": [["c"]]}}
    pruning = {"shared_parameters": {"enabled": True, "schedule_offset": 5}, "different_groups": groups}
    document, report = parse_document(
        {
            "compression_training": {
                "layer_reduction": {"enabled": True, "keep_number_layer": 2, "teacher_layer": [1, 3]},
                "weight_quantization": {
                    "shared_parameters": {"enabled": True, "fp16_mixed_quantize": {"enabled": True}},
                    "different_groups": {"w": {"params": {"start_bits": 8, "target_bits": 4}}},
                },
                "activation_quantization": {
                    "shared_parameters": {"enabled": True},
                    "different_groups": {"a": {"params": {"bits": 8}, "modules": "attention"}},
                },
                "sparse_pruning": pruning,
                "row_pruning": pruning,
                "channel_pruning": pruning,
                "head_pruning": {
                    "shared_parameters": {"enabled": True, "num_heads": 12},
                    "different_groups": groups,
                },
            },
            "data_efficiency": {
                "data_sampling": {
                    "curriculum_learning": {
                        "enabled": True,
                        "curriculum_metrics": {
                            "seqlen": {
                                "difficulty_type": "value",
                                "schedule_type": "fixed_root",
                                "schedule_config": {"total_curriculum_step": 1e4, "root_degree": 2},
                            }
                        },
                    }
                }
            },
            "tensor_parallel": {"partition_config": {"layer_specs": [{"patterns": ["q_proj"], "shape": [2, -1]}]}},
        }
    )
    assert not report.unknown
    compression = document.compression_training
    assert compression.activation_quantization.different_groups["a"].modules == ["attention"]
    assert compression.weight_quantization.different_groups["w"].modules == ["*"]
    assert compression.row_pruning.different_groups["g1"].params.dense_ratio == 0.5
    metric = document.data_efficiency.data_sampling.curriculum_learning.curriculum_metrics["seqlen"]
    assert metric.schedule_config.total_curriculum_step == 10_000
    assert document.tensor_parallel.partition_config.layer_specs[0].patterns == ["q_proj"]


def test_typos_deep_inside_maps_and_lists_are_found():
    _, report = parse_document(
        {
            "data_efficiency": {
                "data_sampling": {"curriculum_learning": {"curriculum_metrics": {"m": {"min_dificulty": 1}}}}
            },
            "tensor_parallel": {"partition_config": {"layer_specs": [{}, {"paterns": []}]}},
        }
    )
    assert report.unknown == [
        (
            "data_efficiency.data_sampling.curriculum_learning.curriculum_metrics.m.min_dificulty",
            "; did you mean 'data_efficiency.data_sampling.curriculum_learning.curriculum_metrics.m.min_difficulty'?",
        ),
        (
            "tensor_parallel.partition_config.layer_specs.1.paterns",
            "; did you mean 'tensor_parallel.partition_config.layer_specs.1.patterns'?",
        ),
    ]


def test_the_committed_reference_is_current():
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, str(root / "scripts" / "make_config_reference.py"), "--check"],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
