"""Adagrad under its documented name (config reference, optimizer ``Adagrad``)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from deepspeed._core.step.kernels import adagrad_
from deepspeed.ops.flat_optimizer import FlatOptimizer

__all__ = ["DeepSpeedCPUAdagrad"]


class DeepSpeedCPUAdagrad(FlatOptimizer):
    """Adagrad in one pass over memory; same update as ``torch.optim.Adagrad``.

    Args:
        model_params: parameters or group dicts (kept as the same objects, see :class:`FlatOptimizer`). Groups may
            also carry torch's ``lr_decay`` and ``initial_accumulator_value``, which are honoured.
        lr: learning rate.
        eps: added to the root of the sum of squares.
        weight_decay: L2 penalty.
        amsgrad: not supported; True raises ``ConfigError``.
        fp32_optimizer_states: keep the sum in fp32 for weights of any dtype; False: in the weights' dtype.
        adamw_mode: accepted because clients pass it to every CPU optimizer; Adagrad has no such mode.
        lr_decay: the rate of step t is ``lr / (1 + (t - 1) * lr_decay)``.
        initial_accumulator_value: start of the sum of squares.

    State of a parameter, as in torch: ``step``, ``sum``.
    """

    state_names = ("sum",)

    def __init__(
        self,
        model_params: Iterable[Any],
        lr: float = 1e-2,
        eps: float = 1e-10,
        weight_decay: float = 0,
        amsgrad: bool = False,
        fp32_optimizer_states: bool = True,
        *,
        adamw_mode: bool = False,
        lr_decay: float = 0.0,
        initial_accumulator_value: float = 0.0,
    ) -> None:
        del adamw_mode
        defaults = {
            "lr": lr,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "lr_decay": lr_decay,
            "initial_accumulator_value": initial_accumulator_value,
        }
        super().__init__(model_params, defaults, fp32_optimizer_states=fp32_optimizer_states)

    def _init_state(self, p: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        super()._init_state(p, state, group)
        state["sum"].fill_(float(group["initial_accumulator_value"]))

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
        adagrad_(
            p,
            grad,
            state["sum"].view(-1),
            step=step,
            lr=float(group["lr"]),
            lr_decay=float(group["lr_decay"]),
            eps=float(group["eps"]),
            weight_decay=float(group["weight_decay"]),
            grad_scale=grad_scale,
            lowp_out=lowp_out,
        )
