"""A bucket: whole parameters in one flat buffer, whose slices belong to ranks.

Glossary. *Full buffer*: all elements of the bucket, with gaps for alignment and padding to a multiple of the world size.
*Slice*: the full buffer's part of one rank. *Shard*: a tensor that holds this rank's slice only. *Slot*: where one
parameter sits. Model parameters are views of ``weights``; ``master`` is the fp32 copy that the optimizer updates (the
weights themselves in fp32); ``grad_full`` holds local gradients, ``grad_shard`` the reduced ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from deepspeed._core.checksum import fingerprint
from deepspeed._core.layout.flat import BucketPlan
from deepspeed._core.pages import empty_flat

__all__ = ["Bucket", "Slot"]


@dataclass(eq=False)
class Slot:
    """Where a parameter sits: elements [start, start + numel) of its bucket's full buffer."""

    name: str
    param: torch.nn.Parameter
    start: int
    numel: int
    bucket: Bucket = field(repr=False)

    def view(self, flat: torch.Tensor) -> torch.Tensor:
        """The parameter-shaped view into a full buffer of this bucket."""
        return flat[self.start : self.start + self.numel].view(self.param.shape)

    def overlap(self, rank: int) -> tuple[int, int, int]:
        """``(start in the parameter, start in the rank's slice, numel)`` of what the rank owns of this parameter."""
        low, high = rank * self.bucket.shard_numel, (rank + 1) * self.bucket.shard_numel
        begin, end = max(self.start, low), min(self.start + self.numel, high)
        if begin >= end:
            return 0, 0, 0
        return begin - self.start, begin - low, end - begin


