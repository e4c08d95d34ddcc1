"""Adam and AdamW under their two documented names (API documentation, chapter 9.1).

In a config, the type ``Adam`` or ``AdamW`` makes one of them; the config keys ``torch_adam`` (use ``torch.optim``'s)
and ``adam_w_mode`` (decoupled weight decay, the default) are read by ``deepspeed.ops.registry``, not here.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from deepspeed._core.step.kernels import adam_, adam_many_, compute_dtype
from deepspeed.ops.flat_optimizer import FlatOptimizer

__all__ = ["DeepSpeedCPUAdam", "FusedAdam"]

# Larger tensors gain nothing from sharing a call, and on the CPU have a faster way of their own.
BATCH_MAX_NUMEL = 1 << 20


class _Adam(FlatOptimizer):
    state_names = ("exp_avg", "exp_avg_sq")
    _modes = (*FlatOptimizer._modes, "adam_w_mode")

    adam_w_mode: bool = True
    """True: decoupled weight decay (AdamW); False: L2 penalty added to the gradient."""

    def _rule(self, group: dict[str, Any]) -> dict[str, Any]:
        return {
            "lr": float(group["lr"]),
            "betas": [float(b) for b in group["betas"]],
            "eps": float(group["eps"]),
            "weight_decay": float(group["weight_decay"]),
            "decoupled": self.adam_w_mode,
            "bias_correction": bool(group["bias_correction"]),
        }

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
        m, v = state["exp_avg"].view(-1), state["exp_avg_sq"].view(-1)
        adam_(p, grad, m, v, step=step, grad_scale=grad_scale, lowp_out=lowp_out, **self._rule(group))

    @torch.no_grad()
    def step_tensors(
        self, params: Sequence[Tensor], grads: Sequence[Tensor], group: dict[str, Any], *, grad_scale: float = 1.0
    ) -> None:
        """See :meth:`FlatOptimizer.step_tensors`. Small tensors that need no conversion go in few fused calls."""
        batches: dict[tuple[float, torch.dtype, torch.device], list[tuple[Tensor, Tensor]]] = {}
        for p, grad in zip(params, grads, strict=True):
            state = self._state_of(p, group)
            tensors = (p, grad, state["exp_avg"], state["exp_avg_sq"])
            if (
                grad_scale == 1.0
                and p.numel() < BATCH_MAX_NUMEL
                and p.numel() == grad.numel()
                and all(_is_plain(t, compute_dtype(p)) for t in tensors)
            ):
                batches.setdefault((float(state["step"]), p.dtype, p.device), []).append((p, grad))
            else:
                self.step_tensor(p, grad, group, grad_scale=grad_scale)
        for (done, _, _), batch in batches.items():
            states = [self.state[p] for p, _ in batch]
            for state in states:
                state["step"].add_(1.0)
            adam_many_(
                [p.detach() for p, _ in batch],
                [grad.detach().view_as(p) for p, grad in batch],
                [s["exp_avg"] for s in states],
                [s["exp_avg_sq"] for s in states],
                step=done + 1.0,
                **self._rule(group),
            )


def _is_plain(t: Tensor, dtype: torch.dtype) -> bool:
    return t.layout is torch.strided and t.dtype == dtype and t.is_contiguous() and t.numel() > 0


class DeepSpeedCPUAdam(_Adam):
    """Adam whose step runs at memory bandwidth; meant for weights and state in host memory, works on any device.

    Args:
        model_params: parameters or group dicts (kept as the same objects, see :class:`FlatOptimizer`).
        lr: learning rate.
        bias_correction: divide the moments by ``1 - beta ** step``.
        betas: decay of the running means of the gradient and of its square.
        eps: added to the root of the second moment.
        weight_decay: decay rate.
        amsgrad: not supported; True raises ``ConfigError``.
        adamw_mode: True for decoupled weight decay (AdamW), False for an L2 penalty (Adam).
        fp32_optimizer_states: keep the moments in fp32 for weights of any dtype; False: in the weights' dtype.

    State of a parameter, as in ``torch.optim.AdamW``: ``step``, ``exp_avg``, ``exp_avg_sq``.
    """

    def __init__(
        self,
        model_params: Iterable[Any],
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        adamw_mode: bool = True,
        fp32_optimizer_states: bool = True,
    ) -> None:
        self.adam_w_mode = bool(adamw_mode)
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "bias_correction": bias_correction,
            "amsgrad": amsgrad,
        }
        super().__init__(model_params, defaults, fp32_optimizer_states=fp32_optimizer_states)


class FusedAdam(_Adam):
    """Adam with a fused update over many parameters; a drop-in replacement for ``torch.optim.AdamW``.

    With ``adam_w_mode=False`` it replaces ``torch.optim.Adam``. Runs on CPU and CUDA.

    Args:
        params: parameters or group dicts (kept as the same objects, see :class:`FlatOptimizer`).
        lr: learning rate.
        bias_correction: divide the moments by ``1 - beta ** step``.
        betas: decay of the running means of the gradient and of its square.
        eps: added to the root of the second moment.
        adam_w_mode: True for decoupled weight decay (AdamW), False for an L2 penalty.
        weight_decay: decay rate.
        amsgrad: not supported; True raises ``ConfigError``.
        set_grad_none: ``zero_grad()`` sets gradients to None rather than to zero.

    State of a parameter, as in ``torch.optim.AdamW``, in fp32 for weights of any dtype.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        adam_w_mode: bool = True,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        set_grad_none: bool = True,
    ) -> None:
        self.adam_w_mode = bool(adam_w_mode)
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "bias_correction": bias_correction,
            "amsgrad": amsgrad,
        }
        super().__init__(params, defaults, set_grad_none=set_grad_none)
