"""Parameter gathers that send less, or less far: qwZ and hpZ of ZeRO++, MiCS's two stages, and quantised frozen weights.

All are for weights that are *used*. What is saved, shown to the user or edited must be gathered by the plain transport,
since quantised weights differ from the shards: each element by at most ``INT8.relative_error`` (about 1 / 253) of the
largest magnitude in its block of 128. Every rank holds the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as torch_dist

from deepspeed import comm as dist
from deepspeed._core.layout.groups import GroupLayout, fits_nodes, node_groups
from deepspeed._core.params.transport import GatherItem, ParamTransport, make_param_transport
from deepspeed._core.quant.blocks import INT8, BlockFormat
from deepspeed._core.reduce.transport import Pending
from deepspeed.comm.subgroups import make_groups, ranks_per_node
from deepspeed.utils.logging import log_dist

__all__ = [
    "HierarchicalGather",
    "PackedItem",
    "QuantisedGather",
    "QuantisedShard",
    "SecondaryShards",
    "make_hierarchical_gather",
]


class QuantisedShard:
    """A frozen parameter's shard at rest in 8 bits (``zero_quantized_nontrainable_weights``).

    Takes 0.254 of fp32's bytes, 0.508 of bf16's. Not for weights that are trained: updates smaller than a step would
    be lost.
    """

    def __init__(self, shard: torch.Tensor, form: BlockFormat = INT8) -> None:
        self.numel = shard.numel()
        self.dtype = shard.dtype
        self.form = form
        self.packed = torch.empty(form.packed_nbytes(self.numel), dtype=torch.uint8, device=shard.device)
        form.quantise(shard.detach().reshape(-1), self.packed)

    @property
    def nbytes(self) -> int:
        """Bytes that the shard takes."""
        return self.packed.numel()

    def dequantise_into(self, out: torch.Tensor) -> torch.Tensor:
        """Fills ``out`` (1-D, of the shard's elements, any floating dtype) and returns it."""
        self.form.dequantise(self.packed, out)
        return out

    def to(self, device: torch.device) -> QuantisedShard:
        """Moves the bytes, in place, and returns itself."""
        self.packed = self.packed.to(device)
        return self


@dataclass(frozen=True)
class PackedItem:
    """As :class:`GatherItem`, for a shard that is packed already: its bytes travel as they are."""

    shard: QuantisedShard
    full: torch.Tensor
    key: int = 0


class QuantisedGather(ParamTransport):
    """``zero_quantized_weights``: shards travel in 8-bit blocks and are decoded on arrival.

    Args:
        transport: carries the bytes.
        quantise: ``False`` sends :class:`GatherItem` as they are, and packs nothing; for quantised frozen weights alone.
    """

    def __init__(self, transport: ParamTransport, *, quantise: bool = True, form: BlockFormat = INT8) -> None:
        super().__init__(transport.group)
        self.plain = transport
        """The wrapped transport, for what must be exact."""
        self.lossy = quantise
        self.quantise = quantise
        self.form = form

    def gather(self, items: Sequence[GatherItem | PackedItem]) -> Pending:
        """As :meth:`ParamTransport.gather`; also takes :class:`PackedItem`. Collective.

        This rank's own slice is decoded from what it sends, so that all ranks hold the same bits. Parameters that are
        not of a floating dtype travel as they are. A shard may change as soon as this returns, unless it travels as it is.
        """
        outgoing: list[GatherItem] = []
        decode: list[tuple[torch.Tensor, torch.Tensor, BlockFormat]] = []
        for item in items:
            if isinstance(item, PackedItem):
                packed, numel, form = item.shard.packed, item.shard.numel, item.shard.form
            elif self.quantise and item.full.is_floating_point() and self.world_size > 1:
                numel, form = item.shard.numel(), self.form
                packed = item.shard.new_empty(form.packed_nbytes(numel), dtype=torch.uint8)
                form.quantise(item.shard, packed)
            else:
                outgoing.append(item)
                continue
            if numel:
                whole = packed.new_empty(self.world_size * packed.numel())
                outgoing.append(GatherItem(packed, whole, item.key))
                decode.append((whole.view(self.world_size, -1), item.full.view(self.world_size, numel), form))
        pending = self.plain.gather(outgoing)

        def finish() -> None:
            pending.wait()
            for rows, full, form in decode:
                form.dequantise(rows, full)

        return Pending(finish=finish)

    def scatter(self, full: torch.Tensor | None, shard: torch.Tensor, *, root: int = 0) -> None:
        """Exact: what is handed out at construction is the source of truth."""
        self.plain.scatter(full, shard, root=root)

    def global_rank(self, rank: int) -> int:
        return self.plain.global_rank(rank)


class HierarchicalGather(ParamTransport):
    """``mics_hierarchical_params_gather``: first between nodes, each position by itself, then inside the node. Exact.

    So each shard crosses to a node once, not once for each of its ranks. The second stage starts when the first is
    waited for; ranks must wait in the same order.

    Args:
        transport: the plain one, over all ranks, which are node by node; used for scatters.
        between: over the ranks of this rank's position in all nodes, in node order.
        inside: over the ranks of this rank's node.

    Raises:
        ValueError: the two do not split the transport's ranks node by node.
    """

    def __init__(self, transport: ParamTransport, between: ParamTransport, inside: ParamTransport) -> None:
        super().__init__(transport.group)
        self.plain = transport
        self._between = between
        self._inside = inside
        own = dist.get_rank()
        ranks, block, line = (dist.get_all_ranks_from_group(t.group) for t in (transport, inside, between))
        if not fits_nodes(ranks, own, block, line):
            raise ValueError(
                f"the groups of a hierarchical gather must split its ranks {ranks} node by node; rank {own} got {block} as "
                f"its node's and {line} as those of its position in all nodes. make_hierarchical_gather makes fitting groups"
            )

    def gather(self, items: Sequence[GatherItem]) -> Pending:
        """As :meth:`ParamTransport.gather`. Holds 1 / (ranks of a node) of the full parameters more until done."""
        nodes = self._between.world_size
        columns = [item.full.new_empty(nodes * item.shard.numel()) for item in items]
        first = self._between.gather(
            [GatherItem(item.shard, column, item.key) for item, column in zip(items, columns, strict=True)]
        )

        def finish() -> None:
            first.wait()
            # A node's part of the full parameter is contiguous, so that nothing is reordered.
            second = [
                GatherItem(shard, part, item.key)
                for item, column in zip(items, columns, strict=True)
                if item.shard.numel()
                for shard, part in zip(column.view(nodes, -1), item.full.view(nodes, -1), strict=True)
            ]
            self._inside.gather(second).wait()

        return Pending(finish=finish, keep_alive=[item.shard for item in items])

    def scatter(self, full: torch.Tensor | None, shard: torch.Tensor, *, root: int = 0) -> None:
        self.plain.scatter(full, shard, root=root)

    def global_rank(self, rank: int) -> int:
        return self.plain.global_rank(rank)


class SecondaryShards:
    """hpZ: this rank's pieces of whole parameters, from which a small group (a node) gathers them again in backward.

    A full buffer of ``world`` shards is cut into as many equal pieces as the group has ranks; the rank at position p keeps
    piece p. The pieces are copies of what forward used, so that backward sees the same bits. They are stale once the
    weights change: call :meth:`clear` after each optimizer step and wherever weights are written.

    Args:
        transport: over this rank's block of ``zero_hpz_partition_size`` ranks.
    """

    def __init__(self, transport: ParamTransport) -> None:
        self.transport = transport
        self._pieces: dict[Hashable, torch.Tensor] = {}

    def keep(self, key: Hashable, full: torch.Tensor) -> None:
        """Copies this rank's piece of ``full`` (1-D; the block's size divides it). Not collective."""
        size, rank = self.transport.world_size, self.transport.rank
        if full.numel() % size:
            raise ValueError(
                f"hpZ cuts a full buffer into {size} equal pieces, which {full.numel()} elements do not allow; "
                "zero_hpz_partition_size must divide the number of ranks"
            )
        piece = full.view(size, -1)[rank]
        kept = self._pieces.get(key)
        if kept is not None and kept.shape == piece.shape and kept.dtype == piece.dtype and kept.device == piece.device:
            kept.copy_(piece)
        else:
            self._pieces[key] = piece.clone()

    def __contains__(self, key: Hashable) -> bool:
        return key in self._pieces

    def gather(self, wanted: Sequence[tuple[Hashable, torch.Tensor, int]]) -> Pending:
        """Fills the full buffers from the block's pieces. Collective over the block.

        Args:
            wanted: (key given to :meth:`keep`, full buffer, key of the messages as in :class:`GatherItem`).

        Raises:
            KeyError: nothing is kept under a key; ask ``key in self`` first. Ranks that keep the same parameters agree.
        """
        return self.transport.gather([GatherItem(self._pieces[key], full, tag) for key, full, tag in wanted])

    def drop(self, key: Hashable) -> None:
        """Forgets one piece, if it is there."""
        self._pieces.pop(key, None)

    def clear(self) -> None:
        """Forgets all pieces."""
        self._pieces.clear()

    @property
    def nbytes(self) -> int:
        """Bytes that the pieces take: 1 / (ranks of a block) of the parameters kept."""
        return sum(piece.numel() * piece.element_size() for piece in self._pieces.values())


def make_hierarchical_gather(
    transport: ParamTransport,
    device: torch.device,
    *,
    groups: Sequence[Sequence[int]] | None = None,
    node_size: int | None = None,
    make: Callable[[torch_dist.ProcessGroup | None, torch.device], ParamTransport] = make_param_transport,
) -> ParamTransport:
    """A :class:`HierarchicalGather` that follows the nodes; ``transport`` itself where there is no hierarchy.

    Collective over the *world*: all ranks call it alike. That there is none (each group within one node, one rank a
    node, or nodes that do not split the groups equally) is logged.

    Args:
        transport: the plain one; its group is this rank's in ``groups``.
        device: of the parameters, and where the world's backend takes tensors.
        groups: world ranks of all groups that gather by themselves (the shard groups of MiCS); default: one, of all ranks.
        node_size: ranks on a node; default: as the launcher said.
        make: makes the transports of the two stages.
    """
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    every = [range(world_size)] if groups is None else [list(ranks) for ranks in groups]
    size = ranks_per_node(device) if node_size is None else node_size
    layout = None if size is None else node_groups(every, size)
    if layout is None or not _has_two_stages(layout):
        said = "nodes of different sizes" if size is None else f"nodes of {size} ranks"
        log_dist(f"mics_hierarchical_params_gather: one stage over {transport.world_size} ranks, which lie on {said}")
        return transport
    between = make(make_groups(layout.lines), device)
    inside = make(make_groups(layout.blocks), device)
    return HierarchicalGather(transport, between, inside)


def _has_two_stages(layout: GroupLayout) -> bool:
    return all(len(ranks) > 1 for ranks in (*layout.blocks, *layout.lines))