class Bucket:
    """Storage and bookkeeping of one bucket; decides nothing. All buffers are 1-D."""

    away = False
    """Whether weights rest where they have to be fetched from."""

    def __init__(
        self,
        index: int,
        group_index: int,
        plan: BucketPlan,
        named: Sequence[tuple[str, torch.nn.Parameter]],
        *,
        rank: int,
        world_size: int,
        weight_dtype: torch.dtype,
        comm_dtype: torch.dtype,
        accum_dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.index = index
        self.group_index = group_index
        self.rank = rank
        self.world_size = world_size
        self.numel = plan.numel
        self.shard_numel = plan.numel // world_size
        self.weight_dtype = weight_dtype
        self.comm_dtype = comm_dtype
        self.accum_dtype = accum_dtype
        self.device = device
        self.slots = [
            Slot(named[member][0], named[member][1], start, named[member][1].numel(), self)
            for member, start in zip(plan.members, plan.starts, strict=True)
        ]
        self.weights = torch.zeros(0)
        self.master = torch.zeros(0)
        # Whether weights in full precision have a master copy all the same: they are on another device, or in a file.
        self.separate_master = False
        self.grad_full: torch.Tensor | None = None
        self.grad_shard = torch.zeros(0)
        # Slots whose gradient of the current accumulation window lies in grad_full.
        self.touched: set[int] = set()
        # Slots that had any gradient in the window, reduced or not.
        self.seen: set[int] = set()
        # Slots that had a gradient in the backward that reduces.
        self.ready: set[int] = set()
        self.launched = False
        # Whether grad_shard holds a reduction of the current window.
        self.reduced = False
        self._gaps = self._find_gaps()
        self.position = {id(slot): i for i, slot in enumerate(self.slots)}

    def _find_gaps(self) -> list[tuple[int, int]]:
        gaps, end = [], 0
        for slot in self.slots:
            if slot.start > end:
                gaps.append((end, slot.start))
            end = slot.start + slot.numel
        if end < self.numel:
            gaps.append((end, self.numel))
        return gaps

    def slice_of(self, flat: torch.Tensor) -> torch.Tensor:
        """This rank's slice of a full buffer, a view."""
        return flat[self.rank * self.shard_numel : (self.rank + 1) * self.shard_numel]

    def collect(self, *, values: bool = True) -> torch.Tensor:
        """The parameters' values as they were given, in a new full buffer: what rank 0 broadcasts and :meth:`adopt` takes.

        fp32 if any of them is: a bf16 model built in fp32 keeps its fp32 values in the master copy. Without ``values``
        the buffer's memory is not even touched, for a rank that receives into all of it.
        """
        wide = any(slot.param.dtype == torch.float32 for slot in self.slots)
        source = empty_flat(self.numel, torch.float32 if wide else self.weight_dtype, self.device)
        if values:
            for low, high in self._gaps:
                source[low:high].zero_()
            for slot in self.slots:
                slot.view(source).copy_(slot.param.detach())
        return source

    @property
    def in_host_memory(self) -> bool:
        """Whether the parameters' values, as they were given, are."""
        return all(slot.param.device.type == "cpu" for slot in self.slots)

    def fingerprint(self) -> int:
        """Of the parameters' values, shapes and dtypes, which are in host memory."""

        def parts() -> Iterator[Any]:
            for slot in self.slots:
                yield f"{slot.param.dtype} {tuple(slot.param.shape)}".encode()
                if slot.numel:
                    yield slot.param.detach().reshape(-1).view(torch.uint8).numpy()

        return fingerprint(parts())

    def adopt(self, source: torch.Tensor, *, sharded_master: bool) -> None:
        """Points the parameters into a flat buffer with the values of ``source``, and makes the master copy."""
        self.weights = source if source.dtype == self.weight_dtype else source.to(self.weight_dtype)
        for slot in self.slots:
            slot.param.data = slot.view(self.weights)
        kept = self.slice_of(source) if sharded_master else source
        own_memory = self.full_precision or (kept is source and source is not self.weights)
        self.master = kept if own_memory else kept.to(torch.float32, copy=True)
        self.free_shard()  # the first reduction makes it

    @property
    def full_precision(self) -> bool:
        """Whether the weights are their own master copy."""
        return self.weight_dtype in (torch.float32, torch.float64) and not self.separate_master

    def hold_shard(self) -> None:
        """Makes ``grad_shard``, with unknown content, if its memory was given back."""
        if self.grad_shard.numel() != self.shard_numel:
            self.grad_shard = empty_flat(self.shard_numel, self.accum_dtype, self.device)

    def free_shard(self) -> None:
        """Gives the memory of ``grad_shard`` back; between windows it has no value that anyone needs."""
        self.grad_shard = torch.empty(0, dtype=self.accum_dtype, device=self.device)

    def use_grad_buffer(self, buffer: torch.Tensor) -> None:
        """Takes a full buffer with unknown content; gaps and padding are zeroed, since they are reduced, too."""
        for low, high in self._gaps:
            buffer[low:high].zero_()
        self.grad_full = buffer
        self.touched.clear()

    @property
    def own_weights(self) -> torch.Tensor:
        """This rank's part of the weights, 1-D."""
        return self.slice_of(self.weights)

    def own_part(self, slot: Slot) -> torch.Tensor:
        """This rank's elements of one weight, for reading; see :meth:`Slot.overlap`."""
        _, at, numel = slot.overlap(self.rank)
        return self.own_weights[at : at + numel]

    def grad_view(self, position: int) -> torch.Tensor | None:
        """The slot's gradient as autograd could write it; None if its parts lie apart."""
        return self.slots[position].view(self.grad_full) if self.grad_full is not None else None

    def write(self, flat: torch.Tensor, position: int, value: torch.Tensor) -> None:
        """Copies a parameter-shaped value into a full buffer."""
        self.slots[position].view(flat).copy_(value)

    def put(self, position: int, grad: torch.Tensor, scale: float) -> None:
        """Copies (first touch in the window) or adds ``scale * grad`` into the slot."""
        if self.grad_full is None:
            raise AssertionError(f"bucket {self.index} has no gradient buffer; please report this")
        view = self.slots[position].view(self.grad_full)
        self.seen.add(position)
        if position in self.touched:
            view.add_(grad, alpha=scale)
        else:
            if scale == 1.0:
                view.copy_(grad)
            elif grad.dtype == view.dtype:
                torch.mul(grad, scale, out=view)
            else:
                view.copy_(grad).mul_(scale)
            self.touched.add(position)

    def zero_untouched(self) -> None:
        """Zeroes the slots without a gradient, so that every rank reduces the same elements."""
        if self.grad_full is None:
            raise AssertionError(f"bucket {self.index} has no gradient buffer; please report this")
        for position, slot in enumerate(self.slots):
            if position not in self.touched:
                slot.view(self.grad_full).zero_()

    def new_window(self) -> None:
        """Forgets the gradients of the window; buffers stay."""
        self.touched.clear()
        self.seen.clear()
        self.ready.clear()
        self.launched = self.reduced = False
