"""bf16 weights with fp32 masters and fp32 gradient sums, without partitioning (ZeRO stage 0)."""

from __future__ import annotations

from deepspeed.runtime.flat_optimizer import FlatOptimizer

__all__ = ["BF16_Optimizer"]


class BF16_Optimizer(FlatOptimizer):
    """What ``deepspeed.initialize`` returns as optimizer at stage 0 with bf16; see :class:`FlatOptimizer`."""
