"""What the engine says about its progress: the ``steps_per_print`` line and the phase timers of a window."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator
from typing import Any

from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.utils import see_memory_usage
from deepspeed.utils.logging import log_dist

__all__ = ["Progress"]


class Progress:
    """Counts phase times (``wall_clock_breakdown``) and logs every ``steps_per_print`` steps, on rank 0.

    Phase timers synchronise the device, so they are off unless asked for; so is the memory report after each phase
    (``memory_breakdown``). The throughput in the progress line follows ``timers.throughput``.
    """

    def __init__(self, config: Any) -> None:
        every = config.steps_per_print
        self._every = every if every and math.isfinite(every) else 0
        self._breakdown = config.wall_clock_breakdown
        self._memory = config.memory_breakdown
        self._throughput = config.timers.throughput
        self._spent_s: dict[str, float] = {}
        self._since = (time.monotonic(), 0)

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Adds the time inside to the phase, if phases are timed, and reports memory after it, if asked for."""
        if not self._breakdown and not self._memory:
            yield
            return
        get_accelerator().synchronize()
        start = time.perf_counter()
        try:
            yield
        finally:
            get_accelerator().synchronize()
            self._spent_s[name] = self._spent_s.get(name, 0.0) + time.perf_counter() - start
            see_memory_usage(f"after {name}", force=self._memory)

    def after_step(self, step: int, skipped: int, lr: list[float], mom: list[Any], samples_per_step: int) -> None:
        """Logs if a report is due after optimizer step number ``step``."""
        if not self._every or step % self._every:
            return
        rate = ""
        if self._throughput.enabled:
            if self._throughput.synchronized:
                get_accelerator().synchronize()
            now, (then, old_step) = time.monotonic(), self._since
            rate = f", samples/s={(step - old_step) * samples_per_step / max(now - then, 1e-9):.4g}"
            self._since = (now, step)
        log_dist(f"step={step}, skipped={skipped}, lr={lr}, mom={mom}{rate}")
        if self._breakdown:
            phases = " | ".join(f"{name}: {1e3 * spent / self._every:.2f}" for name, spent in self._spent_s.items())
            log_dist(f"time (ms) a step | {phases}")
            self._spent_s.clear()
