"""Settings whose feature is missing are refused; settings without effect are said once; the rest is silent."""

from __future__ import annotations

import pytest
import torch

from deepspeed.errors import ConfigError, MissingFeatureError
from deepspeed.runtime.config import DeepSpeedConfig, parse_document
from deepspeed.runtime.config_schema import DeepSpeedConfigDocument
from deepspeed.runtime.config_utils import nested_model, walk_fields
from deepspeed.runtime.feature_gates import GATES, closed_gates
from tests.unit.config_helpers import warnings_said

BASE = {"train_batch_size": 8}

# One value that asks for the feature, for each gate; with what else must be there for the value to be valid.
ASKING: dict[str, object] = {
    "zero_optimization.stage": 3,
    "zero_optimization.offload_param.device": {"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}},
    "zero_optimization.offload_optimizer.super_offload": {
        "zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu", "super_offload": True}}
    },
    "checkpoint.writer.type": "MOCK",
    "checkpoint.writer.data_parallel": "REPLICA",
    "zero_optimization.zero_hpz_partition_size": 8,
    "zero_optimization.zeropp_loco_param": {},
    "zero_optimization.mics_shard_size": 2,
    "zero_optimization.zenflow": {},
    "bf16.bf16_optimizer_states": {"bf16": {"bf16_optimizer_states": True, "bf16_master_weights_and_grads": True}},
    "data_types.param_dtype": "bf16",
    "data_types.buffer_dtype": "bf16",
    "gradient_allreduce_op": "sum",
    "managed_gradient_accumulation": False,
    "sequence_parallel_size": 2,
    "tensor_parallel.autotp_size": 2,
    "tensor_parallel.tensor_parallel.tp_size": 2,
    "pipeline.*": {"pipeline": {"stages": 2}},
    "checkpoint.checkpoint_serialization": False,
    "checkpoint.writer": {},
    "datastates_ckpt": {},
    "activation_checkpointing.*": {"activation_checkpointing": {"partition_activations": True}},
    "elasticity.enabled": {"elasticity": {"enabled": True, "max_train_batch_size": 9, "micro_batch_sizes": [3]}},
    "weight_quantization.enabled": {"weight_quantization": {}},
    "sparse_attention": {},
}
for _method, _shared, _params in (
    ("weight_quantization", {}, {"start_bits": 8, "target_bits": 4}),
    ("activation_quantization", {}, {"bits": 8}),
    ("sparse_pruning", {}, {"dense_ratio": 0.5}),
    ("row_pruning", {}, {"dense_ratio": 0.5}),
    ("head_pruning", {"num_heads": 4}, {"dense_ratio": 0.5}),
    ("channel_pruning", {}, {"dense_ratio": 0.5}),
):
    ASKING[f"compression_training.{_method}.shared_parameters.enabled"] = {
        "compression_training": {
            _method: {"shared_parameters": {"enabled": True, **_shared}, "different_groups": {"g": {"params": _params}}}
        }
    }


def document_asking(key: str) -> dict[str, object]:
    value = ASKING.get(key, True)
    top = key.partition(".")[0]
    if isinstance(value, dict) and top in value and key != top:
        return {**BASE, **value}
    for name in reversed(key.split(".")):
        value = {name: value}
    return {**BASE, **value}


def test_every_gate_names_a_key():
    places = {place for place, _, _ in walk_fields(DeepSpeedConfigDocument)}
    for gate in GATES:
        assert gate.key.removesuffix(".*") in places, gate.key
    assert len({gate.key for gate in GATES}) == len(GATES)


@pytest.mark.parametrize("gate", GATES, ids=lambda gate: gate.key)
def test_a_closed_gate_refuses_and_names_the_key(gate):
    with pytest.raises(MissingFeatureError) as caught:
        DeepSpeedConfig(document_asking(gate.key))
    message = str(caught.value)
    assert gate.key.removesuffix("*") in message and gate.feature in message and gate.instead in message
    assert isinstance(caught.value, NotImplementedError) and isinstance(caught.value, ConfigError)


def test_all_missing_features_are_listed_at_once():
    with pytest.raises(MissingFeatureError) as caught:
        DeepSpeedConfig({**BASE, "zero_optimization": {"stage": 1, "zenflow": {}}, "wandb": {"enabled": True}})
    assert "ZenFlow" in str(caught.value) and "wandb.enabled = True" in str(caught.value)


def test_keys_the_pipeline_section_keeps_are_gated_too():
    with pytest.raises(MissingFeatureError, match=r"pipeline\.mine = 3"):
        DeepSpeedConfig({**BASE, "pipeline": {"mine": 3}})


def test_nothing_is_gated_by_default():
    assert closed_gates(parse_document({})[0]) == []


