"""Checksums of parts of blocks, which put together are those of the blocks.

Ranks that read a checkpoint together each want other bytes of a file, and their borders lie within blocks that have one
checksum. Instead of each reading such a block whole, each sums what it reads, and the sums are combined.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from deepspeed._core.checksum import crc32_combine
from deepspeed._core.ckpt.blockfile import FileSum

__all__ = ["Extent", "Piece", "blocks_of", "cut_at_blocks", "join", "merged", "of_blocks", "small_gaps"]

Extent = tuple[int, int]
"""Bytes ``begin`` to ``end`` of a file."""


class Piece(NamedTuple):
    """Bytes ``begin`` to ``end`` of a file, within a block, and their CRC-32."""

    block: int
    begin: int
    end: int
    crc32: int


def merged(extents: Iterable[Extent], gap: int = 0) -> list[Extent]:
    """The same bytes in order, none twice; with ``gap``, also what lies between two that are no further apart. Pure."""
    found: list[Extent] = []
    for begin, end in sorted(extents):
        if found and begin <= found[-1][1] + gap:
            found[-1] = found[-1][0], max(end, found[-1][1])
        else:
            found.append((begin, end))
    return found


def small_gaps(extents: Sequence[Extent], nbytes: int, most: int) -> list[Extent]:
    """What lies before, between and behind the extents of a file, which are in order, where it is at most ``most``. Pure."""
    begins, ends = [begin for begin, _ in extents], [end for _, end in extents]
    return [(low, high) for low, high in zip([0, *ends], [*begins, nbytes], strict=True) if 0 < high - low <= most]


def of_blocks(blocks: Iterable[int], known: FileSum) -> list[Extent]:
    """Where blocks of a file are. Pure."""
    size = known.block_nbytes
    return merged((block * size, min((block + 1) * size, known.nbytes)) for block in blocks)


def blocks_of(extents: Iterable[Extent], size: int) -> list[int]:
    """Blocks of ``size`` bytes that have any of the extents' bytes. Pure."""
    return sorted({block for begin, end in extents for block in range(begin // size, -(-end // size))})


def cut_at_blocks(extents: Iterable[Extent], size: int) -> Iterator[tuple[int, int, int]]:
    """``(block, begin, end)``: the extents, block by block. Pure."""
    for begin, end in extents:
        while begin < end:
            stop = min(end, (begin // size + 1) * size)
            yield begin // size, begin, stop
            begin = stop


def join(pieces: Iterable[Piece], known: FileSum) -> tuple[set[int], list[int]]:
    """Blocks that the pieces cover wholly: the right ones, and in order those whose content is another one. Pure."""
    by_block: dict[int, dict[int, Piece]] = {}
    for piece in pieces:
        starts = by_block.setdefault(piece.block, {})
        if piece.begin not in starts or starts[piece.begin].end < piece.end:
            starts[piece.begin] = piece
    right, wrong = set(), []
    for block, starts in sorted(by_block.items()):
        at, end = block * known.block_nbytes, min((block + 1) * known.block_nbytes, known.nbytes)
        total = 0
        while at < end and at in starts:
            piece = starts[at]
            total, at = crc32_combine(total, piece.crc32, piece.end - piece.begin), piece.end
        if at == end and total == known.crc32[block]:
            right.add(block)
        elif at == end:
            wrong.append(block)
    return right, wrong
