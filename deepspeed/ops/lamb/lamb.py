"""LAMB under its documented name (API documentation, chapter 9.1.3)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from deepspeed._core.step.kernels import lamb_
from deepspeed.errors import ConfigError
from deepspeed.ops.flat_optimizer import FlatOptimizer

__all__ = ["FusedLamb"]


class FusedLamb(FlatOptimizer):
    """LAMB (You et al. 2020, https://arxiv.org/abs/1904.00962), on CPU and CUDA.

    The update of a parameter is scaled by its coefficient ``clamp(|p| / |update|, min_coeff, max_coeff)``. The norms
    are those of the whole parameter: ``step_tensor`` must be given whole parameters, never shards.

    Args:
        params: parameters or group dicts (kept as the same objects, see :class:`FlatOptimizer`).
        lr: learning rate.
        bias_correction: divide the moments by ``1 - beta ** step``.
        betas: decay of the running means of the gradient and of its square.
        eps: added to the root of the second moment.
        eps_inside_sqrt: add ``eps`` to the bias-corrected second moment before its root instead.
        weight_decay: decay rate, part of the update whose norm is taken.
        max_grad_norm: ``step()`` clips the global norm of all its gradients to this; 0 is off. It does not act in
            ``step_tensor``, which gets the clip factor from its caller.
        max_coeff: upper bound of the coefficient.
        min_coeff: lower bound of the coefficient.
        amsgrad: not supported; True raises ``ConfigError``.
        set_grad_none: ``zero_grad()`` sets gradients to None rather than to zero.

    State of a parameter, in fp32 for weights of any dtype: ``step``, ``exp_avg``, ``exp_avg_sq``.
    """

    state_names = ("exp_avg", "exp_avg_sq")
    needs_whole_params = True
    _modes = (*FlatOptimizer._modes, "eps_inside_sqrt", "max_grad_norm", "_coeffs")

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        eps_inside_sqrt: bool = False,
        weight_decay: float = 0.0,
        max_grad_norm: float = 0.0,
        max_coeff: float = 10.0,
        min_coeff: float = 0.01,
        amsgrad: bool = False,
        *,
        set_grad_none: bool = True,
    ) -> None:
        if not 0.0 <= min_coeff <= max_coeff:
            raise ConfigError(
                f"FusedLamb: 0 <= min_coeff <= max_coeff must hold, but they are {min_coeff}, {max_coeff}"
            )
        self.eps_inside_sqrt = bool(eps_inside_sqrt)
        self.max_grad_norm = float(max_grad_norm)
        self._coeffs: dict[Tensor, Tensor] = {}
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "bias_correction": bias_correction,
            "max_coeff": max_coeff,
            "min_coeff": min_coeff,
            "amsgrad": amsgrad,
        }
        super().__init__(params, defaults, set_grad_none=set_grad_none)

    def get_lamb_coeffs(self) -> list[float]:
        """The coefficient of the latest update of each parameter, in the order of the groups.

        Parameters that were never updated are left out. Reads from the device, so it waits for it.
        """
        params = (p for group in self.param_groups for p in group["params"])
        return [float(self._coeffs[p]) for p in params if p in self._coeffs]

    @torch.no_grad()
    def step_tensor(
        self,
        p: Tensor,
        grad: Tensor,
        group: dict[str, Any],
        *,
        grad_scale: float = 1.0,
        lowp_out: Tensor | None = None,
    ) -> None:
        """As :meth:`FlatOptimizer.step_tensor`; ``p`` must be a whole parameter, since its norm enters the update."""
        super().step_tensor(p, grad, group, grad_scale=grad_scale, lowp_out=lowp_out)
        if p.numel() > 0:
            self._coeffs[p] = self._latest_coeff

    def _grad_scale_of_step(self) -> float:
        if self.max_grad_norm <= 0.0:
            return 1.0
        grads = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        if not grads:
            return 1.0
        norm = float(torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g.float()).cpu() for g in grads])))
        return min(1.0, self.max_grad_norm / (norm + 1e-6))  # the epsilon of torch.nn.utils.clip_grad_norm_

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
        self._latest_coeff = lamb_(
            p,
            grad,
            state["exp_avg"].view(-1),
            state["exp_avg_sq"].view(-1),
            step=step,
            lr=float(group["lr"]),
            betas=[float(b) for b in group["betas"]],
            eps=float(group["eps"]),
            weight_decay=float(group["weight_decay"]),
            min_coeff=float(group["min_coeff"]),
            max_coeff=float(group["max_coeff"]),
            bias_correction=bool(group["bias_correction"]),
            eps_inside_sqrt=self.eps_inside_sqrt,
            grad_scale=grad_scale,
            lowp_out=lowp_out,
        )
