"""``compression_training``: layer reduction, quantisation and pruning while training."""

from __future__ import annotations

from typing import Any, ClassVar, Generic, Literal, TypeVar

from pydantic import model_validator
from typing_extensions import Self

from deepspeed.errors import ConfigError
from deepspeed.runtime.config_types import Bool, Float, Fraction, NonNegInt, PosInt
from deepspeed.runtime.config_utils import DeepSpeedConfigModel, key, section
from deepspeed.runtime.zero.leaf_module_config import StrList

__all__ = ["CompressionConfig"]

Quantization = Literal["symmetric", "asymmetric"]


class LayerReductionConfig(DeepSpeedConfigModel):
    """Start from some layers of a teacher."""

    enabled: Bool = key(False, "Reduce layers.")
    keep_number_layer: PosInt | None = key(None, "Layers of the student.")
    module_name_prefix: str | None = key(None, "Path of the layers.")
    teacher_layer: list[NonNegInt] | None = key(None, "Which layers of the teacher are taken.")
    other_module_name: list[str] | None = key(None, "Other modules that are taken.")


class MixedQuantizeConfig(DeepSpeedConfigModel):
    """Mix of fp16 and quantised weights."""

    enabled: Bool = key(False, "Mix.")
    quantize_change_ratio: Float = key(0.001, "Change of the mix at each step.")


class WeightQuantShared(DeepSpeedConfigModel):
    """Settings of weight quantisation for all groups."""

    enabled: Bool = key(False, "Quantise weights.")
    quantizer_kernel: Bool = key(False, "Use the quantiser kernel.")
    schedule_offset: NonNegInt = key(0, "First step.")
    quantize_groups: PosInt = key(1, "Groups with a scale of their own.")
    quantize_verbose: Bool = key(False, "Log quantisation.")
    quantization_type: Quantization = key("symmetric", "symmetric or asymmetric.")
    quantize_weight_in_forward: Bool = key(False, "Quantise in forward; needed with fp32 optimizers.")
    rounding: Literal["nearest", "stochastic"] = key("nearest", "Rounding.")
    fp16_mixed_quantize: MixedQuantizeConfig = section(MixedQuantizeConfig, "Mix of fp16 and quantised weights.")


class ActivationQuantShared(DeepSpeedConfigModel):
    """Settings of activation quantisation for all groups."""

    enabled: Bool = key(False, "Quantise activations.")
    quantization_type: Quantization = key("symmetric", "symmetric or asymmetric.")
    range_calibration: Literal["dynamic", "static"] = key("dynamic", "When ranges are found.")
    schedule_offset: NonNegInt = key(1000, "First step.")


class SparsePruningShared(DeepSpeedConfigModel):
    """Settings of sparse pruning for all groups."""

    enabled: Bool = key(False, "Prune single weights.")
    method: Literal["l1", "topk", "snip_momentum"] = key("l1", "How weights are chosen.")
    schedule_offset: NonNegInt = key(1000, "First step.")
    schedule_offset_end: NonNegInt | None = key(None, "Last step (snip_momentum); unset = schedule_offset.")
    schedule_offset_stride: PosInt = key(1, "Steps between prunings (snip_momentum).")
    block_pattern: str = key("4x1", "Block of weights kept or dropped together (snip_momentum).")
    dense_ratio: Fraction = key(0.1, "Share of weights that stay (snip_momentum).")
    excluded_modules: list[str] = key([], "Modules left alone (snip_momentum).")


class StructuredPruningShared(DeepSpeedConfigModel):
    """Settings of row and channel pruning for all groups."""

    enabled: Bool = key(False, "Prune.")
    method: Literal["l1", "topk"] = key("l1", "How rows or channels are chosen.")
    schedule_offset: NonNegInt = key(1000, "First step.")


class HeadPruningShared(DeepSpeedConfigModel):
    """Settings of head pruning for all groups."""

    enabled: Bool = key(False, "Prune attention heads.")
    method: Literal["topk"] = key("topk", "How heads are chosen.")
    schedule_offset: NonNegInt = key(1000, "First step.")
    num_heads: PosInt | None = key(None, "Heads of the model; required when enabled.")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.enabled and self.num_heads is None:
            raise ConfigError("head_pruning is enabled, so num_heads must be given")
        return self


class WeightQuantParams(DeepSpeedConfigModel):
    """Bits of a group of weights."""

    start_bits: PosInt = key(..., "Bits at the start.")
    target_bits: PosInt = key(..., "Bits at the end.")
    quantization_period: PosInt = key(1, "Steps between two reductions.")


class ActivationQuantParams(DeepSpeedConfigModel):
    """Bits of a group of activations."""

    bits: PosInt = key(..., "Bits.")


class DenseRatioParams(DeepSpeedConfigModel):
    """Density of a group."""

    dense_ratio: Fraction = key(..., "Share that stays.")


Shared = TypeVar("Shared", bound=DeepSpeedConfigModel)
GroupParams = TypeVar("GroupParams", bound=DeepSpeedConfigModel)


class GroupConfig(DeepSpeedConfigModel, Generic[GroupParams]):
    """A group of modules with settings of its own."""

    params: GroupParams = key(..., "Settings of the group.")
    modules: StrList = key(["*"], "Modules of the group.")
    related_modules: list[Any] | None = key(None, "Modules whose inputs follow (row, head and channel pruning).")


class MethodConfig(DeepSpeedConfigModel, Generic[Shared, GroupParams]):
    """One compression method: settings for all groups, and the groups."""

    shared_parameters: Shared = key(..., "Settings for all groups.")
    different_groups: dict[str, GroupConfig[GroupParams]] | None = key(None, "The groups, by name.")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if getattr(self.shared_parameters, "enabled", False) and not self.different_groups:
            raise ConfigError("the method is enabled, so different_groups must name at least one group")
        return self


class CompressionConfig(DeepSpeedConfigModel):
    """Every method is off until its ``shared_parameters.enabled`` (layer_reduction: ``enabled``) is true."""

    place: ClassVar[str] = "compression_training"

    layer_reduction: LayerReductionConfig = section(LayerReductionConfig, "Start from some layers of a teacher.")
    weight_quantization: MethodConfig[WeightQuantShared, WeightQuantParams] | None = key(None, "Quantise weights.")
    activation_quantization: MethodConfig[ActivationQuantShared, ActivationQuantParams] | None = key(
        None, "Quantise activations."
    )
    sparse_pruning: MethodConfig[SparsePruningShared, DenseRatioParams] | None = key(None, "Prune single weights.")
    row_pruning: MethodConfig[StructuredPruningShared, DenseRatioParams] | None = key(None, "Prune rows.")
    head_pruning: MethodConfig[HeadPruningShared, DenseRatioParams] | None = key(None, "Prune attention heads.")
    channel_pruning: MethodConfig[StructuredPruningShared, DenseRatioParams] | None = key(None, "Prune channels.")
