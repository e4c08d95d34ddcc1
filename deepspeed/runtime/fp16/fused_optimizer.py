"""fp16 weights with fp32 masters and loss scaling, without partitioning (ZeRO stage 0)."""

from __future__ import annotations

from deepspeed.runtime.flat_optimizer import FlatOptimizer

__all__ = ["FP16_Optimizer"]


class FP16_Optimizer(FlatOptimizer):
    """What ``deepspeed.initialize`` returns as optimizer at stage 0 with fp16; see :class:`FlatOptimizer`."""
