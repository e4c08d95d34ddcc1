"""A bucket whose ranks own a piece of every parameter: the layout of ZeRO-3, in memory as in its checkpoint files.

The full buffer is ``world_size`` rows; row r holds rank r's piece of each parameter, one after the other, each padded at
the parameter's end. Only this rank's row of weights and masters exists; the full buffer is for gradients on their way.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from deepspeed._core.layout.flat import BucketPlan
from deepspeed._core.pages import empty_flat
from deepspeed._core.params.handle import ParamHandle
from deepspeed._core.reduce.bucket import Bucket, Slot

__all__ = ["ShardBucket", "ShardSlot", "plan_shard_buckets"]


def plan_shard_buckets(handles: Sequence[ParamHandle], *, limit_numel: int, shard_limit_numel: int) -> list[list[int]]:
    """Packs consecutive parameters, up to so many elements in all and in a shard; a larger one is alone. Pure."""
    plans: list[list[int]] = []
    numel = shard_numel = 0
    for index, handle in enumerate(handles):
        whole = handle.shard_numel * handle.transport.world_size
        if not plans or numel + whole > limit_numel or shard_numel + handle.shard_numel > shard_limit_numel:
            plans.append([])
            numel = shard_numel = 0
        plans[-1].append(index)
        numel += whole
        shard_numel += handle.shard_numel
    return plans


class ShardSlot(Slot):
    """``start`` is the place of the parameter's piece within a row."""

    def view(self, flat: torch.Tensor) -> torch.Tensor:
        raise AssertionError(f"{self.name} lies in pieces and has no view; please report this")

    @property
    def handle(self) -> ParamHandle:
        return self.param._ds_handle  # type: ignore[attr-defined,no-any-return]

    @property
    def shard_numel(self) -> int:
        return -(-self.numel // self.bucket.world_size)

    def overlap(self, rank: int) -> tuple[int, int, int]:
        piece = self.shard_numel
        begin = min(self.numel, rank * piece)
        numel = min(self.numel, begin + piece) - begin
        return (begin, self.start, numel) if numel else (0, 0, 0)


class ShardBucket(Bucket):
    """See the module. ``weights`` and ``master`` are this rank's row; ``ds_tensor`` of each parameter a view of it."""

    def __init__(
        self,
        index: int,
        group_index: int,
        named: Sequence[tuple[str, torch.nn.Parameter]],
        *,
        rank: int,
        world_size: int,
        weight_dtype: torch.dtype,
        comm_dtype: torch.dtype,
        accum_dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        starts, end = [], 0
        for _, param in named:
            starts.append(end)
            end += -(-param.numel() // world_size)
        super().__init__(
            index,
            group_index,
            BucketPlan((), (), end * world_size),
            (),
            rank=rank,
            world_size=world_size,
            weight_dtype=weight_dtype,
            comm_dtype=comm_dtype,
            accum_dtype=accum_dtype,
            device=device,
        )
        self.slots = [
            ShardSlot(name, param, start, param.numel(), self)
            for (name, param), start in zip(named, starts, strict=True)
        ]
        self.position = {id(slot): i for i, slot in enumerate(self.slots)}
        self._gaps = []

    @property
    def own_weights(self) -> torch.Tensor:
        return self.weights

    def piece(self, row: torch.Tensor, position: int) -> torch.Tensor:
        """The parameter's part of a row."""
        slot = self.slots[position]
        return row[slot.start : slot.start + -(-slot.numel // self.world_size)]

    def adopt_shards(self) -> None:
        """Moves the parameters' shards into one row of the weights' dtype, and makes the fp32 master of it.

        Shards that are fp32 while the weights are not keep their values in the master.
        """
        shards = [slot.param.ds_tensor for slot in self.slots]  # type: ignore[attr-defined]
        wide = any(shard.dtype == torch.float32 for shard in shards)
        source = empty_flat(self.shard_numel, torch.float32 if wide else self.weight_dtype, self.device)
        for position, shard in enumerate(shards):
            self.piece(source, position).copy_(shard)
        self.weights = source if source.dtype == self.weight_dtype else source.to(self.weight_dtype)
        self.master = source if self.full_precision or wide else source.to(torch.float32)
        for position, slot in enumerate(self.slots):
            handle: ParamHandle = slot.param._ds_handle  # type: ignore[attr-defined]
            handle.adopt(self.piece(self.weights, position))
            handle.trained = True
        self.grad_shard = empty_flat(self.shard_numel, self.accum_dtype, self.device)

    def settle_rebound(self) -> None:
        """Takes shards back whose ``ds_tensor.data`` a user has bound to other memory."""
        for position, slot in enumerate(self.slots):
            shard, own = slot.param.ds_tensor, self.piece(self.weights, position)  # type: ignore[attr-defined]
            if own.numel() and shard.data_ptr() != own.data_ptr():
                own.copy_(shard)
                shard.data = own

    def grad_view(self, position: int) -> torch.Tensor | None:
        return None

    def write(self, flat: torch.Tensor, position: int, value: torch.Tensor) -> None:
        self._put(flat, position, value, 1.0, add=False)

    def put(self, position: int, grad: torch.Tensor, scale: float) -> None:
        if self.grad_full is None:
            raise AssertionError(f"bucket {self.index} has no gradient buffer; please report this")
        self.seen.add(position)
        self._put(self.grad_full, position, grad, scale, add=position in self.touched)
        self.touched.add(position)

    def _put(self, flat: torch.Tensor, position: int, value: torch.Tensor, scale: float, *, add: bool) -> None:
        slot = self.slots[position]
        size = -(-slot.numel // self.world_size)
        rows, given = flat.view(self.world_size, -1)[:, slot.start : slot.start + size], value.reshape(-1)
        if slot.numel == size * self.world_size:
            _combine(rows, given.view(self.world_size, size), scale, add)
            return
        for rank, row in enumerate(rows):
            piece = given[rank * size : (rank + 1) * size]
            _combine(row[: piece.numel()], piece, scale, add)
            row[piece.numel() :].zero_()

    def zero_untouched(self) -> None:
        if self.grad_full is None:
            raise AssertionError(f"bucket {self.index} has no gradient buffer; please report this")
        for position in range(len(self.slots)):
            if position not in self.touched:
                for row in self.grad_full.view(self.world_size, -1):
                    self.piece(row, position).zero_()


def _combine(out: torch.Tensor, value: torch.Tensor, scale: float, add: bool) -> None:
    if add:
        out.add_(value, alpha=scale)
    elif scale == 1.0:
        out.copy_(value)
    elif value.dtype == out.dtype:
        torch.mul(value, scale, out=out)
    else:
        out.copy_(value).mul_(scale)
