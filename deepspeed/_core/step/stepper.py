"""From reduced gradients to new weights: two ways to run an optimizer over the buckets' masters.

:class:`KernelStepper` drives our own optimizers tensor by tensor: gradients of any dtype come in, clipping and
unscaling ride along as one factor, 16-bit weights leave in the same pass, and a bucket's weights travel to the other
ranks while the next bucket is computed. :class:`TorchStepper` runs any ``torch.optim.Optimizer`` over the same tensors.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import torch

from deepspeed._core.reduce.bucket import Bucket
from deepspeed._core.reduce.transport import Pending
from deepspeed._core.step.native import replicas_agree
from deepspeed._core.store.states import ShardStates
from deepspeed._core.store.tiles import Tile
from deepspeed._core.store.transit import Transit

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

    def step_tensors(
        self,
        params: Sequence[torch.Tensor],
        grads: Sequence[torch.Tensor],
        group: dict[str, Any],
        *,
        grad_scale: float = 1.0,
    ) -> None:
        """:meth:`step_tensor` for many tensors."""


@dataclass(frozen=True)
class UpdateItem:
    """One tensor the optimizer updates, with where its gradient comes from and where its 16-bit copy goes."""

    master: torch.Tensor
    grad: torch.Tensor
    weights: torch.Tensor
    """The part of the model's weights that ``master`` stands for; the same memory in fp32."""
    tile: Tile | None = None
    """What to open for ``master`` to have its values; None if it always has."""

    @property
    def aliased(self) -> bool:
        return self.master.dtype == self.weights.dtype and self.master.data_ptr() == self.weights.data_ptr()


def items_of(bucket: Bucket, states: ShardStates | None) -> Iterator[UpdateItem]:
    """The tensors of a bucket that this rank updates: the tiles of its slice, or (stage 0, no states) every parameter."""
    if states is not None:
        for tile in states.tiles(bucket):
            part = slice(tile.begin, tile.end)
            yield UpdateItem(tile.param, bucket.grad_shard[part], bucket.own_weights[part], tile)
        return
    if bucket.grad_full is None:
        raise AssertionError(f"bucket {bucket.index} has no reduced gradient; please report this")
    for slot in bucket.slots:
        yield UpdateItem(slot.view(bucket.master), slot.view(bucket.grad_full), slot.view(bucket.weights))


def _grads_of(bucket: Bucket, states: ShardStates | None) -> list[torch.Tensor]:
    """The gradients of :func:`items_of`, without asking for the weights, which some buckets make when they are asked."""
    if states is not None:
        return [bucket.grad_shard[tile.begin : tile.end] for tile in states.tiles(bucket)]
    return [item.grad for item in items_of(bucket, None)]


class Stepper(Protocol):
    """Updates all buckets with gradients times ``factor``; ``publish`` starts a bucket's all-gather."""

    def update(self, buckets: Sequence[Bucket], factor: float, publish: Callable[[Bucket], Pending]) -> None: ...


Publish = Callable[[Bucket], Pending]


def _in_turn(
    buckets: Sequence[Bucket], states: ShardStates, step: Callable[[Bucket, UpdateItem], None], publish: Publish
) -> None:
    """Steps tensor by tensor, while the weights of buckets that are done travel.

    If a tile cannot be read or written, the other ranks still get what they wait for, and the error is raised then.
    """
    pending: list[Pending] = []
    failure: Exception | None = None
    try:
        with states.updating(buckets) as update:
            for bucket in buckets:
                for item in items_of(bucket, states):
                    with update.open(item.tile) if item.tile is not None else contextlib.nullcontext():
                        step(bucket, item)
                pending.append(publish(bucket))
    except OSError as error:
        failure = error
        pending += [publish(bucket) for bucket in buckets[len(pending) :]]
    for gather in pending:
        gather.wait()
    if failure is not None:
        raise failure


