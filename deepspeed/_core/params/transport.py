"""How partitioned parameters travel: shards of many parameters gathered in one go, straight to where they are used.

[Note: tags] On gloo every parameter's messages carry a tag of their own. Ranks that gather different parameters at the same
time therefore wait for each other, which the hang doctor explains, and never take one weight for another.
"""

from __future__ import annotations

import abc
import itertools
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as torch_dist

from deepspeed import comm as dist
from deepspeed._core import compat
from deepspeed._core.reduce.collect import collect_spans
from deepspeed._core.reduce.transport import Pending
from deepspeed.comm import doctor

__all__ = ["AllReduceGather", "GatherItem", "ParamTransport", "make_param_transport"]

# Parameters whose shards are smaller travel together in one message, and are copied out.
_PACK_BELOW_NUMEL = 1 << 14
_TAG_BASE, _TAG_COUNT = 100_000, 1 << 20
_TAG_SCATTER = 90_001


@dataclass(frozen=True)
class GatherItem:
    """One parameter to gather: ``full`` (1-D, world size x shard elements) from every rank's ``shard`` (1-D)."""

    shard: torch.Tensor
    full: torch.Tensor
    key: int = 0
    """The same for this parameter on all ranks, different for others; see [Note: tags]."""


class ParamTransport(abc.ABC):
    """Gathers over one process group. Every method is collective."""

    def __init__(self, group: torch_dist.ProcessGroup | None) -> None:
        self.group = group
        self.world_size = dist.get_world_size(group) if dist.is_initialized() else 1
        self.rank = dist.get_rank(group) if dist.is_initialized() else 0
        self.plain: ParamTransport = self
        """What gathers exactly; another one where this one loses bits."""
        self.lossy = False
        self.replicas: torch_dist.ProcessGroup | None = None
        """Ranks that hold the same shards (MiCS)."""

    def replicate(self, shard: torch.Tensor, source: int = 0) -> None:
        """Makes a shard the same on all ranks that hold it, as replica ``source`` has it."""
        if self.replicas is not None:
            dist.broadcast(shard, src=torch_dist.get_global_rank(self.replicas, source), group=self.replicas)

    @abc.abstractmethod
    def gather(self, items: Sequence[GatherItem]) -> Pending:
        """Fills each ``full``, this rank's slice included. Shards must not change until ``wait``."""

    def scatter(self, full: torch.Tensor | None, shard: torch.Tensor, *, root: int = 0) -> None:
        """Rank ``root`` (of the group) gives every rank its slice of ``full``, whose last elements may be missing."""
        if self.world_size == 1:
            if full is not None:
                _fill(shard, full, 0)
            return
        if not shard.numel():
            return
        if self.rank == root:
            if full is None:
                raise AssertionError("the root of a scatter has nothing to give; please report this")
            works, keep = [], []
            for rank in range(self.world_size):
                if rank == root:
                    continue
                piece = full[rank * shard.numel() : (rank + 1) * shard.numel()]
                if piece.numel() < shard.numel():
                    piece = torch.cat([piece, piece.new_zeros(shard.numel() - piece.numel())])
                keep.append(piece.contiguous())
                works.append(dist.isend(keep[-1], self.global_rank(rank), group=self.group, tag=_TAG_SCATTER))
            _fill(shard, full, root)
            with doctor.waiting("scatter", "a parameter", group=self.group):
                for work in works:
                    work.wait()
        else:
            work = dist.irecv(shard, self.global_rank(root), group=self.group, tag=_TAG_SCATTER)
            with doctor.waiting("scatter", "a parameter", group=self.group):
                work.wait()

    def collect(
        self, shard: torch.Tensor, numel: int, out: torch.Tensor | None, *, key: int = 0, root: int = 0
    ) -> Pending:
        """Starts bringing all ``numel`` elements of a parameter to rank ``root`` (of the group), and to no other.

        ``out``: there, 1-D with ``numel`` elements, maybe on the host; None elsewhere, where nothing is allocated.
        """
        size, tag = shard.numel(), _TAG_BASE + key % _TAG_COUNT
        spans = [(min(numel, rank * size), min(numel, (rank + 1) * size)) for rank in range(self.world_size)]
        begin, end = spans[self.rank]
        own = shard[: end - begin]
        return collect_spans(own, spans, out, group=self.group, rank=self.rank, root=root, tag=tag)

    def global_rank(self, rank: int) -> int:
        """The global rank of ``rank`` of this group."""
        return rank if self.group is None else torch_dist.get_global_rank(self.group, rank)


