"""Lion: ``FusedLion`` and ``DeepSpeedCPULion``. Both run on CPU and CUDA, with the same update."""

from deepspeed.ops.lion.lion import DeepSpeedCPULion, FusedLion

__all__ = ["DeepSpeedCPULion", "FusedLion"]