class KernelStepper:
    """Runs a :class:`TensorOptimizer`.

    Args:
        optimizer: what is run; the tensors in its groups are those of ``states`` or ``masters``.
        masters: by bucket index; for stage 0, which has no ``states``.
        states: the shards.
        transit: how gradients and weights reach tiles on another device.
    """

    def __init__(
        self,
        optimizer: TensorOptimizer,
        masters: dict[int, list[torch.Tensor]],
        states: ShardStates | None,
        transit: Transit | None = None,
    ) -> None:
        self._optimizer, self._masters, self._states, self._transit = optimizer, masters, states, transit

    def update(self, buckets: Sequence[Bucket], factor: float, publish: Publish) -> None:
        # torch's schedulers look for this mark of Optimizer.step(), which does not run here.
        self._optimizer._opt_called = True  # type: ignore[attr-defined]
        if self._states is not None:
            _in_turn(buckets, self._states, lambda bucket, item: self._step(bucket, item, factor), publish)
            return
        pending = []
        for bucket in buckets:
            with replicas_agree():
                self._step_whole(bucket, factor)
            pending.append(publish(bucket))
        for gather in pending:
            gather.wait()

    def _step_whole(self, bucket: Bucket, factor: float) -> None:
        """Every parameter of a bucket (stage 0)."""
        items = list(items_of(bucket, None))
        # The state belongs to the tensors in the groups, of which items are views.
        masters = self._masters[bucket.index]
        if all(item.aliased for item in items):
            grads = [item.grad for item in items]
            self._optimizer.step_tensors(
                masters, grads, self._optimizer.param_groups[bucket.group_index], grad_scale=factor
            )
            return
        for item, master in zip(items, masters, strict=True):
            self._step(bucket, replace(item, master=master), factor)

    def _step(self, bucket: Bucket, item: UpdateItem, factor: float) -> None:
        group = self._optimizer.param_groups[bucket.group_index]
        if self._transit is None or item.master.device == item.grad.device:
            lowp = None if item.aliased else item.weights
            self._optimizer.step_tensor(item.master, item.grad, group, grad_scale=factor, lowp_out=lowp)
            return
        room = self._transit.room(item.weights)
        grad = self._transit.to_host(item.grad)
        self._optimizer.step_tensor(item.master, grad, group, grad_scale=factor, lowp_out=room)
        self._transit.send(room, item.weights)


class TorchStepper:
    """Runs any torch optimizer: gradients go to the masters' ``.grad`` in the masters' dtype, then ``step()``.

    All at once where all are in memory; else tile by tile, each as if it were the only one.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, masters: dict[int, list[torch.Tensor]], states: ShardStates | None
    ) -> None:
        self._optimizer, self._masters, self._states = optimizer, masters, states

    def update(self, buckets: Sequence[Bucket], factor: float, publish: Publish) -> None:
        if self._states is not None and self._states.files is not None:
            self._update_in_turn(buckets, self._states, factor, publish)
            return
        for bucket in buckets:
            for master, grad in zip(self._masters[bucket.index], _grads_of(bucket, self._states), strict=True):
                self._give_grad(master, grad, factor)
        self._optimizer.step()
        pending = []
        for bucket in buckets:
            for master, item in zip(self._masters[bucket.index], items_of(bucket, self._states), strict=True):
                master.grad = None
                if not item.aliased:
                    item.weights.copy_(master.detach())
            pending.append(publish(bucket))
        for gather in pending:
            gather.wait()

    def _update_in_turn(self, buckets: Sequence[Bucket], states: ShardStates, factor: float, publish: Publish) -> None:
        groups = self._optimizer.param_groups
        params = [group["params"] for group in groups]
        options = [{key: value for key, value in group.items() if key != "params"} for group in groups]

        def step(bucket: Bucket, item: UpdateItem) -> None:
            for group, before in zip(groups, options, strict=True):
                group.update(before)  # some count steps there, and this is one step
                group["params"] = []
            groups[bucket.group_index]["params"] = [item.master]
            self._give_grad(item.master, item.grad, factor)
            try:
                self._optimizer.step()
            finally:
                item.master.grad = None
            if not item.aliased:
                item.weights.copy_(item.master.detach())

        try:
            _in_turn(buckets, states, step, publish)
        finally:
            for group, held in zip(groups, params, strict=True):
                group["params"] = held

    @staticmethod
    def _give_grad(master: torch.Tensor, reduced: torch.Tensor, factor: float) -> None:
        grad = reduced.to(device=master.device, dtype=master.dtype)
        master.grad = grad if factor == 1.0 else grad.mul_(factor)


def make_stepper(
    optimizer: torch.optim.Optimizer,
    masters: dict[int, list[torch.Tensor]],
    states: ShardStates | None,
    transit: Transit | None = None,
) -> Stepper:
    """The fast path where the optimizer offers it, the general one otherwise.

    Step hooks and closures of a torch optimizer run only in the general one.
    """
    if isinstance(optimizer, TensorOptimizer):
        return KernelStepper(optimizer, masters, states, transit)
    return TorchStepper(optimizer, masters, states)
