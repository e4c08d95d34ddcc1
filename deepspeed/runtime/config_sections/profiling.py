"""``flops_profiler`` and ``comms_logger``."""

from __future__ import annotations

from typing import ClassVar

from deepspeed.runtime.config_types import Bool, Int, NonNegFloat, NonNegInt
from deepspeed.runtime.config_utils import DeepSpeedConfigModel, key

__all__ = ["CommsLoggerConfig", "DeepSpeedFlopsProfilerConfig"]


class DeepSpeedFlopsProfilerConfig(DeepSpeedConfigModel):
    """A profile of one training step: floating-point operations, parameters and time by module."""

    place: ClassVar[str] = "flops_profiler"

    enabled: Bool = key(False, "Profile one step; turns wall_clock_breakdown on.")
    recompute_fwd_factor: NonNegFloat = key(0.0, "Extra share of the forward spent on recomputing activations.")
    profile_step: NonNegInt = key(1, "The global step to profile.")
    module_depth: Int = key(-1, "Depth of the report; -1 = down to the innermost modules.")
    top_modules: NonNegInt = key(1, "Modules listed at each depth.")
    detailed: Bool = key(True, "List every module.")
    output_file: str | None = key(None, "File for the report; unset = standard output.")


class CommsLoggerConfig(DeepSpeedConfigModel):
    """Log of the collectives: counts, sizes, latencies and bandwidths."""

    place: ClassVar[str] = "comms_logger"

    enabled: Bool = key(False, "Log communication.")
    verbose: Bool = key(False, "Print each operation as it happens.")
    prof_all: Bool = key(True, "Log all operations.")
    debug: Bool = key(False, "Add the caller to the name of the operation.")
    prof_ops: list[str] = key([], "Only these operations, when prof_all is false.")
