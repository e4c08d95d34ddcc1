"""What the engine says about its progress: the ``steps_per_print`` line and the phase timers of a window."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator

from deepspeed.accelerator import get_accelerator
from deepspeed.utils.logging import log_dist

__all__ = ["Progress"]


class Progress:
    """Counts phase times (``wall_clock_breakdown``) and logs every ``steps_per_print`` steps, on rank 0.

    Phase timers synchronise the device, so they are off unless asked for.
    """

    def __init__(self, steps_per_print: float | None, breakdown: bool, samples_per_step: int) -> None:
        self._every = steps_per_print if steps_per_print and math.isfinite(steps_per_print) else 0
        self._breakdown = breakdown
        self._samples_per_step = samples_per_step
        self._spent_s: dict[str, float] = {}
        self._since = (time.monotonic(), 0)

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Adds the time inside to the phase, if phases are timed."""
        if not self._breakdown:
            yield
            return
        get_accelerator().synchronize()
        start = time.perf_counter()
        try:
            yield
        finally:
            get_accelerator().synchronize()
            self._spent_s[name] = self._spent_s.get(name, 0.0) + time.perf_counter() - start

    def after_step(self, step: int, skipped: int, lr: list[float], mom: list[object], samples_per_step: int) -> None:
        """Logs if a report is due after optimizer step number ``step``."""
        if not self._every or step % self._every:
            return
        now = time.monotonic()
        then, old_step = self._since
        rate = (step - old_step) * samples_per_step / max(now - then, 1e-9)
        self._since = (now, step)
        log_dist(f"step={step}, skipped={skipped}, lr={lr}, mom={mom}, samples/s={rate:.4g}")
        if self._breakdown:
            phases = " | ".join(f"{name}: {1e3 * spent / self._every:.2f}" for name, spent in self._spent_s.items())
            log_dist(f"time (ms) a step | {phases}")
            self._spent_s.clear()
