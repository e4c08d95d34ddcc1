"""ZeRO stages 1 and 2: optimizer states (and gradients) partitioned over the data-parallel ranks."""

from __future__ import annotations

from deepspeed.runtime.flat_optimizer import FlatOptimizer
from deepspeed.runtime.zero.estimate import (
    estimate_zero2_model_states_mem_needs,
    estimate_zero2_model_states_mem_needs_all_cold,
    estimate_zero2_model_states_mem_needs_all_live,
)

__all__ = [
    "DeepSpeedZeroOptimizer",
    "estimate_zero2_model_states_mem_needs",
    "estimate_zero2_model_states_mem_needs_all_cold",
    "estimate_zero2_model_states_mem_needs_all_live",
]


class DeepSpeedZeroOptimizer(FlatOptimizer):
    """What ``deepspeed.initialize`` returns as optimizer at stages 1 and 2; see :class:`FlatOptimizer`."""
