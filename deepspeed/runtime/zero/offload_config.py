"""``zero_optimization.offload_param`` and ``.offload_optimizer``: where parameters and optimizer state rest."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import ClassVar

from deepspeed.runtime.config_types import Bool, Fraction, NonNegInt, PosInt
from deepspeed.runtime.config_utils import DeepSpeedConfigModel, key

__all__ = [
    "DeepSpeedZeroOffloadOptimizerConfig",
    "DeepSpeedZeroOffloadParamConfig",
    "OffloadDeviceEnum",
    "OffloadStateTypeEnum",
]


class OffloadDeviceEnum(str, Enum):
    """Where offloaded tensors rest; members equal their config spelling."""

    none = "none"
    cpu = "cpu"
    nvme = "nvme"


class OffloadStateTypeEnum(str, Enum):
    """Kinds of state that ``engine.offload_states`` moves."""

    optim_states = "optim_states"
    """Element-wise optimizer states."""
    hp_params = "hp_params"
    """fp32 masters."""
    lp_params = "lp_params"
    """The trained weights (with ZeRO-3 this rank's shards)."""
    lp_grads = "lp_grads"
    """Reduced gradients."""
    contiguous_grad_buffer = "contiguous_grad_buffer"
    """Buffers for gradients on their way."""


class DeepSpeedZeroOffloadParamConfig(DeepSpeedConfigModel):
    """Parameter offload. Valid only with stage 3; device ``none`` may stand at every stage."""

    place: ClassVar[str] = "zero_optimization.offload_param"

    device: OffloadDeviceEnum = key(OffloadDeviceEnum.none, "Where parameters rest: none, cpu or nvme.")
    nvme_path: Path | None = key(None, "Existing directory for parameter files on the NVMe device.")
    buffer_count: NonNegInt = key(
        5, "Reading ahead from NVMe takes at most the memory of so many buffers, and no more than the model needs."
    )
    buffer_size: NonNegInt = key(100_000_000, "Elements in one such buffer; a rank's part of a parameter must fit.")
    max_in_cpu: NonNegInt = key(
        1_000_000_000, "Parameter elements of a rank that stay in CPU memory under NVMe offload; the first ones do."
    )
    pin_memory: Bool = key(False, "Use page-locked CPU memory: faster copies, more memory.")


class DeepSpeedZeroOffloadOptimizerConfig(DeepSpeedConfigModel):
    """Optimizer-state offload, with the update computed on the CPU. Valid with stages 1 to 3."""

    place: ClassVar[str] = "zero_optimization.offload_optimizer"

    device: OffloadDeviceEnum = key(OffloadDeviceEnum.none, "Where optimizer state rests: none, cpu or nvme.")
    nvme_path: Path | None = key(None, "Existing directory for optimizer-state files on the NVMe device.")
    buffer_count: NonNegInt = key(
        4,
        "Most buffers between NVMe and memory, each with all states of a tile; three are enough to overlap everything.",
    )
    buffer_size: PosInt = key(3_145_728, "Most elements in one such buffer, of each state.", since="1.0.0")
    pin_memory: Bool = key(False, "Use page-locked CPU memory: faster copies, more memory.")
    pipeline_read: Bool = key(False, "Read the next tile while the current one is computed.")
    pipeline_write: Bool = key(False, "Write the previous tile while the current one is computed.")
    fast_init: Bool = key(False, "Do not write the file once at the start where space cannot be reserved otherwise.")
    ratio: Fraction = key(
        1.0, "Share of the optimizer state that is offloaded; the rest stays, and steps, on the device."
    )
    super_offload: Bool = key(False, "Offload tuned for Superchips; stage 3.", since="0.18.0")
    cpuadam_cores_perc: Fraction = key(0.8, "Share of the cores for CPU Adam under super_offload.", since="0.18.0")

    @property
    def pipeline(self) -> bool:
        """Whether any overlap of tile transfers with computing is asked for."""
        return self.pipeline_read or self.pipeline_write
