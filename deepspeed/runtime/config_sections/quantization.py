"""``quantize_training`` (MoQ) with its ``eigenvalue``, and ``weight_quantization``."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from deepspeed.runtime.config_sections.compression import MixedQuantizeConfig
from deepspeed.runtime.config_types import Bool, NonNegFloat, NonNegInt, PosInt
from deepspeed.runtime.config_utils import DeepSpeedConfigModel, key, section

__all__ = ["EigenvalueConfig", "QuantizeTrainingConfig", "WeightQuantizationConfig"]


class EigenvalueConfig(DeepSpeedConfigModel):
    """Power iteration for the largest eigenvalue of each block."""

    place: ClassVar[str] = "quantize_training.eigenvalue"

    enabled: Bool = key(False, "Let eigenvalues stretch the quantisation periods.")
    verbose: Bool = key(False, "Log the iteration.")
    max_iter: PosInt = key(100, "Most iterations.")
    tol: NonNegFloat = key(1e-2, "Relative change at which the iteration ends.")
    stability: NonNegFloat = key(1e-6, "Added to denominators.")
    gas_boundary_resolution: PosInt = key(1, "Accumulation boundaries between computations.")
    layer_name: str = key("bert.encoder.layer", "Path of the blocks.")
    layer_num: NonNegInt = key(0, "Number of the blocks.")


class QuantizeBitsConfig(DeepSpeedConfigModel):
    """Bits of MoQ."""

    start_bits: PosInt = key(16, "Bits at the start.", since="documents")
    target_bits: PosInt = key(16, "Bits at the end.", since="documents")


class QuantizeScheduleConfig(DeepSpeedConfigModel):
    """Schedule of MoQ."""

    quantize_period: PosInt = key(100, "Steps before the first reduction; doubles after each one.", since="documents")
    schedule_offset: NonNegInt = key(100, "First step.", since="documents")


class QuantizeAlgoConfig(DeepSpeedConfigModel):
    """Rounding of MoQ."""

    q_type: Literal["symmetric", "asymmetric"] = key("symmetric", "symmetric or asymmetric.", since="documents")
    rounding: Literal["nearest", "stochastic"] = key("nearest", "Rounding.", since="documents")


class QuantizeTrainingConfig(DeepSpeedConfigModel):
    """Mixture of quantisation."""

    place: ClassVar[str] = "quantize_training"

    enabled: Bool = key(False, "Quantise while training.", since="documents")
    quantize_verbose: Bool = key(False, "Log quantisation.", since="documents")
    quantizer_kernel: Bool = key(False, "Use the quantiser kernel.", since="documents")
    quantize_type: Literal["symmetric", "asymmetric"] = key("symmetric", "symmetric or asymmetric.", since="documents")
    quantize_groups: PosInt = key(1, "Groups with a scale of their own.", since="documents")
    quantize_bits: QuantizeBitsConfig = section(QuantizeBitsConfig, "Bits.", since="documents")
    quantize_schedule: QuantizeScheduleConfig = section(QuantizeScheduleConfig, "Schedule.", since="documents")
    quantize_algo: QuantizeAlgoConfig = section(QuantizeAlgoConfig, "Rounding.", since="documents")
    fp16_mixed_quantize: MixedQuantizeConfig = section(
        MixedQuantizeConfig, "Mix of fp16 and quantised weights.", since="documents"
    )
    eigenvalue: EigenvalueConfig = section(EigenvalueConfig, "Eigenvalues of the blocks.")


class WeightQuantizationConfig(DeepSpeedConfigModel):
    """Weight-only quantisation."""

    place: ClassVar[str] = "weight_quantization"

    enabled: Bool = key(True, "Quantise, once the section is there.")
    num_bits: PosInt = key(8, "Bits.")
    q_type: Literal["symmetric", "asymmetric"] = key("symmetric", "symmetric or asymmetric.")
    q_groups: PosInt = key(1, "Groups with a scale of their own.")
    quantized_initialization: dict[str, Any] = key({}, "Quantise while the model is built.")
    post_init_quant: dict[str, Any] = key({}, "Quantise after the model is built, by module.")
