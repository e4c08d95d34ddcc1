"""Adam and AdamW: ``FusedAdam`` and ``DeepSpeedCPUAdam``. Both run on CPU and CUDA, with the same update."""

from deepspeed.ops.adam.adam import DeepSpeedCPUAdam, FusedAdam

__all__ = ["DeepSpeedCPUAdam", "FusedAdam"]
