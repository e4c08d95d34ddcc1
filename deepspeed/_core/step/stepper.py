"""From reduced gradients to new weights: two ways to run an optimizer over the buckets' masters.

:class:`KernelStepper` drives our own optimizers tensor by tensor: gradients of any dtype come in, clipping and
unscaling ride along as one factor, 16-bit weights leave in the same pass, and a bucket's weights travel to the other
ranks while the next bucket is computed. :class:`TorchStepper` runs any ``torch.optim.Optimizer`` over the same tensors.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch

from deepspeed._core.reduce.bucket import Bucket
from deepspeed._core.reduce.transport import Pending
from deepspeed._core.step.native import replicas_agree

__all__ = ["KernelStepper", "Stepper", "TensorOptimizer", "TorchStepper", "UpdateItem", "items_of", "make_stepper"]


@runtime_checkable
class TensorOptimizer(Protocol):
    """An optimizer that can update one flat tensor from a gradient of any float dtype."""

    param_groups: list[dict[str, Any]]

    def step_tensor(
        self,
        p: torch.Tensor,
        grad: torch.Tensor,
        group: dict[str, Any],
        *,
        grad_scale: float = 1.0,
        lowp_out: torch.Tensor | None = None,
    ) -> None:
        """Updates ``p`` (fp32) in place with ``grad * grad_scale``; writes its rounding to ``lowp_out``, if given."""


@dataclass(frozen=True)
class UpdateItem:
    """One tensor the optimizer updates, with where its gradient comes from and where its 16-bit copy goes."""

    master: torch.Tensor
    grad: torch.Tensor
    weights: torch.Tensor
    """The part of the model's weights that ``master`` stands for; the same memory in fp32."""

    @property
    def aliased(self) -> bool:
        return self.master.dtype == self.weights.dtype and self.master.data_ptr() == self.weights.data_ptr()


def items_of(bucket: Bucket, *, whole_parameters: bool) -> Iterator[UpdateItem]:
    """The tensors of a bucket that this rank updates: its slice, or (stage 0) every parameter by itself."""
    if not whole_parameters:
        yield UpdateItem(bucket.master, bucket.grad_shard, bucket.own_weights)
        return
    if bucket.grad_full is None:
        raise AssertionError(f"bucket {bucket.index} has no reduced gradient; please report this")
    for slot in bucket.slots:
        yield UpdateItem(slot.view(bucket.master), slot.view(bucket.grad_full), slot.view(bucket.weights))


class Stepper(Protocol):
    """Updates all buckets with gradients times ``factor``; ``publish`` starts a bucket's all-gather."""

    def update(self, buckets: Sequence[Bucket], factor: float, publish: Callable[[Bucket], Pending]) -> None: ...


class KernelStepper:
    """Runs a :class:`TensorOptimizer`. ``masters`` are the very tensors in its groups, by bucket index."""

    def __init__(self, optimizer: TensorOptimizer, masters: dict[int, list[torch.Tensor]], whole: bool) -> None:
        self._optimizer = optimizer
        self._masters = masters
        self._whole = whole

    def update(self, buckets: Sequence[Bucket], factor: float, publish: Callable[[Bucket], Pending]) -> None:
        # torch's schedulers look for this mark of Optimizer.step(), which does not run here.
        self._optimizer._opt_called = True  # type: ignore[attr-defined]
        pending = []
        for bucket in buckets:
            group = self._optimizer.param_groups[bucket.group_index]
            items = items_of(bucket, whole_parameters=self._whole)
            for master, item in zip(self._masters[bucket.index], items, strict=True):
                lowp = None if item.aliased else item.weights
                with replicas_agree() if self._whole else contextlib.nullcontext():
                    self._optimizer.step_tensor(master, item.grad, group, grad_scale=factor, lowp_out=lowp)
            pending.append(publish(bucket))
        for gather in pending:
            gather.wait()


class TorchStepper:
    """Runs any torch optimizer: gradients go to the masters' ``.grad`` in the masters' dtype, then ``step()``."""

    def __init__(self, optimizer: torch.optim.Optimizer, masters: dict[int, list[torch.Tensor]], whole: bool) -> None:
        self._optimizer = optimizer
        self._masters = masters
        self._whole = whole

    def update(self, buckets: Sequence[Bucket], factor: float, publish: Callable[[Bucket], Pending]) -> None:
        for bucket in buckets:
            items = items_of(bucket, whole_parameters=self._whole)
            for master, item in zip(self._masters[bucket.index], items, strict=True):
                grad = item.grad.to(master.dtype)
                master.grad = grad if factor == 1.0 else grad.mul_(factor)
        self._optimizer.step()
        pending = []
        for bucket in buckets:
            items = items_of(bucket, whole_parameters=self._whole)
            for master, item in zip(self._masters[bucket.index], items, strict=True):
                master.grad = None
                if not item.aliased:
                    item.weights.copy_(master.detach())
            pending.append(publish(bucket))
        for gather in pending:
            gather.wait()


def make_stepper(optimizer: torch.optim.Optimizer, masters: dict[int, list[torch.Tensor]], *, whole: bool) -> Stepper:
    """The fast path where the optimizer offers it, the general one otherwise.

    Step hooks and closures of a torch optimizer run only in the general one.
    """
    if isinstance(optimizer, TensorOptimizer):
        return KernelStepper(optimizer, masters, whole)
    return TorchStepper(optimizer, masters, whole)
