"""``activation_checkpointing``: recompute activations in backward instead of keeping them."""

from __future__ import annotations

from typing import ClassVar

from deepspeed.runtime.config_types import Bool, PosInt
from deepspeed.runtime.config_utils import DeepSpeedConfigModel, key

__all__ = ["DeepSpeedActivationCheckpointingConfig"]


class DeepSpeedActivationCheckpointingConfig(DeepSpeedConfigModel):
    """Where the saved inputs of checkpointed blocks rest."""

    place: ClassVar[str] = "activation_checkpointing"

    partition_activations: Bool = key(False, "Split saved inputs over the model-parallel ranks.")
    cpu_checkpointing: Bool = key(False, "Keep saved inputs in CPU memory; with partition_activations.")
    contiguous_memory_optimization: Bool = key(False, "Copy saved inputs into one buffer; needs number_checkpoints.")
    number_checkpoints: PosInt | None = key(None, "Number of checkpointed blocks, for sizing the buffer.")
    synchronize_checkpoint_boundary: Bool = key(False, "Wait for the device at the boundaries of blocks.")
    profile: Bool = key(False, "Log the time of each block.")
