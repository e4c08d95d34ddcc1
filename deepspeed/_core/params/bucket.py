"""A bucket whose ranks own a piece of every parameter: the layout of ZeRO-3, in memory as in its checkpoint files.

The full buffer is ``world_size`` rows; row r holds rank r's piece of each parameter, one after the other, each padded at
the parameter's end. Only this rank's row of weights and masters exists; the full buffer is for gradients on their way.

[Note: away] If a shard of the bucket rests elsewhere (:mod:`deepspeed._core.params.store`), the row of weights exists during
the step only: the optimizer fills it, and its pieces go to where the shards rest. The master is then a tensor of its own in
fp32, too. A row that is being written is bounded by :class:`Rows`.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Sequence

import torch

from deepspeed._core.aio import Transfer
from deepspeed._core.layout.flat import BucketPlan
from deepspeed._core.pages import empty_flat
from deepspeed._core.params.handle import ParamHandle, settle_rebound
from deepspeed._core.params.store import BufferPool
from deepspeed._core.reduce.bucket import Bucket, Slot

__all__ = ["Rows", "ShardBucket", "ShardSlot", "plan_shard_buckets"]


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


class Rows:
    """Memory for rows of weights that exist during the step only, see [Note: away]; at most three at a time."""

    _IN_FLIGHT = 2

    def __init__(self) -> None:
        self._pool = BufferPool(sys.maxsize)
        self._writing: deque[tuple[torch.Tensor | None, list[Transfer]]] = deque()
        self._failure: OSError | None = None

    def take(self, numel: int, dtype: torch.dtype, device: torch.device) -> tuple[torch.Tensor, torch.Tensor | None]:
        """A row with unknown content, and the buffer it lies in."""
        while len(self._writing) >= self._IN_FLIGHT:
            self._finish_one()
        if device.type != "cpu":
            return torch.empty(numel, dtype=dtype, device=device), None
        buffer = self._pool.take(numel * dtype.itemsize)
        if buffer is None:
            raise AssertionError("no memory for a row of weights; please report this")
        return buffer[: numel * dtype.itemsize].view(dtype), buffer

    def put(self, buffer: torch.Tensor | None, transfers: list[Transfer]) -> None:
        """The row is being written."""
        self._writing.append((buffer, transfers))

    def _finish_one(self) -> None:
        """Waits for the oldest. In the middle of a step, an error is kept: the other ranks would wait for this one."""
        buffer, transfers = self._writing.popleft()
        for transfer in transfers:
            try:
                transfer.wait()
            except OSError as error:
                self._failure = self._failure or error
        if buffer is not None:
            self._pool.give(buffer)

    def drain(self) -> None:
        """Returns when everything is written, and frees all. Raises the first ``OSError``."""
        while self._writing:
            self._finish_one()
        self._pool.clear()
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure


class ShardBucket(Bucket):
    """See the module. ``weights`` and ``master`` are this rank's row; ``ds_tensor`` of each parameter a view of it."""

    away = False
    """Whether a shard rests elsewhere, see [Note: away]."""
    rows: Rows | None = None
    """Where such a bucket gets a row from."""

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
        self._row: tuple[torch.Tensor, torch.Tensor | None] | None = None

    @property
    def own_weights(self) -> torch.Tensor:
        """The row; of a bucket that is away a new one, with unknown content, until :meth:`send_away`."""
        if self.away and self._row is None:
            if self.rows is None:
                self.rows = Rows()
            self._row = self.rows.take(self.shard_numel, self.weight_dtype, self.device)
            self.weights = self._row[0]
        return self.weights

    def send_away(self) -> None:
        """Starts to write the pieces of the row to where the shards rest. The row is gone afterwards."""
        if self._row is None or self.rows is None:
            return
        (row, buffer), self._row = self._row, None
        self.weights = row.new_empty(0)
        transfers = []
        try:
            for position in range(len(self.slots)):
                transfer = self.handles[position].begin_store(self.piece(row, position))
                if transfer is not None:
                    transfers.append(transfer)
        finally:
            self.rows.put(buffer, transfers)

    def own_part(self, slot: Slot) -> torch.Tensor:
        numel = slot.overlap(self.rank)[2]
        return self.weights_of(self.position[id(slot)])[:numel]

    def weights_of(self, position: int) -> torch.Tensor:
        """This rank's piece of a weight, padded; a copy if it rests elsewhere."""
        return self.handles[position].shard if self.away else self.piece(self.weights, position)

    @property
    def handles(self) -> list[ParamHandle]:
        return [slot.param._ds_handle for slot in self.slots]  # type: ignore[attr-defined]

    def piece(self, row: torch.Tensor, position: int) -> torch.Tensor:
        """The parameter's part of a row."""
        slot = self.slots[position]
        return row[slot.start : slot.start + -(-slot.numel // self.world_size)]

    def adopt_shards(self) -> None:
        """Moves the parameters' shards into one row of the weights' dtype, and makes the fp32 master of it.

        Shards that are fp32 while the weights are not keep their values in the master.
        """
        self.away = any(handle.rest is not None for handle in self.handles)
        wide = any(handle.dtype == torch.float32 for handle in self.handles)
        source = empty_flat(self.shard_numel, torch.float32 if wide else self.weight_dtype, self.device)
        for position, handle in enumerate(self.handles):
            self.piece(source, position).copy_(handle.shard)
        self.weights = source if source.dtype == self.weight_dtype else source.to(self.weight_dtype)
        self.master = source if self.full_precision or wide else source.to(torch.float32)
        self.separate_master = self.away
        for position, handle in enumerate(self.handles):
            piece = self.piece(self.weights, position)
            handle.adopt(piece.clone() if self.away and handle.rest is None else piece)
            handle.trained = True
        if self.away:
            self.weights = source.new_empty(0, dtype=self.weight_dtype)
        self.free_shard()  # the first reduction makes it

    def settle_rebound(self) -> None:
        """Takes shards back whose ``ds_tensor.data`` a user has bound to other memory."""
        if self.away:
            for handle in self.handles:
                settle_rebound(handle)
            return
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
