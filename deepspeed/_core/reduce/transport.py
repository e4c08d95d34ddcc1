"""How flat buffers travel. Plain collectives that know tensors and groups, and nothing of modules or hooks.

[Note: why gloo goes point to point] Measured on torch 2.13, two and three ranks of one thread each, 132 MB of fp32:
gloo's ``reduce_scatter`` 174 ms, ``all_reduce`` 102 ms, ``all_gather`` 131 ms; the same as ``isend``/``irecv`` in pieces
52 ms (with the sum) and 32 ms (in place). Pieces bound the extra memory to two pieces per peer, and the sum runs in fp32
whatever the dtype on the wire.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
import torch.distributed as torch_dist

from deepspeed import comm as dist
from deepspeed._core import compat
from deepspeed.comm import doctor

__all__ = ["Pending", "Transport", "make_transport"]

_PIECE_NUMEL = 1 << 20
# Our point-to-point messages must not meet those of the user or of a pipeline. The size is a part of the tag: messages of
# ranks that do different things then do not match, and the hang doctor explains the wait; gloo would end the process.
_TAG_SCATTER, _TAG_GATHER, _TAG_COUNT, _TAG_SIZES = 1 << 21, 1 << 24, 1000, 9973


class Pending:
    """Work in flight together with what must outlive it. ``wait`` is idempotent.

    ``op``, ``nbytes``, ``group`` and ``detail`` (what it is about, the same on all ranks) tell the hang doctor for what
    ``wait`` waits, ``finish`` included; so leave ``op`` out where that does more than communicate (reads a file, say),
    since then this rank may be the slow one.
    """

    def __init__(
        self,
        works: Sequence[torch_dist.Work | None] = (),
        keep_alive: Sequence[torch.Tensor] = (),
        finish: Callable[[], None] | None = None,
        *,
        op: str = "",
        nbytes: int = 0,
        group: torch_dist.ProcessGroup | None = None,
        detail: str = "",
    ) -> None:
        self._works = [work for work in works if work is not None]
        self._keep_alive = list(keep_alive)
        self._finish = finish
        self._what = (op, nbytes, group, detail)

    def wait(self) -> None:
        """Returns when the result may be used on the current stream."""
        op, nbytes, group, detail = self._what
        if op and (self._works or self._finish is not None):
            with doctor.waiting(op, detail, nbytes=nbytes, group=group):
                self._wait_for_works()
                self._run_finish()
        else:
            if self._works:
                with doctor.waiting("unnamed work"):
                    self._wait_for_works()
            self._run_finish()
        self._keep_alive = []

    def _wait_for_works(self) -> None:
        works, self._works = self._works, []
        for work in works:
            work.wait()
            doctor.now.moves += 1

    def _run_finish(self) -> None:
        finish, self._finish = self._finish, None
        if finish is not None:
            finish()


class Transport(abc.ABC):
    """Flat collectives over one process group. Every method is collective: all ranks call it in the same order."""

    def __init__(self, group: torch_dist.ProcessGroup | None) -> None:
        self.group = group
        self.world_size = dist.get_world_size(group) if dist.is_initialized() else 1
        self.rank = dist.get_rank(group) if dist.is_initialized() else 0

    @abc.abstractmethod
    def reduce_scatter(
        self,
        full: torch.Tensor,
        out: torch.Tensor,
        *,
        scale: float,
        accumulate: bool,
        eager: bool = False,
        key: Hashable = None,
    ) -> Pending:
        """``out = [out +] scale * sum over ranks of full's slice of this rank``, summed in ``out``'s dtype.

        ``full`` has ``world_size * out.numel()`` elements, 1-D. ``out`` may be ``full``'s own slice (then not
        ``accumulate``). ``full`` must stay untouched until ``wait``. ``eager`` sends all of it now, to overlap with
        what the caller does before ``wait``, at the cost of receive buffers for all of it. ``key`` names the elements over
        the steps, for transports that carry rounding errors over.
        """

    @abc.abstractmethod
    def all_gather(self, full: torch.Tensor, *, limit_numel: int) -> Pending:
        """Fills the other ranks' slices of ``full`` (1-D) from their owners, in place, ``limit_numel`` at a time."""

    def all_reduce(self, full: torch.Tensor, *, scale: float, eager: bool = False) -> Pending:
        """``full = scale * sum over ranks``, in place, in ``full``'s dtype."""
        work = dist.all_reduce(full, group=self.group, async_op=True)
        return Pending([work], [full], lambda: _scale_(full, scale), **self._what("all_reduce", full))

    def broadcast_slices(self, full: torch.Tensor) -> Pending:
        """As :meth:`all_gather`, by one broadcast a rank (``allgather_partitions: false``)."""
        slices = full.view(self.world_size, -1)
        works = [
            dist.broadcast(slices[r], src=self.global_rank(r), group=self.group, async_op=True)
            for r in range(self.world_size)
        ]
        return Pending(works, [full], **self._what("broadcast", full))

    def sum_scalars(self, values: torch.Tensor) -> torch.Tensor:
        """Sums a small tensor over the ranks, in place, and returns it."""
        if self.world_size > 1:
            dist.all_reduce(values, group=self.group)
        return values

    def free_buffers(self) -> None:  # noqa: B027 (most keep none)
        """Gives back memory that was kept for the next reductions. Not collective; nothing may be in flight."""

    def global_rank(self, rank: int) -> int:
        """The global rank of ``rank`` of this group."""
        return rank if self.group is None else torch_dist.get_global_rank(self.group, rank)

    def _what(self, op: str, full: torch.Tensor) -> dict[str, Any]:
        """The operation as the hang doctor names it, whatever messages it is made of."""
        return {"op": op, "nbytes": full.numel() * full.element_size(), "group": self.group}


