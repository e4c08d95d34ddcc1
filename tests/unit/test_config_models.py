"""The models: names, aliases, auto, deprecated keys, unknown keys, values, and the checks between keys."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from pydantic import ValidationError

from deepspeed._core.precision.dtypes import parse_dtype
from deepspeed.errors import ConfigError
from deepspeed.runtime.config import DeepSpeedConfig, parse_document
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig, OffloadDeviceEnum, ZeroStageEnum
from tests.unit.config_helpers import warnings_said

BASE = {"train_batch_size": 8}


def read(**keys):
    return DeepSpeedConfig({**BASE, **keys})


def refused(match, **keys):
    with pytest.raises(ConfigError, match=match):
        read(**keys)


# --- names ---------------------------------------------------------------------------------------------------------


def test_alias_and_field_name_both_work():
    for name in ("stage3_prefetch_bucket_size", "prefetch_bucket_size"):
        assert DeepSpeedZeroConfig(**{name: 7}).prefetch_bucket_size == 7
        assert parse_document({"zero_optimization": {name: 7}})[0].zero_optimization.prefetch_bucket_size == 7


def test_one_key_under_two_names():
    same = {"stage3_prefetch_bucket_size": 7, "prefetch_bucket_size": 7}
    assert parse_document({"zero_optimization": same})[0].zero_optimization.prefetch_bucket_size == 7
    refused(
        r"'zero_optimization\.stage3_prefetch_bucket_size' and 'zero_optimization\.prefetch_bucket_size'",
        zero_optimization={"stage3_prefetch_bucket_size": 7, "prefetch_bucket_size": 8},
    )


def test_bfloat16_is_bf16_and_bf16_wins():
    assert read(bfloat16={"enabled": True}).bf16.enabled
    assert not read(bf16={"enabled": False}, bfloat16={"enabled": True}).bf16.enabled


def test_assignment_is_validated():
    zero = DeepSpeedZeroConfig(stage=2)
    zero.reduce_bucket_size = 1e6
    assert zero.reduce_bucket_size == 1_000_000
    with pytest.raises(ValidationError):
        zero.reduce_bucket_size = -1
    with pytest.raises(ValidationError):
        zero.stage = 9


# --- auto and null -------------------------------------------------------------------------------------------------


def test_auto_means_default_everywhere():
    config = read(
        gradient_clipping="auto",
        train_micro_batch_size_per_gpu="auto",
        bf16={"enabled": "auto"},
        fp16="auto",
        zero_optimization={"stage": "auto", "reduce_bucket_size": "auto", "offload_optimizer": {"device": "auto"}},
        optimizer={"type": "AdamW", "params": {"lr": "auto", "weight_decay": 0.1, "betas": "auto"}},
        scheduler={"type": "WarmupLR", "params": {"warmup_num_steps": "auto", "warmup_type": "linear"}},
    )
    assert config.gradient_clipping == 0.0
    assert config.train_micro_batch_size_per_gpu is None
    assert not config.bf16.enabled and not config.fp16.enabled
    assert config.zero_config == DeepSpeedZeroConfig(offload_optimizer={})
    assert config.optimizer.params == {"weight_decay": 0.1}
    assert config.scheduler.params == {"warmup_type": "linear"}
    assert config.origin("zero_optimization.stage") == "auto, so the default"
    assert not config.given("zero_optimization.reduce_bucket_size")


def test_a_null_section_is_an_absent_one():
    assert read(fp16=None, zero_optimization={"offload_param": None, "leaf_module": None}).document == read().document


def test_the_users_dict_is_not_changed():
    raw = {
        **BASE,
        "zero_optimization": {"stage": 1, "stage3_max_live_parameters": "auto", "cpu_offload": False, "typo_here": 1},
        "optimizer": {"type": "Adam", "params": {"lr": "auto", "max_grad_norm": 1.0}},
        "bfloat16": {"enabled": True},
    }
    before = copy.deepcopy(raw)
    config = DeepSpeedConfig(raw, world_size=2)
    config.describe()
    assert raw == before and config.raw is raw


# --- deprecated keys -----------------------------------------------------------------------------------------------


def test_deprecated_keys_move_their_value_with_one_warning():
    with warnings_said() as said:
        for _ in range(3):
            config = read(zero_optimization={"stage3_gather_fp16_weights_on_model_save": True, "stage": 0})
    assert config.zero_config.gather_16bit_weights_on_model_save
    place = "zero_optimization.stage3_gather_fp16_weights_on_model_save"
    assert [line for line in said if place in line and "deprecated" in line] == [
        f"{place} is deprecated; write zero_optimization.gather_16bit_weights_on_model_save instead."
    ]
    place = "zero_optimization.gather_16bit_weights_on_model_save"
    assert config.origin(place) == "forwarded from zero_optimization.stage3_gather_fp16_weights_on_model_save"
    assert config.given(place)


def test_cpu_offload_forwards():
    zero = parse_document({"zero_optimization": {"stage": 2, "cpu_offload": True}})[0].zero_optimization
    assert zero.offload_optimizer.device == OffloadDeviceEnum.cpu
    zero = parse_document({"zero_optimization": {"stage": 3, "cpu_offload_param": True}})[0].zero_optimization
    assert zero.offload_param.device == OffloadDeviceEnum.cpu
    zero = parse_document({"zero_optimization": {"stage": 2, "cpu_offload": False}})[0].zero_optimization
    assert zero.offload_optimizer is None


def test_deprecated_and_new_key_together_are_an_error():
    refused(
        r"cpu_offload is deprecated for zero_optimization\.offload_optimizer, and both are set",
        zero_optimization={"stage": 2, "cpu_offload": True, "offload_optimizer": {"device": "none"}},
    )
    refused("both are set", seq_parallel_comm_data_type="bf16", seq_parallel_communication_data_type="fp32")
    refused("both are set", aio={"thread_count": 2, "intra_op_parallelism": 2})


def test_a_bad_deprecated_value_is_named():
    refused(r"zero_optimization\.cpu_offload: expected true or false", zero_optimization={"cpu_offload": "cpu"})


def test_other_deprecated_keys():
    with warnings_said() as said:
        document, _ = parse_document({"seq_parallel_comm_data_type": "bf16", "aio": {"thread_count": 4}})
        read(zero_optimization={"cpu_offload_use_pin_memory": True})
    assert document.seq_parallel_communication_data_type == torch.bfloat16
    assert document.aio.intra_op_parallelism == 4
    assert any("cpu_offload_use_pin_memory is deprecated and has no effect" in line for line in said)


def test_boolean_zero_optimization():
    with warnings_said() as said:
        config = read(zero_optimization=True, allgather_size=1e6)
    assert config.zero_optimization_stage == ZeroStageEnum.optimizer_states
    assert config.zero_config.allgather_bucket_size == 1_000_000
    assert sum("zero_optimization: true is deprecated" in line for line in said) == 1
    assert read(zero_optimization=True).zero_config.allgather_bucket_size == 500_000_000
    assert read(zero_optimization=False).zero_optimization_stage == ZeroStageEnum.disabled


# --- unknown keys --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"gradient_cliping": 1}, "'gradient_cliping' is ignored; did you mean 'gradient_clipping'?"),
        ({"Gradient-Clipping": 1}, "'Gradient-Clipping' is ignored; did you mean 'gradient_clipping'?"),
        ({"fp16": {"los_scale": 1}}, "'fp16.los_scale' is ignored; did you mean 'fp16.loss_scale'?"),
        (
            {"zero_optimization": {"offload_optimizer": {"devise": "none"}}},
            "'zero_optimization.offload_optimizer.devise' is ignored; "
            "did you mean 'zero_optimization.offload_optimizer.device'?",
        ),
        ({"overlap_comm": True}, "'overlap_comm' is ignored; did you mean 'zero_optimization.overlap_comm'?"),
        (
            {"zero_optimization": {"aio": {}}},
            "'zero_optimization.aio' is ignored; did you mean 'aio' at the top level?",
        ),
        ({"qqq": 1}, "'qqq' is ignored; the keys of the top level are listed in docs/config-reference.md"),
    ],
)
def test_unknown_keys_warn_with_place_and_nearest_match(keys, message):
    with warnings_said() as said:
        read(**keys)
    assert said == [f"unknown config key {message}"]


def test_strict_refuses_all_unknown_keys_at_once():
    with pytest.raises(ConfigError) as caught:
        read(strict=True, gradient_cliping=1, fp16={"los_scale": 1})
    assert "'gradient_cliping'; did you mean 'gradient_clipping'?" in str(caught.value)
    assert "'fp16.los_scale'" in str(caught.value)


def test_unknown_keys_of_a_model_built_directly():
    with warnings_said() as said:
        zero = DeepSpeedZeroConfig(stage=1, stagee=2)
    assert zero.stage == 1
    assert said == ["unknown config key 'zero_optimization.stagee' is ignored; did you mean 'zero_optimization.stage'?"]


@pytest.mark.parametrize("strict", [False, True])
def test_keys_that_clients_write_are_passed_over(strict):
    with warnings_said() as said:
        config = read(
            strict=strict,
            msamp={"enabled": True, "opt_level": "O2"},
            inference={"tensor_parallel": {"tp_size": 2}},
            zero_force_ds_cpu_optimizer=False,
            **{
                "zero_optimization.reduce_bucket_size": 64.0,
                "zero_optimization.stage3_param_persistence_threshold": 640,
                "zero_optimization.stage3_prefetch_bucket_size": 57.6,
            },
        )
    assert said == [] and config.zero_config.reduce_bucket_size == 500_000_000


def test_a_dotted_key_of_no_section_is_unknown():
    with warnings_said() as said:
        read(**{"zero_optimisation.stage": 2})
    assert len(said) == 1 and "zero_optimisation.stage" in said[0]


def test_pipeline_and_amp_keep_further_keys():
    document, report = parse_document({"pipeline": {"mine": 3}, "amp": {"opt_level": "O1"}})
    assert document.pipeline.mine == 3 and document.amp.opt_level == "O1" and not report.unknown


# --- values --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", [500_000_000, 5e8, "5e8", "500000000", 500000000.0])
def test_integral_numbers_are_integers(given):
    value = DeepSpeedZeroConfig(reduce_bucket_size=given).reduce_bucket_size
    assert value == 500_000_000 and type(value) is int


def test_large_integral_numbers():
    zero = DeepSpeedZeroConfig(stage3_max_live_parameters=1e12, sub_group_size=1e9)
    assert (zero.max_live_parameters, zero.sub_group_size) == (10**12, 10**9)


@pytest.mark.parametrize("bad", [90.5, True, "many", float("nan"), math.inf, [1], None])
def test_other_values_are_not_integers(bad):
    refused(r"zero_optimization\.reduce_bucket_size", zero_optimization={"reduce_bucket_size": bad})
    if bad is not None:
        refused("train_micro_batch_size_per_gpu", train_micro_batch_size_per_gpu=bad)


@pytest.mark.parametrize(
    ("keys", "place"),
    [
        ({"train_batch_size": -8}, "train_batch_size"),
        ({"train_batch_size": 0}, "train_batch_size"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps"),
        ({"gradient_clipping": -1}, "gradient_clipping"),
        ({"gradient_clipping": True}, "gradient_clipping"),
        ({"gradient_predivide_factor": 0}, "gradient_predivide_factor"),
        ({"steps_per_print": -1}, "steps_per_print"),
        ({"verify_gradients": -1}, "verify_gradients"),
        ({"prescale_gradients": "yes"}, "prescale_gradients"),
        ({"zero_optimization": {"allgather_bucket_size": -1}}, "zero_optimization.allgather_bucket_size"),
        ({"zero_optimization": {"stage3_max_live_parameters": -1}}, "zero_optimization.stage3_max_live_parameters"),
        ({"zero_optimization": {"stage": 4}}, "zero_optimization.stage"),
        ({"zero_optimization": {"stage": "two"}}, "zero_optimization.stage"),
        ({"zero_optimization": {"overlap_comm": 3}}, "zero_optimization.overlap_comm"),
        ({"zero_optimization": 2}, "zero_optimization = 2: expected a section"),
        (
            {"zero_optimization": {"offload_optimizer": False}},
            "zero_optimization.offload_optimizer = False: expected a",
        ),
        (
            {"zero_optimization": {"offload_param": {"device": "disk"}}},
            "zero_optimization.offload_param.device = 'disk'",
        ),
        ({"fp16": {"loss_scale": -1}}, "fp16.loss_scale"),
        ({"fp16": {"loss_scale": True}}, "fp16.loss_scale"),
        ({"fp16": {"loss_scale": math.inf}}, "fp16.loss_scale"),
        ({"fp16": {"loss_scale_window": 0}}, "fp16: loss_scale_window must be above 0"),
        ({"fp16": {"min_loss_scale": 0}}, "fp16: min_loss_scale must be above 0"),
        ({"fp16": True}, "fp16 = True: expected a section"),
        ({"optimizer": "AdamW"}, "optimizer = 'AdamW': expected a section"),
        ({"optimizer": {"params": {"lr": 1}}}, "optimizer: params are given but no type"),
        ({"scheduler": {"params": {"total_num_steps": 1}}}, "scheduler: params are given but no type"),
        ({"scheduler": {"type": "warmuplr"}}, "did you mean 'WarmupLR'?"),
        ({"checkpoint": {"tag_validation": "maybe"}}, "checkpoint.tag_validation"),
        ({"communication_data_type": "fp8"}, "communication_data_type: unknown dtype 'fp8'"),
        ({"communication_data_type": "int8"}, "communication_data_type = 'int8': torch.int8 cannot be used here"),
        ({"communication_data_type": 16}, "communication_data_type: expected the name of a dtype"),
        ({"torch_autocast": {"dtype": "f16"}}, "torch_autocast.dtype"),
        ({"log_level": "loud"}, "log_level"),
        ({"comet": {"experiment_key": "short"}}, "comet.experiment_key"),
        ({"autotuning": {"start_profile_step": 9}}, "end_profile_step (5) lies before start_profile_step (9)"),
        ({"elasticity": {"enabled": True}}, "max_train_batch_size and micro_batch_sizes must be given"),
        ({"elasticity": {"version": 0.3}}, "elasticity: version is 0.1 or 0.2"),
        ({"expert_parallel": {"expert_tensor_parallel_size": 2}}, "expert_parallel.expert_tensor_parallel_size"),
        ({"fp16": {"enabled": True}, "bf16": {"enabled": True}}, "fp16 and bf16 are both enabled"),
        ({"bf16": {"bf16_optimizer_states": True}}, "needs bf16_master_weights_and_grads"),
        ({"amp": {"enabled": True}, "zero_optimization": {"stage": 1}}, "amp does not go with ZeRO"),
        ({"gradient_allreduce_op": "sum", "prescale_gradients": True}, "parts of a mean"),
        ({"zero_optimization": {"stage": 1, "offload_optimizer": {"device": "nvme"}}}, "offload_optimizer.nvme_path"),
        ({"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}}, "offload_param to cpu needs stage 3"),
        ({"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}, "needs stage 1, 2 or 3, and stage is 0"),
    ],
)
def test_bad_values_give_a_clear_error(keys, place):
    with pytest.raises(ConfigError) as caught:
        read(**keys)
    assert place in str(caught.value)


def test_every_bad_key_is_listed_in_one_error():
    with pytest.raises(ConfigError) as caught:
        read(train_batch_size=-1, fp16={"hysteresis": 0}, zero_optimization={"stage": 8})
    for place in ("train_batch_size", "fp16.hysteresis", "zero_optimization.stage"):
        assert place in str(caught.value)


@pytest.mark.parametrize("never", [math.inf, None, 0])
def test_steps_per_print_never(never):
    assert read(steps_per_print=never).steps_per_print is None


def test_steps_per_print_default_and_value():
    assert read().steps_per_print == 10
    assert read(steps_per_print=25).steps_per_print == 25


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_offload_sections_with_device_none_stand_at_every_stage(stage):
    none = {"device": "none", "nvme_path": None}
    zero = read(zero_optimization={"stage": stage, "offload_optimizer": none, "offload_param": dict(none)}).zero_config
    assert zero.offload_optimizer.device == zero.offload_param.device == "none"
    assert not zero.offload_optimizer.pipeline


def test_overlap_comm_depends_on_the_stage():
    assert DeepSpeedZeroConfig(stage=2).overlap_comm is False
    assert DeepSpeedZeroConfig(stage=3).overlap_comm is True
    assert DeepSpeedZeroConfig(stage=2, overlap_comm=True).overlap_comm is True


@pytest.mark.parametrize(
    ("spelling", "dtype"),
    [
        *((s, torch.float16) for s in ("fp16", "FP16", "float16", "half", "torch.float16", "torch.half")),
        *((s, torch.float32) for s in ("fp32", "float32", "float", "torch.float32")),
        *((s, torch.bfloat16) for s in ("bf16", "bfloat16", "torch.bfloat16", torch.bfloat16)),
        ("int8", torch.int8),
        (None, None),
    ],
)
def test_dtype_spellings(spelling, dtype):
    assert parse_dtype(spelling) is dtype


def test_dtypes_in_the_config():
    config = read(
        communication_data_type="FP32",
        data_types={"grad_accum_dtype": "bf16"},
        torch_autocast={"enabled": True, "dtype": "torch.float16"},
    )
    assert config.communication_dtype is torch.float32
    assert config.grad_accum_dtype is torch.bfloat16
    assert config.autocast_dtype is torch.float16
    assert read().communication_dtype is None and read().autocast_dtype is torch.bfloat16


def test_enums_are_what_checkpoints_expect():
    assert [int(stage) for stage in ZeroStageEnum] == [0, 1, 2, 3]
    assert ZeroStageEnum.weights == 3 and ZeroStageEnum.gradients.name == "gradients"
    for member in (*ZeroStageEnum, *OffloadDeviceEnum):
        assert pickle.loads(pickle.dumps(member)) is member
    assert b"deepspeed.runtime.zero.config" in pickle.dumps(ZeroStageEnum.gradients)


def test_leaf_module_takes_a_lone_string():
    zero = DeepSpeedZeroConfig(leaf_module={"classes": "MyBlock"})
    assert zero.leaf_module.classes == ["MyBlock"] and zero.leaf_module.names == []


def test_sections_do_not_share_state():
    first, second = DeepSpeedZeroConfig(), DeepSpeedZeroConfig()
    first.leaf_module.names.append("x")
    assert second.leaf_module.names == [] and DeepSpeedZeroConfig().leaf_module.names == []


# --- optimizer -----------------------------------------------------------------------------------------------------


def test_optimizer_and_scheduler_access():
    config = read(optimizer={"type": "ADAMW", "params": {"lr": 1}}, scheduler={"type": "OneCycle"})
    assert (config.optimizer_name, config.optimizer_params) == ("adamw", {"lr": 1})
    assert (config.scheduler_name, config.scheduler_params) == ("OneCycle", {})
    assert read(optimizer={"type": "RAdam"}).optimizer_name == "RAdam"
    assert read().optimizer_name is read().optimizer is read().scheduler_name is None


@pytest.mark.parametrize(
    ("keys", "clipping", "said_text"),
    [
        ({"fp16": {"enabled": True}}, 2.0, "is used as gradient_clipping"),
        ({"fp16": {"enabled": True}, "gradient_clipping": 0.5}, 0.5, "gives way to gradient_clipping = 0.5"),
        ({}, 0.0, "is set to 0 outside fp16"),
        ({"bf16": {"enabled": True}}, 0.0, "is set to 0 outside fp16"),
    ],
)
def test_max_grad_norm_in_optimizer_params(keys, clipping, said_text):
    with warnings_said() as said:
        config = read(optimizer={"type": "Lamb", "params": {"lr": 1, "max_grad_norm": 2}}, **keys)
    assert config.gradient_clipping == clipping
    assert config.optimizer_params == {"lr": 1}
    assert sum(said_text in line for line in said) == 1


def test_max_grad_norm_zero_is_silent_and_nonsense_refused():
    with warnings_said() as said:
        assert read(optimizer={"type": "Lamb", "params": {"max_grad_norm": 0}}).optimizer_params == {}
    assert said == []
    refused(r"optimizer\.params\.max_grad_norm", optimizer={"type": "Lamb", "params": {"max_grad_norm": -1}})


# --- the resolved config -------------------------------------------------------------------------------------------


def test_attributes_are_the_keys():
    config = read(bf16={"enabled": True}, verify_gradients=3, zero_optimization={"stage": 2})
    assert config.bf16.enabled and config.verify_gradients == 3 and config.zero_enabled
    assert config.zero_config is config.zero_optimization
    assert config.checkpoint.tag_validation == "WARN"
    assert copy.deepcopy(config).verify_gradients == 3
    with pytest.raises(AttributeError, match="no config key is called 'nope'"):
        config.nope  # noqa: B018


def test_defaults_are_those_of_the_documents():
    config = read()
    assert config.gradient_clipping == 0.0
    assert (config.fp16.initial_scale_power, config.fp16.hysteresis, config.fp16.loss_scale_window) == (16, 2, 1000)
    assert config.fp16.dynamic_loss_scale and config.bf16.check_grad_overflow
    assert config.zero_config.param_persistence_threshold == 100_000
    assert config.document.aio.queue_depth == 8


def test_describe_shows_values_and_origins():
    raw = {
        "train_batch_size": 8,
        "gradient_clipping": "auto",
        "bfloat16": {"enabled": True},
        "optimizer": {"type": "Lamb", "params": {}},
        "zero_optimization": {"stage": 2, "stage3_gather_fp16_weights_on_model_save": False, "reduce_bucket_size": 5e8},
        "communication_data_type": "float32",
    }
    text = DeepSpeedConfig(raw, world_size=2).describe()
    lines = text.splitlines()
    keys, document = lines[: lines.index("  json = {")], text.partition("json = ")[2]
    names = [line.split()[0] for line in keys]
    assert names == sorted(names)
    for line in (
        "  train_batch_size ............. 8  [user]",
        "  train_micro_batch_size_per_gpu ... 4  [derived]",
        "  gradient_clipping ............ 0.0  [auto, so the default]",
        "  bf16.enabled ................. True  [user]",
        "  communication_data_type ...... fp32  [user]",
        "  zero_optimization.stage ...... 2  [user]",
        "  zero_optimization.overlap_comm ... False  [derived]",
        "  zero_optimization.reduce_bucket_size ... 500000000  [user]",
        "  zero_optimization.gather_16bit_weights_on_model_save ... False  "
        "[forwarded from zero_optimization.stage3_gather_fp16_weights_on_model_save]",
        "  fp16.enabled ................. False  [default]",
        "  checkpoint.writer ............ None  [default]",
    ):
        assert line in keys
    assert document.startswith('{\n    "train_batch_size": 8,\n')
    assert not any("cpu_offload" in line for line in keys)  # deprecated keys stand at what they became


def test_describe_of_values_that_are_not_json():
    text = read(steps_per_print=math.inf, optimizer={"type": "Adam", "params": {"dtype": torch.bfloat16}}).describe()
    assert "torch.bfloat16" in text and "steps_per_print .............. None" in text


def test_print_is_shown_at_the_default_level():
    with warnings_said() as said:
        read().print("my config")
    assert len(said) == 1 and said[0].startswith("my config:\n  activation_checkpointing.")
