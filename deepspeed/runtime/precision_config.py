"""``fp16``, ``bf16``, ``amp``, ``torch_autocast`` and ``data_types``: what numbers are computed and kept in."""

from __future__ import annotations

from typing import ClassVar

from pydantic import ConfigDict, model_validator
from typing_extensions import Self

from deepspeed.errors import ConfigError
from deepspeed.runtime.config_types import Bool, FloatDtype, NonNegFloat, NonNegInt, PosInt
from deepspeed.runtime.config_utils import DeepSpeedConfigModel, key

__all__ = ["AmpConfig", "BF16Config", "DataTypesConfig", "FP16Config", "TorchAutocastConfig"]


class FP16Config(DeepSpeedConfigModel):
    """fp16 training with a static or a dynamic loss scale."""

    place: ClassVar[str] = "fp16"

    enabled: Bool = key(False, "Train in fp16. Not together with bf16 or amp.")
    auto_cast: Bool = key(False, "Cast floating-point inputs of the model to fp16.")
    loss_scale: NonNegFloat = key(0.0, "Static loss scale; 0 = dynamic.")
    initial_scale_power: NonNegInt = key(16, "The dynamic scale starts at 2 to this power.")
    loss_scale_window: NonNegInt = key(1000, "Steps without overflow before the dynamic scale doubles.")
    hysteresis: PosInt = key(2, "Overflows tolerated before the dynamic scale is halved.")
    consecutive_hysteresis: Bool = key(False, "Refill the hysteresis on every clean step.")
    min_loss_scale: NonNegFloat = key(1.0, "Floor of the dynamic scale.")
    fp16_master_weights_and_grads: Bool = key(False, "Keep master weights and gradients in fp16 (CPU offload).")
    consecutive_skip_limit: NonNegInt = key(
        500,
        "Steps skipped in a row, with the scale at its floor, after which training stops with an error; 0 = never.",
        since="1.0.0",
    )

    @property
    def dynamic_loss_scale(self) -> bool:
        """Whether the scale adapts, which it does unless a static one is given."""
        return self.loss_scale == 0

    @model_validator(mode="after")
    def _check_scaler(self) -> Self:
        if self.dynamic_loss_scale:
            for name in ("loss_scale_window", "min_loss_scale"):
                if getattr(self, name) <= 0:
                    raise ConfigError(f"{name} must be above 0 when the loss scale is dynamic (loss_scale 0)")
        return self


class BF16Config(DeepSpeedConfigModel):
    """bf16 training with fp32 master weights; there is no loss scale."""

    place: ClassVar[str] = "bf16"

    enabled: Bool = key(False, "Train in bf16. Not together with fp16 or amp.")
    immediate_grad_update: Bool = key(
        False,
        "Add each gradient to its fp32 sum at once instead of after backward.",
        inert="gradients are always added to their sums as they are produced",
    )
    check_grad_overflow: Bool = key(True, "Skip a step whose gradients are not finite.", since="0.17.1")
    bf16_master_weights_and_grads: Bool = key(False, "Keep master weights and gradients in bf16.", since="0.18.3")
    bf16_optimizer_states: Bool = key(
        False, "Keep optimizer state in bf16; needs bf16_master_weights_and_grads.", since="0.18.3"
    )

    @model_validator(mode="after")
    def _check_states(self) -> Self:
        if self.bf16_optimizer_states and not self.bf16_master_weights_and_grads:
            raise ConfigError("bf16_optimizer_states needs bf16_master_weights_and_grads")
        return self


class AmpConfig(DeepSpeedConfigModel):
    """NVIDIA Apex AMP. Every other key in this section is kept and passed to ``amp.initialize``."""

    model_config = ConfigDict(extra="allow")
    place: ClassVar[str] = "amp"
    keeps_unknown: ClassVar[bool] = True

    enabled: Bool = key(False, "Train with Apex AMP. Not together with fp16, bf16 or ZeRO.")


class TorchAutocastConfig(DeepSpeedConfigModel):
    """torch.autocast around the forward pass, inside the engine."""

    place: ClassVar[str] = "torch_autocast"

    enabled: Bool = key(False, "Run forward under torch.autocast.", since="0.17.2")
    dtype: FloatDtype | None = key(None, "Dtype of autocast and of communication; unset = bfloat16.", since="0.17.2")
    lower_precision_safe_modules: list[str] | None = key(
        None,
        "Class names of modules reduced and gathered in the lower dtype; unset = torch.nn Linear, Conv1d/2d/3d.",
        since="0.17.2",
    )


class DataTypesConfig(DeepSpeedConfigModel):
    """Dtypes of single kinds of tensors."""

    place: ClassVar[str] = "data_types"

    grad_accum_dtype: FloatDtype | None = key(None, "Dtype in which gradients are accumulated; unset = by mode.")
    param_dtype: FloatDtype | None = key(None, "Dtype of parameters; unset = that of fp16/bf16.", since="0.19.2")
    buffer_dtype: FloatDtype | None = key(None, "Dtype of buffers; unset = as they are.", since="0.19.2")
