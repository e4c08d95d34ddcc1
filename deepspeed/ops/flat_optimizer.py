"""What our optimizers share: fp32 state over weights of any dtype, a fused step on flat shards, live group dicts.

An optimizer here is used in two ways. Alone, it is an ordinary ``torch.optim.Optimizer``: ``step()`` updates every
parameter from its ``.grad``. Under ZeRO, the engine owns flat fp32 shards and calls :meth:`FlatOptimizer.step_tensor`
on each, which takes the gradient in whatever dtype it was reduced, the factor that unscales and clips it, and the
16-bit weights to write, and does all of it in one pass over memory.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from deepspeed._core.pages import zeros_flat
from deepspeed._core.step.kernels import check_flat, compute_dtype
from deepspeed.errors import ConfigError

__all__ = ["FlatOptimizer"]

# torch wraps this method so that its first call imports torch._dynamo, over a second; there is nothing to trace here.
_plain_add_param_group = inspect.unwrap(torch.optim.Optimizer.add_param_group)

# Options of torch's groups that change the result and that the update rules here do not have. Groups taken over from
# a torch optimizer carry them; those that only choose an implementation (foreach, fused, capturable) are fine.
_UNSUPPORTED = {
    "amsgrad": "the AMSGrad variant is not supported",
    "maximize": "maximizing is not supported; negate the loss",
    "differentiable": "differentiating through the step is not supported",
}


_STAGGER_NBYTES = 1088
_STAGGER_FROM_NUMEL = 1 << 20


def _staggered_zeros(p: Tensor, dtype: torch.dtype, index: int) -> Tensor:
    """Zeros shaped as ``p``; of large CPU tensors, at another offset in the page for each ``index``.

    Large allocations all start at the same offset in a page, and streams in step with each other then meet in the same
    cache sets and memory banks: staggered, the step over 33M elements took 17.6 ms instead of 19.4.
    """
    if p.device.type != "cpu" or p.numel() < _STAGGER_FROM_NUMEL:
        return torch.zeros(p.shape, dtype=dtype, device=p.device)
    skip = index * _STAGGER_NBYTES // dtype.itemsize
    return zeros_flat(p.numel() + skip, dtype)[skip:].view(p.shape)


class FlatOptimizer(torch.optim.Optimizer):
    """Base of our optimizers. Subclasses name their state tensors and implement :meth:`_update` on flat tensors.

    Args:
        params: parameters, ``(name, parameter)`` pairs, or group dicts. Group dicts are kept as the same objects, also
            through :meth:`load_state_dict`, so that a scheduler bound to them stays bound. Keys that they already
            have (also from another optimizer: ``foreach``, ``fused``, ``initial_lr``) win over the defaults.
        defaults: hyperparameters of groups that do not set them.
        fp32_optimizer_states: keep the state in fp32 for weights of any dtype; False keeps it in the weights' dtype.
        set_grad_none: what :meth:`zero_grad` does when it is not told.

    Raises:
        ConfigError: a hyperparameter is out of range or names a variant that is not supported.
    """

    state_names: tuple[str, ...] = ()
    """State tensors of a parameter, each of its shape, beside ``step`` (0-d fp32 CPU tensor, counted from 1)."""

    _modes: tuple[str, ...] = ("fp32_optimizer_states", "set_grad_none")

    needs_whole_params: bool = False
    """True if the update of an element depends on the whole parameter, so that a shard cannot be updated alone."""

    def __init__(
        self,
        params: Iterable[Any],
        defaults: dict[str, Any],
        *,
        fp32_optimizer_states: bool = True,
        set_grad_none: bool = True,
    ) -> None:
        self.fp32_optimizer_states = fp32_optimizer_states
        self.set_grad_none = set_grad_none
        super().__init__(params, defaults)

    # ----------------------------------------------------------------------------------------------- groups, state

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As ``torch.optim.Optimizer.add_param_group``; the dict itself is kept. Raises ``ConfigError``."""
        for key, why in _UNSUPPORTED.items():
            if param_group.get(key, self.defaults.get(key, False)):
                raise ConfigError(f"{type(self).__name__}: {key}=True was given, but {why}; set {key}=False")
        self._check_group({**self.defaults, **param_group})
        _plain_add_param_group(self, param_group)

    def _check_group(self, group: dict[str, Any]) -> None:
        who = type(self).__name__
        for key in ("lr", "eps", "weight_decay"):
            value = group.get(key, 0.0)
            if not isinstance(value, (int, float, Tensor)) or isinstance(value, bool) or not float(value) >= 0.0:
                raise ConfigError(f"{who}: {key} must be a number >= 0, but is {value!r}")
        betas = group.get("betas", (0.0, 0.0))
        if not isinstance(betas, (tuple, list)) or len(betas) != 2 or not all(_is_beta(b) for b in betas):
            raise ConfigError(f"{who}: betas must be two numbers in [0, 1), but is {betas!r}")

    def _init_state(self, p: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        dtype = compute_dtype(p) if self.fp32_optimizer_states else p.dtype
        state["step"] = torch.zeros((), dtype=torch.float32)
        for index, name in enumerate(self.state_names):
            state[name] = _staggered_zeros(p, dtype, index + 1)

    def _state_of(self, p: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        state = self.state[p]
        if not state:
            self._init_state(p, state, group)
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, except that group dicts stay the same objects and fp32 state of 16-bit weights stays exact.

        Accepts what ``torch.optim``'s optimizer of the same rule saved, and an int or a tensor as ``step``.
        """
        groups, dicts = self.param_groups, list(self.param_groups)
        super().load_state_dict(state_dict)
        for mine, loaded in zip(dicts, self.param_groups, strict=True):
            mine.clear()
            mine.update({**self.defaults, **loaded})
        groups[:] = dicts
        self.param_groups = groups
        saved_ids = [i for group in state_dict["param_groups"] for i in group["params"]]
        params = [p for group in dicts for p in group["params"]]
        for saved_id, p in zip(saved_ids, params, strict=True):
            if saved_id in state_dict["state"]:
                self._restore_exact(p, state_dict["state"][saved_id])

    def _restore_exact(self, p: Tensor, saved: dict[str, Any]) -> None:
        # torch's loader casts each state tensor to the parameter's dtype, which would round fp32 state of bf16
        # weights, and moves `step` to the device of a fused group, which would make each step wait for it.
        state = self.state[p]
        if "step" in saved:
            state["step"] = torch.tensor(float(saved["step"]), dtype=torch.float32)
        dtype = compute_dtype(p) if self.fp32_optimizer_states else p.dtype
        for name in self.state_names:
            value = saved.get(name)
            if isinstance(value, Tensor) and (state[name].dtype != dtype or not state[name].is_contiguous()):
                state[name] = value.to(device=p.device, dtype=dtype, copy=True).contiguous()

    def __getstate__(self) -> dict[str, Any]:
        # torch's keeps groups, state and defaults only; a copied or unpickled optimizer must also keep its modes.
        inherited = torch.optim.Optimizer.__getstate__(self)
        own = {k: v for k, v in self.__dict__.items() if k in self._modes}
        return {**inherited, **own}

    def zero_grad(self, set_to_none: bool | None = None) -> None:
        """Clears gradients; ``None`` means what the constructor's ``set_grad_none`` says."""
        super().zero_grad(self.set_grad_none if set_to_none is None else set_to_none)

    # ------------------------------------------------------------------------------------------------------- steps

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Updates every parameter that has a gradient. Not collective. Gradients are not changed.

        ``closure``, if given, is called with gradients enabled before the update, and its result is returned.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        scale = self._grad_scale_of_step()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            self.step_tensors(params, [p.grad for p in params], group, grad_scale=scale)
        return loss

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
        """Updates one tensor with the hyperparameters of ``group``, in one pass over memory.

        Args:
            p: master weights of any shape and floating dtype; updated in place; the key of ``self.state``. Where
                :attr:`needs_whole_params` is True it must be a whole parameter, not a shard of one.
            grad: as many elements as ``p``, any floating dtype, any shape. The caller must not rely on its contents
                afterwards (today it is left as it is).
            group: the dict of ``self.param_groups`` that ``p`` belongs to.
            grad_scale: factor on the gradient: 1 / loss scale times the clip factor.
            lowp_out: contiguous tensor of as many elements that receives the updated weights, rounded to its dtype.

        Raises:
            ValueError: a tensor does not fit ``p`` in numel, device, layout or dtype.
        """
        if grad.dtype != p.dtype or grad.shape != p.shape or lowp_out is not None or grad.layout is not torch.strided:
            check_flat(p, {"grad": grad, "lowp_out": lowp_out})
        if lowp_out is not None and not lowp_out.is_contiguous():
            raise ValueError(f"lowp_out must be contiguous, but has strides {lowp_out.stride()}")
        state = self._state_of(p, group)
        step = float(state["step"].add_(1.0))
        if p.numel() == 0:
            return
        # Rules work on flat memory. Weights in another memory format (channels_last) are copied there and back.
        flat = p.detach().contiguous().view(-1)
        out = None if lowp_out is None else lowp_out.detach().view(-1)
        self._update(flat, grad.detach().reshape(-1), state, group, step, float(grad_scale), out)
        if not p.is_contiguous():
            p.copy_(flat.view(p.shape))

    @torch.no_grad()
    def step_tensors(
        self, params: Sequence[Tensor], grads: Sequence[Tensor], group: dict[str, Any], *, grad_scale: float = 1.0
    ) -> None:
        """:meth:`step_tensor` for many tensors of a group, with as many gradients; rules may take several at once."""
        for p, grad in zip(params, grads, strict=True):
            self.step_tensor(p, grad, group, grad_scale=grad_scale)

    def _grad_scale_of_step(self) -> float:
        """The factor on all gradients of this ``step()``; for rules that clip by themselves."""
        return 1.0

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
        """The rule on flat tensors; state tensors have p's original shape and are contiguous."""
        raise AssertionError(f"{type(self).__name__} does not define its update rule; please report this")


def _is_beta(value: object) -> bool:
    return isinstance(value, (int, float, Tensor)) and 0.0 <= float(value) < 1.0
