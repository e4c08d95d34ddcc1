"""Lion under its two documented names (config reference, optimizer ``Lion``)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from deepspeed._core.step.kernels import lion_
from deepspeed.ops.flat_optimizer import FlatOptimizer

__all__ = ["DeepSpeedCPULion", "FusedLion"]


class _Lion(FlatOptimizer):
    state_names = ("exp_avg",)

    def _update(
        self,
        p: Tensor,
        grad: Tensor,
        state: dict[str, Any],
        group: dict[str, Any],
        step: float,
        grad_scale: float,
        lowp_out: Tensor | None,
    ) -> None:
        lion_(
            p,
            grad,
            state["exp_avg"].view(-1),
            lr=float(group["lr"]),
            betas=[float(b) for b in group["betas"]],
            weight_decay=float(group["weight_decay"]),
            grad_scale=grad_scale,
            lowp_out=lowp_out,
        )


class DeepSpeedCPULion(_Lion):
    """Lion (Chen et al. 2023) in one pass over memory; for host memory, works on any device.

    Args:
        model_params: parameters or group dicts (kept as the same objects, see :class:`FlatOptimizer`).
        lr: learning rate.
        betas: weights of the momentum in the update's sign and in the momentum itself.
        weight_decay: decoupled decay rate.
        fp32_optimizer_states: keep the momentum in fp32 for weights of any dtype; False: in the weights' dtype.
        adamw_mode: accepted because clients pass it to every CPU optimizer; Lion has no such mode.

    State of a parameter: ``step``, ``exp_avg``.
    """

    def __init__(
        self,
        model_params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0,
        fp32_optimizer_states: bool = True,
        *,
        adamw_mode: bool = False,
    ) -> None:
        del adamw_mode
        defaults = {"lr": lr, "betas": betas, "weight_decay": weight_decay}
        super().__init__(model_params, defaults, fp32_optimizer_states=fp32_optimizer_states)


class FusedLion(_Lion):
    """Lion (Chen et al. 2023), on CPU and CUDA.

    Args:
        params: parameters or group dicts (kept as the same objects, see :class:`FlatOptimizer`).
        lr: learning rate.
        betas: weights of the momentum in the update's sign and in the momentum itself.
        weight_decay: decoupled decay rate.
        set_grad_none: ``zero_grad()`` sets gradients to None rather than to zero.

    State of a parameter, in fp32 for weights of any dtype: ``step``, ``exp_avg``.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.0,
        set_grad_none: bool = True,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay}, set_grad_none=set_grad_none)
