"""Loss scaling for fp16: keep small gradients from vanishing, and large ones from overflowing.

Small picklable classes that know nothing of optimizers. The dynamic rule is the documented one (``fp16`` section of the
config): an overflow first uses up the hysteresis, then halves the scale; ``loss_scale_window`` clean steps double it.
"""

from __future__ import annotations

from typing import Any

from deepspeed.errors import NonFiniteGradientError
from deepspeed.utils.logging import log_dist

__all__ = ["DynamicLossScaler", "LossScaler", "LossScalerBase", "make_loss_scaler"]

DEFAULT_CONSECUTIVE_SKIP_LIMIT = 500


class LossScalerBase:
    """Holds ``cur_scale``; ``update_scale(overflow)`` is called once a step, on all ranks with the same argument."""

    dynamic = False

    def __init__(self, scale: float = 1.0) -> None:
        self.cur_scale = float(scale)

    @property
    def loss_scale(self) -> float:
        return self.cur_scale

    def update_scale(self, overflow: bool) -> None:
        """Nothing to adapt in a static scaler."""

    def __getstate__(self) -> dict[str, Any]:
        # For readers of checkpoints, which see attributes only; in the reference this is one.
        return {**vars(self), "dynamic": self.dynamic}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update({key: value for key, value in state.items() if key != "dynamic"})

    def state_dict(self) -> dict[str, Any]:
        """Plain values only, so that a checkpoint with them loads with ``weights_only=True``."""
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over the values of the same scaler kind; unknown keys are ignored, missing ones keep their value."""
        for key in vars(self):
            if key in state:
                setattr(self, key, state[key])


class LossScaler(LossScalerBase):
    """A constant scale (``fp16.loss_scale`` > 0; 1 in bf16 and fp32)."""

    def __init__(self, scale: float = 1.0, consecutive_skip_limit: int = DEFAULT_CONSECUTIVE_SKIP_LIMIT) -> None:
        super().__init__(scale)
        self.consecutive_skips = 0
        self.consecutive_skip_limit = consecutive_skip_limit

    def update_scale(self, overflow: bool) -> None:
        self.consecutive_skips = self.consecutive_skips + 1 if overflow else 0
        if self.consecutive_skips >= self.consecutive_skip_limit > 0:
            raise NonFiniteGradientError(
                f"{self.consecutive_skips} steps in a row had non-finite gradients at the constant loss scale "
                f"{self.cur_scale:g}. Look at the loss and at the parameter named in the log; lower the learning "
                "rate, in fp16 use a smaller fp16.loss_scale or a dynamic one (0), or bf16 "
                "(fp16.consecutive_skip_limit sets how many skipped steps are tolerated; 0: any number)."
            )


class DynamicLossScaler(LossScalerBase):
    """Halves on overflow, doubles after a clean window, see the module docstring. ``h`` is the hysteresis left."""

    dynamic = True

    def __init__(
        self,
        init_scale: float = 2.0**16,
        scale_factor: float = 2.0,
        scale_window: int = 1000,
        min_scale: float = 1.0,
        delayed_shift: int = 2,
        consecutive_hysteresis: bool = False,
        consecutive_skip_limit: int = DEFAULT_CONSECUTIVE_SKIP_LIMIT,
    ) -> None:
        super().__init__(init_scale)
        self.cur_iter = 0
        self.last_overflow_iter = -1
        self.scale_factor = scale_factor
        self.scale_window = scale_window
        self.min_scale = min_scale
        self.delayed_shift = delayed_shift
        self.cur_hysteresis = delayed_shift
        self.consecutive_hysteresis = consecutive_hysteresis
        self.consecutive_skip_limit = consecutive_skip_limit
        self.consecutive_skips = 0

    def update_scale(self, overflow: bool) -> None:
        if overflow:
            self._shrink()
            self.last_overflow_iter = self.cur_iter
        else:
            self._maybe_grow()
        self.cur_iter += 1

    def _shrink(self) -> None:
        self.consecutive_skips += 1
        at_floor = self.cur_scale <= self.min_scale
        if at_floor and self.consecutive_skips >= self.consecutive_skip_limit > 0:
            raise NonFiniteGradientError(
                f"{self.consecutive_skips} steps in a row had non-finite gradients and the loss scale is at its "
                f"minimum of {self.min_scale:g} (fp16.min_loss_scale). Training does not recover by itself: lower the "
                "learning rate, clip gradients, use bf16, or look at the parameter named in the log "
                "(fp16.consecutive_skip_limit sets how many skipped steps are tolerated; 0: any number)."
            )
        if self.cur_hysteresis > 1:
            self.cur_hysteresis -= 1
            log_dist(f"overflow at loss scale {self.cur_scale:g}: step skipped, hysteresis now {self.cur_hysteresis}")
        else:
            old = self.cur_scale
            self.cur_scale = max(self.cur_scale / self.scale_factor, self.min_scale)
            log_dist(f"overflow at loss scale {old:g}: step skipped, loss scale now {self.cur_scale:g}")

    def _maybe_grow(self) -> None:
        self.consecutive_skips = 0
        if self.consecutive_hysteresis:
            self.cur_hysteresis = self.delayed_shift
        if (self.cur_iter - self.last_overflow_iter) % self.scale_window == 0:
            if not self.consecutive_hysteresis:
                self.cur_hysteresis = self.delayed_shift
            self.cur_scale *= self.scale_factor


def make_loss_scaler(fp16: Any) -> LossScalerBase:
    """The scaler for an ``fp16`` config section; a constant 1 if it is off."""
    if not fp16.enabled:
        return LossScaler(1.0)
    limit = fp16.consecutive_skip_limit
    if fp16.loss_scale > 0:
        return LossScaler(fp16.loss_scale, consecutive_skip_limit=limit)
    return DynamicLossScaler(
        init_scale=2.0**fp16.initial_scale_power,
        scale_window=fp16.loss_scale_window,
        min_scale=fp16.min_loss_scale,
        delayed_shift=fp16.hysteresis,
        consecutive_hysteresis=fp16.consecutive_hysteresis,
        consecutive_skip_limit=limit,
    )