class _Alone(Transport):
    """World size 1: nothing travels, the arithmetic stays the same."""

    def reduce_scatter(
        self,
        full: torch.Tensor,
        out: torch.Tensor,
        *,
        scale: float,
        accumulate: bool,
        eager: bool = False,
        key: Hashable = None,
    ) -> Pending:
        _take(full, out, scale=scale, accumulate=accumulate)
        return Pending()

    def all_gather(self, full: torch.Tensor, *, limit_numel: int) -> Pending:
        return Pending()

    def all_reduce(self, full: torch.Tensor, *, scale: float, eager: bool = False) -> Pending:
        _scale_(full, scale)
        return Pending()

    def broadcast_slices(self, full: torch.Tensor) -> Pending:
        return Pending()


class _PointToPoint(Transport):
    """For gloo, see [Note: why gloo goes point to point]."""

    def __init__(self, group: torch_dist.ProcessGroup | None) -> None:
        super().__init__(group)
        others = [(self.rank + step) % self.world_size for step in range(1, self.world_size)]
        self._peers = [(rank, self.global_rank(rank)) for rank in others]
        self._free: dict[tuple[torch.dtype, int], list[torch.Tensor]] = {}
        self._calls = 0

    def reduce_scatter(
        self,
        full: torch.Tensor,
        out: torch.Tensor,
        *,
        scale: float,
        accumulate: bool,
        eager: bool = False,
        key: Hashable = None,
    ) -> Pending:
        slices = full.view(self.world_size, -1)
        pieces = [(low, min(low + _PIECE_NUMEL, out.numel())) for low in range(0, out.numel(), _PIECE_NUMEL)]
        # Several reductions may be in flight and ranks may wait for them at different moments: a tag a call keeps
        # their messages apart.
        self._calls += 1
        tag = _TAG_SCATTER + self._calls % _TAG_COUNT + _TAG_COUNT * (full.numel() % _TAG_SIZES)
        posted: list[tuple[list[torch_dist.Work], torch.Tensor]] = []

        def post() -> None:
            low, high = pieces[len(posted)]
            scratch = self._borrow(full.dtype, min(_PIECE_NUMEL, out.numel()))
            works = [
                dist.irecv(scratch[i, : high - low], src, group=self.group, tag=tag)
                for i, (_, src) in enumerate(self._peers)
            ]
            works += [dist.isend(slices[r, low:high], dst, group=self.group, tag=tag) for r, dst in self._peers]
            posted.append((works, scratch))

        def finish() -> None:
            for index, (low, high) in enumerate(pieces):
                while len(posted) < min(index + 2, len(pieces)):
                    post()
                works, scratch = posted[index]
                for work in works:
                    work.wait()
                received = list(scratch[:, : high - low].unbind())
                _sum_into(out[low:high], slices[self.rank, low:high], received, scale=scale, accumulate=accumulate)
                self._free[(scratch.dtype, scratch.shape[1])].append(scratch)

        what = self._what("reduce_scatter", full)
        with doctor.collective(**what):
            for _ in pieces if eager else pieces[:1]:
                post()
        return Pending(finish=finish, keep_alive=[full, out], **what)

    def all_gather(self, full: torch.Tensor, *, limit_numel: int) -> Pending:
        slices = full.view(self.world_size, -1)
        step = max(1, limit_numel // self.world_size)
        works = []
        tag = _TAG_GATHER + full.numel() % _TAG_SIZES
        what = self._what("all_gather", full)
        with doctor.collective(**what):
            for low in range(0, slices.shape[1], step):
                part = slices[:, low : low + step]
                works += [dist.irecv(part[rank], src, group=self.group, tag=tag) for rank, src in self._peers]
                works += [dist.isend(part[self.rank], dst, group=self.group, tag=tag) for _, dst in self._peers]
        return Pending(works, [full], **what)

    def all_reduce(self, full: torch.Tensor, *, scale: float, eager: bool = False) -> Pending:
        own = full.view(self.world_size, -1)[self.rank]
        scatter = self.reduce_scatter(full, own, scale=scale, accumulate=False, eager=eager)

        def finish() -> None:
            scatter.wait()
            self.all_gather(full, limit_numel=full.numel()).wait()

        return Pending(finish=finish, keep_alive=[full], **self._what("all_reduce", full))

    def free_buffers(self) -> None:
        self._free.clear()

    def _borrow(self, dtype: torch.dtype, numel: int) -> torch.Tensor:
        free = self._free.setdefault((dtype, numel), [])
        return free.pop() if free else torch.empty(len(self._peers), numel, dtype=dtype)


class _Native(Transport):
    """Backends whose own flat collectives are the fast ones (NCCL)."""

    def reduce_scatter(
        self,
        full: torch.Tensor,
        out: torch.Tensor,
        *,
        scale: float,
        accumulate: bool,
        eager: bool = False,
        key: Hashable = None,
    ) -> Pending:
        direct = out.dtype == full.dtype and not accumulate
        received = out if direct else torch.empty(out.numel(), dtype=full.dtype, device=full.device)
        what = self._what("reduce_scatter", full)
        with doctor.collective(**what):
            work = compat.reduce_scatter_flat(received, full, group=self.group, async_op=True)

        def finish() -> None:
            if direct:
                _scale_(out, scale)
            else:
                _take(received, out, scale=scale, accumulate=accumulate)

        return Pending([work], [full, received], finish, **what)

    def all_gather(self, full: torch.Tensor, *, limit_numel: int) -> Pending:
        own = full.view(self.world_size, -1)[self.rank]
        # An in-place gather moves the whole buffer in one call; pieces would need a strided copy, so the limit
        # bounds buckets at construction instead.
        what = self._what("all_gather", full)
        with doctor.collective(**what):
            work = compat.all_gather_flat(full, own, group=self.group, async_op=True)
        return Pending([work], [full], **what)


def make_transport(group: torch_dist.ProcessGroup | None, device: torch.device) -> Transport:
    """The transport for the group's backend on this device."""
    if not dist.is_initialized() or dist.get_world_size(group) == 1:
        return _Alone(group)
    if device.type == "cpu":
        return _PointToPoint(group)
    return _Native(group)


def _scale_(tensor: torch.Tensor, scale: float) -> None:
    if scale != 1.0:
        tensor.mul_(scale)


def _take(source: torch.Tensor, out: torch.Tensor, *, scale: float, accumulate: bool) -> None:
    if accumulate:
        out.add_(source, alpha=scale)
    elif out.data_ptr() == source.data_ptr() and out.dtype == source.dtype:
        _scale_(out, scale)
    elif out.dtype == source.dtype:
        torch.mul(source, scale, out=out)
    else:
        _scale_(out.copy_(source), scale)


def _sum_into(
    out: torch.Tensor, own: torch.Tensor, received: list[torch.Tensor], *, scale: float, accumulate: bool
) -> None:
    """``out = [out +] scale * (own + received...)`` without rounding to a 16-bit wire dtype in between."""
    if accumulate:
        total = own.to(out.dtype, copy=True)
    elif own.dtype == out.dtype:
        total = torch.add(own, received[0], out=out)
        received = received[1:]
    else:
        total = out.copy_(own)
    for piece in received:
        total.add_(piece)
    if accumulate:
        out.add_(total, alpha=scale)
    else:
        _scale_(total, scale)
