"""Adagrad: ``DeepSpeedCPUAdagrad``, on CPU and CUDA."""

from deepspeed.ops.adagrad.adagrad import DeepSpeedCPUAdagrad

__all__ = ["DeepSpeedCPUAdagrad"]
