"""Progress lines, timers and reports: the top-level keys about what is said while training."""

from __future__ import annotations

from typing import ClassVar, Literal

from deepspeed.runtime.config_types import Bool, NonNegFloat, PrintInterval
from deepspeed.runtime.config_utils import DeepSpeedConfigModel, key, section

__all__ = ["LoggingKeys", "ThroughputTimerConfig", "TimersConfig"]


class ThroughputTimerConfig(DeepSpeedConfigModel):
    """Samples per second in the progress line."""

    place: ClassVar[str] = "timers.throughput"

    enabled: Bool = key(True, "Measure throughput.", since="0.14.3")
    synchronized: Bool = key(True, "Wait for the device at both ends of the measurement.", since="0.14.3")


class TimersConfig(DeepSpeedConfigModel):
    """Timers of the engine."""

    place: ClassVar[str] = "timers"

    throughput: ThroughputTimerConfig = section(ThroughputTimerConfig, "The throughput timer.", since="0.14.3")


class LoggingKeys(DeepSpeedConfigModel):
    """Top-level keys about progress and reports."""

    steps_per_print: PrintInterval = key(10, "Steps between progress lines; 0, null or infinity = never.")
    wall_clock_breakdown: Bool = key(False, "Time the phases of each step.")
    memory_breakdown: Bool = key(False, "Report memory at the phases of each step.")
    dump_state: Bool = key(False, "Print the resolved config and the state of the engine after initialisation.")
    timers: TimersConfig = section(TimersConfig, "Timers of the engine.", since="0.14.3")
    log_level: Literal["debug", "info", "warning", "error", "critical"] | None = key(
        None, "Level of the DeepSpeed logger.", since="0.19.3"
    )
    hang_timeout_s: NonNegFloat | None = key(
        None,
        "Seconds that ranks wait for each other before they say which one ran off; 0 = never; unset = "
        "DS_HANG_TIMEOUT_S, else 10.",
        since="1.0.0",
    )
