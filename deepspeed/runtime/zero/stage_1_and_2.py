"""ZeRO stages 1 and 2: optimizer states (and gradients) partitioned over the data-parallel ranks."""

from __future__ import annotations

from deepspeed.runtime.flat_optimizer import FlatOptimizer

__all__ = ["DeepSpeedZeroOptimizer"]


class DeepSpeedZeroOptimizer(FlatOptimizer):
    """What ``deepspeed.initialize`` returns as optimizer at stages 1 and 2; see :class:`FlatOptimizer`."""