def _fill(shard: torch.Tensor, full: torch.Tensor, rank: int) -> None:
    piece = full[rank * shard.numel() : (rank + 1) * shard.numel()]
    shard[: piece.numel()].copy_(piece)
    shard[piece.numel() :].zero_()


class _Alone(ParamTransport):
    """World size 1: the shard is the parameter."""

    def gather(self, items: Sequence[GatherItem]) -> Pending:
        for item in items:
            if item.full.data_ptr() != item.shard.data_ptr():
                item.full.copy_(item.shard)
        return Pending()


class _PointToPoint(ParamTransport):
    """For gloo: large shards go straight into place, small ones share a message."""

    def __init__(self, group: torch_dist.ProcessGroup | None) -> None:
        super().__init__(group)
        others = [(self.rank + step) % self.world_size for step in range(1, self.world_size)]
        self._peers = [(rank, self.global_rank(rank)) for rank in others]

    def gather(self, items: Sequence[GatherItem]) -> Pending:
        nbytes = sum(item.full.nbytes for item in items)
        detail = _named(items)
        with doctor.collective("all_gather", nbytes, self.group, detail=detail):
            works, keep, finishes = self._post(items)

        def finish() -> None:
            for done in finishes:
                done()

        return Pending(works, keep, finish, op="all_gather", nbytes=nbytes, group=self.group, detail=detail)

    def _post(
        self, items: Sequence[GatherItem]
    ) -> tuple[list[torch_dist.Work | None], list[torch.Tensor], list[Callable[[], None]]]:
        small = [item for item in items if item.shard.numel() < _PACK_BELOW_NUMEL]
        if len(small) == 1:
            small = []
        packed = {id(item) for item in small}
        works: list[torch_dist.Work | None] = []
        keep: list[torch.Tensor] = []
        for item in items:
            numel = item.shard.numel()
            if id(item) in packed or not numel:
                continue
            tag = _TAG_BASE + item.key % _TAG_COUNT
            for rank, peer in self._peers:
                piece = item.full[rank * numel : (rank + 1) * numel]
                works.append(dist.irecv(piece, peer, group=self.group, tag=tag))
            for _, peer in self._peers:
                works.append(dist.isend(item.shard, peer, group=self.group, tag=tag))
            item.full[self.rank * numel : (self.rank + 1) * numel].copy_(item.shard)
            keep += [item.full, item.shard]
        groups: dict[torch.dtype, list[GatherItem]] = {}
        for item in small:
            groups.setdefault(item.full.dtype, []).append(item)
        return works, keep, [self._gather_packed(members, works) for members in groups.values()]

    def _gather_packed(self, items: list[GatherItem], works: list[torch_dist.Work | None]) -> Callable[[], None]:
        """Sends the shards as one message; what is returned copies the received ones out."""
        own = torch.cat([item.shard for item in items])
        received = own.new_empty(len(self._peers), own.numel())
        # Of all members: another set of parameters is another message, see [Note: tags].
        tag = _TAG_BASE + zlib.crc32(repr([item.key for item in items]).encode()) % _TAG_COUNT
        for row, (_, peer) in zip(received, self._peers, strict=True):
            works.append(dist.irecv(row, peer, group=self.group, tag=tag))
        for _, peer in self._peers:
            works.append(dist.isend(own, peer, group=self.group, tag=tag))

        def copy_out() -> None:
            rows = {rank: received[i] for i, (rank, _) in enumerate(self._peers)}
            rows[self.rank] = own
            at = 0
            for item in items:
                numel = item.shard.numel()
                for rank, row in rows.items():
                    item.full[rank * numel : (rank + 1) * numel].copy_(row[at : at + numel])
                at += numel

        return copy_out


