"""Gradient reductions that send less, or less far: qgZ of ZeRO++ and the two levels of MiCS. Both are transports.

[Note: qgZ] Ranks are node by node: rank = node * L + local, N nodes. A gradient of N * L slices is reduced in two hops:

1. in the node, local rank l gets from each peer its 4-bit slices (node 0..N-1, local l), and sums them in fp32;
2. between nodes, the ranks of equal position exchange those sums, again in 4 bits, and each adds up its own slice.

Taking slices (.., l) together is the reordering after which everyone ends with its own slice. Over both hops a rank sends
what one flat hop would send, (W - 1) / W of the gradient, but only 1 / L of that leaves the node. Sums are not quantised
where they are made: a rank's own contribution, and its own node's sum, stay exact. Each element of the result differs from
the exact sum by at most ``c * A * ((L - 1) * N + (N - 1) * L * (1 + c))``, where A is the largest magnitude of any
contribution and c = ``INT4.relative_error``, about 1 / 14.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

import torch
import torch.distributed as torch_dist

from deepspeed import comm as dist
from deepspeed._core.layout.groups import fits_nodes, node_groups
from deepspeed._core.quant.blocks import INT4, BlockFormat
from deepspeed._core.quant.loco import ErrorFeedback
from deepspeed._core.reduce.transport import Pending, Transport
from deepspeed.comm.subgroups import make_groups, ranks_per_node
from deepspeed.utils.logging import log_dist

__all__ = ["GroupedReduce", "QuantisedReduce", "make_quantised_reduce"]

# Apart from those of the plain transports; a tag a call, since ranks may wait for several at different moments.
_TAG_EXCHANGE, _TAG_COUNT = 50_000, 1000


class _Exchange:
    """An all-to-all of equal byte rows over one group."""

    def __init__(self, group: torch_dist.ProcessGroup | None) -> None:
        self.group = group
        self.size = dist.get_world_size(group)
        self.rank = dist.get_rank(group)
        others = [(self.rank + step) % self.size for step in range(1, self.size)]
        self._peers = [(rank, dist.get_global_rank(group, rank)) for rank in others]
        self._calls = 0

    def start(
        self, fill: Callable[[int, torch.Tensor], None], nbytes: int, device: torch.device
    ) -> tuple[Pending, dict[int, torch.Tensor]]:
        """Sends each other rank what ``fill(rank, row)`` writes; the rows received, by rank, are there after ``wait``."""
        sent = torch.empty(self.size, nbytes, dtype=torch.uint8, device=device)
        received = torch.empty_like(sent)
        rows = {rank: received[rank] for rank, _ in self._peers}
        self._calls += 1
        if device.type != "cpu":
            for rank, _ in self._peers:
                fill(rank, sent[rank])
            works = [dist.all_to_all_single(received, sent, group=self.group, async_op=True)]
            return Pending(works, [sent, received]), rows
        tag = _TAG_EXCHANGE + self._calls % _TAG_COUNT
        works = [dist.irecv(rows[rank], peer, group=self.group, tag=tag) for rank, peer in self._peers]
        for rank, peer in self._peers:  # the first row travels while the next is packed
            fill(rank, sent[rank])
            works.append(dist.isend(sent[rank], peer, group=self.group, tag=tag))
        return Pending(works, [sent, received]), rows


class _Delegating(Transport):
    """All but ``reduce_scatter`` as the wrapped transport does it."""

    def __init__(self, transport: Transport) -> None:
        super().__init__(transport.group)
        self.plain = transport
        """The wrapped transport, for what must be exact."""

    def all_gather(self, full: torch.Tensor, *, limit_numel: int) -> Pending:
        return self.plain.all_gather(full, limit_numel=limit_numel)

    def all_reduce(self, full: torch.Tensor, *, scale: float, eager: bool = False) -> Pending:
        return self.plain.all_reduce(full, scale=scale, eager=eager)

    def broadcast_slices(self, full: torch.Tensor) -> Pending:
        return self.plain.broadcast_slices(full)

    def sum_scalars(self, values: torch.Tensor) -> torch.Tensor:
        return self.plain.sum_scalars(values)

    def free_buffers(self) -> None:
        self.plain.free_buffers()

    def global_rank(self, rank: int) -> int:
        return self.plain.global_rank(rank)


class QuantisedReduce(_Delegating):
    """``zero_quantized_gradients``: reduce-scatters in 4 bits, see [Note: qgZ]; the rest is the wrapped transport's.

    Args:
        transport: the plain one, over the ranks that share the gradient. At world size 1 it does everything.
        intra_group: this rank's peers in its node, in the order of the transport's ranks; ``None``: it has none.
        inter_group: the ranks of its position in all nodes; ``None``: there is one node. If both are ``None``, one
            hop goes over the transport's whole group.
        feedback: LoCo error feedback (``zeropp_loco_param``), used by reductions that have a ``key``.
        wire: the format that travels.

    Raises:
        ValueError: the groups are not those of the transport's ranks, node by node.
    """

    def __init__(
        self,
        transport: Transport,
        intra_group: torch_dist.ProcessGroup | None = None,
        inter_group: torch_dist.ProcessGroup | None = None,
        *,
        feedback: ErrorFeedback | None = None,
        wire: BlockFormat = INT4,
    ) -> None:
        super().__init__(transport)
        self.feedback = feedback
        self.wire = wire
        self._inside: _Exchange | None = None
        self._between: _Exchange | None = None
        if self.world_size == 1:
            self._locals, self._nodes, self._local, self._node = 1, 1, 0, 0
            return
        if intra_group is None and inter_group is None:
            self._inside = _Exchange(transport.group)
        else:
            self._inside = None if intra_group is None else _Exchange(intra_group)
            self._between = None if inter_group is None else _Exchange(inter_group)
        self._locals, self._local = (self._inside.size, self._inside.rank) if self._inside else (1, 0)
        self._nodes, self._node = (self._between.size, self._between.rank) if self._between else (1, 0)
        own = (dist.get_rank(),)
        ranks = dist.get_all_ranks_from_group(transport.group)
        block = dist.get_all_ranks_from_group(self._inside.group) if self._inside else own
        line = dist.get_all_ranks_from_group(self._between.group) if self._between else own
        if not fits_nodes(ranks, own[0], block, line):
            raise ValueError(
                f"the groups of a quantised reduction must split its ranks {ranks} node by node; rank {own[0]} got {block} "
                f"as its node's and {line} as those of its position in all nodes. make_quantised_reduce makes fitting groups"
            )

    def reduce_scatter(
        self,
        full: torch.Tensor,
        out: torch.Tensor,
        *,
        scale: float,
        accumulate: bool,
        eager: bool = False,
        key: Hashable | None = None,
    ) -> Pending:
        """As :meth:`Transport.reduce_scatter`, within the bound of [Note: qgZ]; summed in fp32 (fp64 if ``out`` is).

        A non-finite element makes its block of 32 in the owner's slice non-finite, or stays where it is if it is the
        owner's own. All ranks must wait for their reductions in the same order.

        Args:
            key: names the elements of ``full`` over the steps, for error feedback; without one, this reduction has none.
        """
        if self.world_size == 1:
            return self.plain.reduce_scatter(full, out, scale=scale, accumulate=accumulate, eager=eager)
        if not out.numel():
            return Pending()
        nodes, mine = self._nodes, self._local
        grid = full.view(nodes, self._locals, out.numel())
        row_nbytes = self.wire.packed_nbytes(out.numel())

        def pack_for_local(local: int, row: torch.Tensor) -> None:
            self._pack((key, "in", local), grid[:, local], row.view(nodes, row_nbytes))

        inside = None
        if self._inside is not None:
            inside = self._inside.start(pack_for_local, nodes * row_nbytes, full.device)

        def finish() -> None:
            dtype = torch.float64 if out.dtype == torch.float64 else torch.float32
            if nodes == 1 and not accumulate and out.dtype == dtype:
                sums = out.view(1, -1)  # saves a buffer
                if out.data_ptr() != grid[:, mine].data_ptr():
                    sums.copy_(grid[:, mine])
            else:
                sums = grid[:, mine].to(dtype, copy=True)  # (nodes, numel)
            if inside is not None:
                self._add(inside, sums)
            total = self._sum_over_nodes(sums, key)
            if accumulate:
                out.add_(total, alpha=scale)
            else:
                torch.mul(total, scale, out=out)

        return Pending(finish=finish, keep_alive=[full, out])

    def _sum_over_nodes(self, sums: torch.Tensor, key: Hashable | None) -> torch.Tensor:
        """This rank's slice of the nodes' sums (nodes, numel), added up over the nodes."""
        own = sums[self._node]
        if self._between is not None:

            def pack_for_node(node: int, row: torch.Tensor) -> None:
                self._pack((key, "out", node), sums[node], row)

            nbytes = self.wire.packed_nbytes(own.numel())
            self._add(self._between.start(pack_for_node, nbytes, sums.device), own)
        return own

    def _add(self, exchange: tuple[Pending, dict[int, torch.Tensor]], total: torch.Tensor) -> None:
        pending, rows = exchange
        pending.wait()
        shape = (*total.shape[:-1], self.wire.packed_nbytes(total.shape[-1]))
        for row in rows.values():
            self.wire.dequantise(row.view(shape), total, accumulate=True)

    def _pack(self, key: tuple[Hashable | None, str, int], source: torch.Tensor, packed: torch.Tensor) -> None:
        if self.feedback is None or key[0] is None:
            self.wire.quantise(source, packed)
        else:
            self.feedback.quantise(key, self.wire, source, packed)


class GroupedReduce(_Delegating):
    """MiCS: reduces inside the shard group, then across the groups that hold replicas. Exact up to the order of sums.

    ``group``, ``rank`` and ``world_size`` are the shard group's; ``scale`` is applied once. Reductions over several
    micro-batches may leave the second level to the last: sum up with ``within``, then :meth:`across_replicas`.

    Args:
        within: transport of this rank's shard group; may be a :class:`QuantisedReduce`.
        across: transport of the ranks that hold the same shard.
    """

    def __init__(self, within: Transport, across: Transport) -> None:
        super().__init__(within)
        self.within = within
        self.across = across

    def reduce_scatter(
        self,
        full: torch.Tensor,
        out: torch.Tensor,
        *,
        scale: float,
        accumulate: bool,
        eager: bool = False,
        key: Hashable | None = None,
    ) -> Pending:
        """As :meth:`Transport.reduce_scatter`, the sum being over all ranks of all shard groups.

        ``key`` goes to a quantised first level; see :class:`QuantisedReduce`.
        """
        options = {"key": key} if isinstance(self.within, QuantisedReduce) else {}
        if self.across.world_size == 1:
            return self.within.reduce_scatter(full, out, scale=scale, accumulate=accumulate, eager=eager, **options)
        numel = out.numel()
        room = self._room(numel)
        total = out
        if accumulate or room != numel:
            total = torch.zeros(room, dtype=out.dtype, device=out.device)
        first = self.within.reduce_scatter(full, total[:numel], scale=scale, accumulate=False, eager=eager, **options)

        def finish() -> None:
            first.wait()
            self.across.all_reduce(total, scale=1.0).wait()
            if accumulate:
                out.add_(total[:numel])
            elif total is not out:
                out.copy_(total[:numel])

        return Pending(finish=finish, keep_alive=[full, out, total])

    def across_replicas(self, shard: torch.Tensor) -> Pending:
        """Sums a shard (1-D, any size) over the replicas, in place: the second level alone."""
        room = self._room(shard.numel())
        if self.across.world_size == 1 or not shard.numel():
            return Pending()
        if room == shard.numel():
            return self.across.all_reduce(shard, scale=1.0)
        padded = shard.new_zeros(room)
        padded[: shard.numel()].copy_(shard)
        pending = self.across.all_reduce(padded, scale=1.0)

        def finish() -> None:
            pending.wait()
            shard.copy_(padded[: shard.numel()])

        return Pending(finish=finish, keep_alive=[shard])

    def all_reduce(self, full: torch.Tensor, *, scale: float, eager: bool = False) -> Pending:
        """As :meth:`Transport.all_reduce`, over all ranks of all shard groups."""
        first = self.within.all_reduce(full, scale=scale, eager=eager)

        def finish() -> None:
            first.wait()
            self.across_replicas(full).wait()

        return Pending(finish=finish, keep_alive=[full])

    def sum_scalars(self, values: torch.Tensor) -> torch.Tensor:
        """Sums over the shard group and averages over the replicas, in place: the sum over one copy of the model.

        So a norm counts each element once, while a flag that any rank of the world raised is above 0 on all of them.
        """
        self.within.sum_scalars(values)
        if self.across.world_size > 1:
            self.across.sum_scalars(values).div_(self.across.world_size)
        return values

    def free_buffers(self) -> None:
        self.within.free_buffers()
        self.across.free_buffers()

    def _room(self, numel: int) -> int:
        """Elements rounded up to a multiple of the replicas, as flat all-reduces need."""
        return -(-numel // self.across.world_size) * self.across.world_size


def make_quantised_reduce(
    transport: Transport,
    device: torch.device,
    *,
    groups: Sequence[Sequence[int]] | None = None,
    node_size: int | None = None,
    feedback: ErrorFeedback | None = None,
) -> QuantisedReduce:
    """A :class:`QuantisedReduce` that follows the nodes. Collective over the *world*: all ranks call it alike.

    Args:
        transport: the plain one; its group is this rank's in ``groups``.
        device: where the world's backend takes tensors.
        groups: world ranks of all groups that reduce by themselves (the shard groups of MiCS); default: one, of all ranks.
        node_size: ranks on a node; default: as the launcher said. Where it does not split the groups into equal parts,
            one hop goes over all ranks, which is logged.
        feedback: see :class:`QuantisedReduce`.
    """
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    if world_size == 1:
        return QuantisedReduce(transport, feedback=feedback)
    every = [range(world_size)] if groups is None else [list(ranks) for ranks in groups]
    size = ranks_per_node(device) if node_size is None else node_size
    layout = None if size is None else node_groups(every, size)
    if layout is None:
        said = "ranks are on nodes of different sizes" if size is None else f"nodes of {size} ranks do not split them"
        log_dist(f"zero_quantized_gradients: one hop over all {transport.world_size} ranks, since {said} equally")
        return QuantisedReduce(transport, feedback=feedback)
    intra = make_groups([block for block in layout.blocks if len(block) > 1])
    inter = make_groups([line for line in layout.lines if len(line) > 1])
    return QuantisedReduce(transport, intra, inter, feedback=feedback)
