"""``pipeline``, ``tensor_parallel`` and ``expert_parallel``: how one model is spread over ranks."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import BeforeValidator, ConfigDict

from deepspeed.runtime.config_types import AnyDtype, Bool, Float, Int, NonNegInt, PosInt, as_float, as_int
from deepspeed.runtime.config_utils import DeepSpeedConfigModel, key, section

__all__ = ["ExpertParallelConfig", "PipelineConfig", "TensorParallelConfig"]


def _int_or_auto(value: Any) -> Any:
    return value if value == "auto" else as_int(value)


def _float_or_auto(value: Any) -> Any:
    return value if value == "auto" else as_float(value)


IntOrAuto = Annotated[int | Literal["auto"], BeforeValidator(_int_or_auto)]
FloatOrAuto = Annotated[float | Literal["auto"], BeforeValidator(_float_or_auto)]


class PipelineConfig(DeepSpeedConfigModel):
    """Pipeline engine. Keys that are not listed here are kept."""

    model_config = ConfigDict(extra="allow")
    place: ClassVar[str] = "pipeline"
    keeps_unknown: ClassVar[bool] = True

    stages: IntOrAuto = key("auto", "Number of stages.")
    partition: str = key("best", "How layers are spread over stages.")
    seed_layers: Bool = key(False, "Seed each layer on its own.")
    activation_checkpoint_interval: NonNegInt = key(0, "Layers between activation checkpoints; 0 = none.")
    pipe_partitioned: Bool = key(True, "Send activations in parts.")
    grad_partitioned: Bool = key(True, "Send gradients in parts.")


class TPSizeConfig(DeepSpeedConfigModel):
    """Size and group of tensor parallelism."""

    tp_size: PosInt = key(1, "Ranks that share one layer.", since="0.16.4")
    tp_grain_size: PosInt = key(1, "Parts of a layer are multiples of this.", since="0.16.4")
    mpu: Any = key(None, "Object with the model-parallel groups.", since="0.16.4")
    tp_group: Any = key(None, "Process group.", since="0.16.4")


class TPLayerSpec(DeepSpeedConfigModel):
    """How layers whose names match are split."""

    patterns: list[str] = key([], "Regular expressions for names.", since="0.18.6")
    partition_type: Literal["column", "row", "skip"] = key("column", "Split of the weight.", since="0.18.6")
    shape: list[Any] | None = key(None, "Logical shape of a fused weight.", since="0.18.6")
    partition_dim: Int | None = key(None, "Dimension that is split; unset = 0 for column, 1 for row.", since="0.18.6")
    model_types: list[str] | None = key(None, "Only for these model types.", since="0.18.6")
    gather_output: Bool = key(False, "Gather the output.", since="0.18.6")
    grad_allreduce: Bool = key(False, "All-reduce the gradient.", since="0.18.6")


class TPPartitionConfig(DeepSpeedConfigModel):
    """Rules for splitting layers."""

    use_default_specs: Bool = key(True, "Use the built-in rules, too.", since="0.18.6")
    strict_mode: Bool = key(False, "A layer without a rule is an error.", since="0.18.6")
    layer_specs: list[TPLayerSpec] = key([], "The rules; the first that matches holds.", since="0.18.6")


class TensorParallelConfig(DeepSpeedConfigModel):
    """AutoTP training."""

    place: ClassVar[str] = "tensor_parallel"

    dtype: AnyDtype = key(torch.float16, "Dtype of the model.", since="0.16.4")
    autotp_size: NonNegInt = key(0, "Ranks that share one layer; 0 = off.", since="0.16.4")
    tensor_parallel: TPSizeConfig = section(TPSizeConfig, "Size and group.", aliases=("tp",), since="0.16.4")
    injection_policy_tuple: tuple[Any, ...] | None = key(None, "Injection policy.", since="0.16.4")
    keep_module_on_host: Bool = key(False, "Leave the module in host memory.", since="0.16.4")
    replace_with_kernel_inject: Bool = key(
        False, "Inject inference kernels.", aliases=("kernel_inject",), since="0.16.4"
    )
    tp_overlap_comm: Bool = key(False, "Overlap all-reduce with computing.", since="0.16.6")
    preset_model: Literal["llama", "bloom", "chatglm", "mixtral", "deepseek_v2", "qwen2", "phi3"] | None = key(
        None, "Built-in rules of a model family.", since="0.18.6"
    )
    partition_config: TPPartitionConfig | None = key(None, "Rules for splitting layers.", since="0.18.6")


class ExpertParallelConfig(DeepSpeedConfigModel):
    """AutoEP: experts of a mixture spread over ranks."""

    place: ClassVar[str] = "expert_parallel"

    enabled: Bool = key(False, "Spread experts over ranks.", since="0.19.2")
    autoep_size: PosInt = key(1, "Ranks that share the experts.", since="0.19.2")
    expert_tensor_parallel_size: Annotated[int, BeforeValidator(as_int)] = key(
        1, "Only 1 is possible.", since="0.19.2", ge=1, le=1
    )
    preset_model: Literal["mixtral", "qwen3_moe", "qwen3_5_moe", "deepseek_v2", "deepseek_v3"] | None = key(
        None, "Built-in facts of a model family.", since="0.19.2"
    )
    moe_layer_pattern: str | None = key(None, "Names of the mixture layers.", since="0.19.2")
    router_pattern: str | None = key(None, "Names of the routers.", since="0.19.2")
    expert_pattern: str | None = key(None, "Names of the experts.", since="0.19.2")
    use_grouped_mm: Bool = key(True, "One grouped matrix product for all experts.", since="0.19.2")
    disable_triton_grouped_mm: Bool = key(False, "Do not use the Triton form of it.", since="0.19.2")
    score_func: str = key("auto", "Function from logits to scores.", since="0.19.2")
    score_apply: str = key("auto", "Where scores are applied.", since="0.19.2")
    combine_impl: str = key("auto", "How expert outputs are combined.", since="0.19.2")
    route_norm: Bool | None = key(None, "Normalise the chosen scores.", since="0.19.2")
    route_scale: Float = key(1.0, "Factor on the chosen scores.", since="0.19.2")
    routed_scaling_factor: FloatOrAuto = key("auto", "Factor on the routed output.", since="0.19.2")
    top_k: IntOrAuto = key("auto", "Experts per token.", since="0.19.2")
    num_expert_groups: PosInt | None = key(None, "Groups of experts.", since="0.19.2")
    num_limited_groups: PosInt | None = key(None, "Groups a token may go to.", since="0.19.2")
    load_balance_coeff: None = key(None, "Only null is possible.", since="0.19.2")
    expert_w1: str | None = key(None, "Name of the first expert weight.", since="0.19.2")
    expert_w2: str | None = key(None, "Name of the second expert weight.", since="0.19.2")
    expert_w3: str | None = key(
        None, "Name of the third expert weight; absent = as the preset says, null = fused.", since="0.19.2"
    )
    num_experts_attr: str | None = key(None, "Attribute with the number of experts.", since="0.19.2")
    top_k_attr: str | None = key(None, "Attribute with the experts per token.", since="0.19.2")
    has_shared_experts: Bool | None = key(None, "Whether shared experts exist.", since="0.19.2")
    shared_experts_pattern: str | None = key(None, "Names of the shared experts.", since="0.19.2")
    shared_experts_gate_pattern: str | None = key(None, "Names of their gates.", since="0.19.2")
    validate_folding_routing: Bool = key(False, "Check the routing of folded groups.", since="0.19.2")
