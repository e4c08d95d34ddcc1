"""LAMB: ``FusedLamb``, on CPU and CUDA."""

from deepspeed.ops.lamb.lamb import FusedLamb

__all__ = ["FusedLamb"]
