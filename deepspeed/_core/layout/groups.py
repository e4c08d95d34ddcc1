"""Which ranks belong together: shard groups, replica groups, nodes. Arithmetic on rank numbers only.

Glossary, for 8 ranks and blocks of 4::

    blocks   [0 1 2 3] [4 5 6 7]         shard groups of MiCS and hpZ; the ranks of a node
    lines    [0 4] [1 5] [2 6] [3 7]     equal positions in each block: replicas of MiCS; one rank a node

Every function returns *all* groups, in an order that is the same on all ranks, because torch makes a process group with the
help of all ranks, members or not.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

__all__ = ["GroupLayout", "blocks_and_lines", "fits_nodes", "group_of", "hpz_groups", "mics_groups", "node_groups"]


@dataclass(frozen=True)
class GroupLayout:
    """Ranks in equal blocks, and the lines across them; see the module. Each rank is in one block and in one line."""

    blocks: tuple[tuple[int, ...], ...]
    lines: tuple[tuple[int, ...], ...]

    def block_of(self, rank: int) -> tuple[int, ...]:
        """The block with this rank."""
        return group_of(self.blocks, rank)

    def line_of(self, rank: int) -> tuple[int, ...]:
        """The line with this rank."""
        return group_of(self.lines, rank)


def blocks_and_lines(ranks: Sequence[int], size: int, *, key: str = "size") -> GroupLayout:
    """Splits the ranks, in their order, into blocks of ``size``; lines take equal positions of each.

    Raises:
        ValueError: ``size`` is below 1 or does not divide the number of ranks; the message names ``key``.
    """
    count = len(ranks)
    if size < 1 or count % size:
        fitting = [n for n in range(1, count + 1) if count % n == 0]
        raise ValueError(
            f"{key} splits {count} ranks into equal blocks, so it must be one of {fitting}, got {size}; set it to one of "
            "these or start another number of ranks"
        )
    blocks = tuple(tuple(ranks[low : low + size]) for low in range(0, count, size))
    return GroupLayout(blocks, tuple(zip(*blocks, strict=True)))


def mics_groups(world_size: int, shard_size: int) -> GroupLayout:
    """MiCS: blocks of ``mics_shard_size`` consecutive ranks hold one model state; lines hold replicas of a shard."""
    return blocks_and_lines(range(world_size), shard_size, key="zero_optimization.mics_shard_size")


def hpz_groups(world_size: int, partition_size: int) -> GroupLayout:
    """ZeRO++ hpZ: blocks of ``zero_hpz_partition_size`` consecutive ranks hold a secondary copy of the parameters."""
    return blocks_and_lines(range(world_size), partition_size, key="zero_optimization.zero_hpz_partition_size")


def node_groups(groups: Iterable[Sequence[int]], node_size: int) -> GroupLayout | None:
    """Each group's ranks by node: blocks are what lies in one node, lines one rank of each node.

    A group within a node (or of as many ranks as one) is one block. ``node_size`` is the number of ranks a node, and nodes
    hold consecutive ranks. ``None`` where nodes do not cut every group into equal blocks (a group that starts in the
    middle of a node and leaves it, say), so that there is no hierarchy to use.

    Args:
        groups: disjoint groups of ranks, e.g. ``[range(world_size)]`` or the blocks of :func:`mics_groups`.
    """
    if node_size < 1:
        raise ValueError(f"a node has at least 1 rank, got node_size={node_size}")
    blocks: list[tuple[int, ...]] = []
    lines: list[tuple[int, ...]] = []
    for ranks in groups:
        by_node: dict[int, list[int]] = {}
        for rank in ranks:
            by_node.setdefault(rank // node_size, []).append(rank)
        size = len(next(iter(by_node.values()), []))
        # The group's order must be node by node, or rank = node * size + position would not hold.
        if not size or [rank for members in by_node.values() for rank in members] != list(ranks):
            return None
        if any(len(members) != size for members in by_node.values()):
            return None
        layout = blocks_and_lines(list(ranks), size)
        blocks += layout.blocks
        lines += layout.lines
    return GroupLayout(tuple(blocks), tuple(lines))


def fits_nodes(ranks: Sequence[int], rank: int, block: Sequence[int], line: Sequence[int]) -> bool:
    """Whether ``block`` and ``line`` are those of ``rank`` when ``ranks`` are split into blocks of that size.

    If they come from one layout, all ranks have the same answer.
    """
    if not block or len(ranks) != len(block) * len(line):
        return False
    layout = blocks_and_lines(ranks, len(block))
    return layout.block_of(rank) == tuple(block) and layout.line_of(rank) == tuple(line)


def group_of(groups: Iterable[Sequence[int]], rank: int) -> tuple[int, ...]:
    """The group that holds ``rank``.

    Raises:
        ValueError: none does.
    """
    seen = []
    for ranks in groups:
        if rank in ranks:
            return tuple(ranks)
        seen.append(list(ranks))
    raise ValueError(f"rank {rank} is in none of the groups {seen}")