def test_every_section_may_stand_with_its_defaults():
    """A document with every key at its default is accepted in silence: clients write whole sections."""

    def defaults(model):
        out = {}
        for name, field in model.model_fields.items():
            nested = nested_model(model, name)
            value = field.get_default(call_default_factory=True)
            out[name] = defaults(nested[1]) if nested is not None and value is not None else value
        return {name: value for name, value in out.items() if value is not None}

    raw = {**defaults(DeepSpeedConfigDocument), **BASE}
    for deprecated in ("allgather_size",):
        raw.pop(deprecated)
    raw["zero_optimization"].pop("stage3_gather_fp16_weights_on_model_save")
    with warnings_said() as said:
        DeepSpeedConfig(raw, world_size=1)
    assert said == []


def test_what_this_version_can_do_is_accepted_in_silence():
    raw = {
        "train_batch_size": 32,
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 4,
        "dataloader_drop_last": True,
        "steps_per_print": 5,
        "wall_clock_breakdown": True,
        "memory_breakdown": True,
        "dump_state": True,
        "gradient_clipping": 1.0,
        "prescale_gradients": True,
        "gradient_predivide_factor": 2.0,
        "communication_data_type": "fp32",
        "verify_gradients": 2,
        "zero_allow_untested_optimizer": True,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True, "adam_w_mode": True}},
        "scheduler": {"type": "WarmupDecayLR", "params": {"total_num_steps": 10}},
        "bf16": {"enabled": True, "check_grad_overflow": False},
        "fp16": {"enabled": False, "auto_cast": True, "loss_scale": 128, "consecutive_hysteresis": True},
        "torch_autocast": {"enabled": False, "lower_precision_safe_modules": ["torch.nn.Linear"]},
        "data_types": {"grad_accum_dtype": "fp32"},
        "checkpoint": {"tag_validation": "Fail"},
        "timers": {"throughput": {"enabled": False, "synchronized": False}},
        "zero_optimization": {
            "stage": 2,
            "contiguous_gradients": False,
            "reduce_scatter": False,
            "reduce_bucket_size": 1000,
            "use_multi_rank_bucket_allreduce": False,
            "allgather_partitions": False,
            "allgather_bucket_size": 1000,
            "overlap_comm": True,
            "load_from_fp32_weights": False,
            "ignore_unused_parameters": False,
        },
    }
    with warnings_said() as said:
        config = DeepSpeedConfig(raw, world_size=2)
    assert said == []
    assert config.batch == (32, 4, 4, 2) and config.communication_data_type is torch.float32


def test_settings_without_effect_are_said_once():
    raw = {
        **BASE,
        "vocabulary_size": 50257,
        "aio": {"queue_depth": 32, "block_size": 1048576},
        "bf16": {"immediate_grad_update": True},
        "zero_optimization": {
            "stage": 2,
            "elastic_checkpoint": True,
            "legacy_stage1": True,
            "sub_group_size": 1e6,
            "stage3_prefetch_bucket_size": 10,
            "stage3_max_live_parameters": 1e9,
            "stage3_gather_16bit_weights_on_model_save": False,
        },
    }
    with warnings_said() as said:
        for _ in range(2):
            DeepSpeedConfig(raw)
    for text in (
        "vocabulary_size = 50257 is not a multiple of 8",
        "aio.queue_depth has no effect without offload to NVMe",
        "bf16.immediate_grad_update = True has no effect",
        "zero_optimization.elastic_checkpoint = True has no effect",
        "zero_optimization.legacy_stage1 = True has no effect",
        "zero_optimization.sub_group_size has no effect below ZeRO stage 3",
        "zero_optimization.stage3_prefetch_bucket_size has no effect below ZeRO stage 3",
    ):
        assert sum(text in line for line in said) == 1, (text, said)
    assert len(said) == 7, said  # and none for values that are the default anyway


def test_offload_settings_without_effect_are_said():
    offload = {
        "device": "cpu",
        "nvme_path": "/nvme",
        "buffer_count": 4,
        "pipeline_read": True,
        "cpuadam_cores_perc": 0.5,
    }
    with warnings_said() as said:
        DeepSpeedConfig({**BASE, "zero_optimization": {"stage": 2, "offload_optimizer": offload}})
    place = "zero_optimization.offload_optimizer."
    assert sorted(said) == [
        f"{place}cpuadam_cores_perc has no effect without super_offload",
        f"{place}nvme_path has no effect without files (device is cpu)",
        f"{place}pipeline_read has no effect without files (device is cpu)",
    ]
    offload = {"device": "nvme", "nvme_path": "/nvme", "pipeline_read": True}
    with warnings_said() as said:
        DeepSpeedConfig(
            {**BASE, "aio": {"queue_depth": 4}, "zero_optimization": {"stage": 2, "offload_optimizer": offload}}
        )
    assert said == []


def test_auto_stage_3_keys_are_silent():
    zero = {"stage": 1, "stage3_prefetch_bucket_size": "auto", "stage3_param_persistence_threshold": "auto"}
    with warnings_said() as said:
        DeepSpeedConfig({**BASE, "zero_optimization": zero})
    assert said == []
