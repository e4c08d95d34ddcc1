"""The device that this process trains on, behind one interface: ``get_accelerator()``. Importing touches no device."""

from __future__ import annotations

from .abstract_accelerator import DeepSpeedAccelerator
from .cpu_accelerator import CPU_Accelerator
from .cuda_accelerator import CUDA_Accelerator
from .real_accelerator import get_accelerator, set_accelerator

__all__ = ["CPU_Accelerator", "CUDA_Accelerator", "DeepSpeedAccelerator", "get_accelerator", "set_accelerator"]