class _Native(ParamTransport):
    """Backends whose own all-gather is the fast one (NCCL): one flat gather a dtype, copied out when it arrives.

    A group of per-parameter gathers would save the copies; it rests on a private coalescing context whose failure
    poisons the group, and was never measured here, since no such device was at hand.
    """

    def gather(self, items: Sequence[GatherItem]) -> Pending:
        groups: dict[torch.dtype, list[GatherItem]] = {}
        for item in items:
            if item.shard.numel():
                groups.setdefault(item.full.dtype, []).append(item)
        works, keep, outs = [], [], []
        for members in groups.values():
            if len(members) == 1:
                item = members[0]
                works.append(compat.all_gather_flat(item.full, item.shard, group=self.group, async_op=True))
                keep += [item.full, item.shard]
                continue
            own = torch.cat([item.shard for item in members])
            whole = own.new_empty(self.world_size * own.numel())
            works.append(compat.all_gather_flat(whole, own, group=self.group, async_op=True))
            keep += [own, whole]
            outs.append((members, whole.view(self.world_size, -1)))

        def finish() -> None:
            for members, rows in outs:
                at = 0
                for item in members:
                    numel = item.shard.numel()
                    item.full.view(self.world_size, numel).copy_(rows[:, at : at + numel])
                    at += numel

        nbytes = sum(item.full.nbytes for item in items)
        return Pending(works, keep, finish, op="all_gather", nbytes=nbytes, group=self.group, detail=_named(items))


class AllReduceGather(ParamTransport):
    """``use_all_reduce_for_fetch_params``: each rank puts its shards among zeros, and one sum makes everything whole.

    For backends whose all-reduce is faster than what the wrapped transport does; it moves about twice the bytes.
    """

    def __init__(self, transport: ParamTransport) -> None:
        super().__init__(transport.group)
        self._within = transport

    def gather(self, items: Sequence[GatherItem]) -> Pending:
        if self.world_size == 1:
            return self._within.gather(items)
        groups: dict[torch.dtype, list[GatherItem]] = {}
        for item in items:
            if item.shard.numel():
                groups.setdefault(item.full.dtype, []).append(item)
        works, sums = [], []
        for members in groups.values():
            ends = list(itertools.accumulate(item.full.numel() for item in members))
            whole = members[0].full.new_zeros(ends[-1])
            parts = whole.tensor_split(ends[:-1])
            for item, part in zip(members, parts, strict=True):
                part.view(self.world_size, -1)[self.rank].copy_(item.shard)
            summed = whole.view(torch.uint8) if whole.dtype == torch.bool else whole
            works.append(dist.all_reduce(summed, group=self.group, async_op=True))
            sums.append((members, parts))

        def finish() -> None:
            for members, parts in sums:
                for item, part in zip(members, parts, strict=True):
                    item.full.copy_(part)

        nbytes = sum(item.full.nbytes for item in items)
        keep = [part for _, parts in sums for part in parts]
        return Pending(works, keep, finish, op="all_reduce", nbytes=nbytes, group=self.group, detail=_named(items))

    def scatter(self, full: torch.Tensor | None, shard: torch.Tensor, *, root: int = 0) -> None:
        self._within.scatter(full, shard, root=root)


def _named(items: Sequence[GatherItem]) -> str:
    """What a gather is about, so that the hang doctor tells two of them apart."""
    more = f" and {len(items) - 1} more" if len(items) > 1 else ""
    return f"parameter {items[0].key}{more}" if items else "nothing"


def make_param_transport(group: torch_dist.ProcessGroup | None, device: torch.device) -> ParamTransport:
    """The transport for the group's backend on this device."""
    if not dist.is_initialized() or dist.get_world_size(group) == 1:
        return _Alone(group)
    return _PointToPoint(group) if device.type == "cpu" else _Native(group)
