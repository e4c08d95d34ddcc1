"""ZeRO stages 1 and 2: optimizer states (and gradients) partitioned over the data-parallel ranks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from deepspeed._core.lazy import attach
from deepspeed.runtime.flat_optimizer import FlatOptimizer

if TYPE_CHECKING:
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

# Documented here, and of no use to an engine.
__getattr__, __dir__ = attach(
    __name__, names={name: f"deepspeed.runtime.zero.estimate:{name}" for name in __all__ if name.startswith("estimate")}
)


class DeepSpeedZeroOptimizer(FlatOptimizer):
    """What ``deepspeed.initialize`` returns as optimizer at stages 1 and 2; see :class:`FlatOptimizer`."""
