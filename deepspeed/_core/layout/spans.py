"""Who holds which elements: spans and shard layouts. Pure values, no torch, no process group.

Glossary. *Parameter*: a named run of ``numel`` elements, flattened row-major. *Buffer*: the one flat vector that a rank
keeps for a group of parameters. *Span*: a run of one parameter's elements inside one rank's buffer. *Padding*: buffer
elements that belong to no parameter.

Everything that asks "where is this element" (reduction targets, fragments, checkpoint files, another world size) is a
query on these values or an intersection of two of them (``reshard.py``).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import NamedTuple

__all__ = ["ShardLayout", "Span", "bucketed", "contiguous", "numels_of", "per_param", "replicated"]


class Span(NamedTuple):
    """Elements ``[start, start + numel)`` of parameter ``name`` sit at ``offset`` of the buffer of ``rank``.

    A parameter without elements has one span of ``numel`` 0, so that layouts still know its name.
    """

    name: str
    start: int
    rank: int
    offset: int
    numel: int

    @property
    def stop(self) -> int:
        """One past the last element of the parameter."""
        return self.start + self.numel

    @property
    def offset_stop(self) -> int:
        """One past the last element in the rank's buffer."""
        return self.offset + self.numel


@dataclass(frozen=True)
class ShardLayout:
    """Where the elements of a group of parameters are, over ``world_size`` ranks.

    Checked at construction: every span lies inside its rank's buffer and no two spans of a rank share an element of the
    buffer. Not checked: that every element is somewhere (a *wanted* part of a group is a layout, too); ask ``gaps``.
    The same elements may be on several ranks (see ``replicated``).

    Args:
        world_size: number of ranks, at least 1.
        buffer_numels: elements of each rank's buffer, padding included.
        spans: any order; kept sorted by rank and offset.

    Raises:
        ValueError: when a check above fails; the message names the parameter and the rank.
    """

    world_size: int
    buffer_numels: tuple[int, ...]
    spans: tuple[Span, ...]

    def __post_init__(self) -> None:
        if self.world_size < 1:
            raise ValueError(f"a layout needs a world size of at least 1, got {self.world_size}")
        if len(self.buffer_numels) != self.world_size:
            raise ValueError(f"expected {self.world_size} buffer sizes, one a rank, got {len(self.buffer_numels)}")
        ordered = tuple(sorted(self.spans, key=lambda s: (s.rank, s.offset, s.offset + s.numel)))
        object.__setattr__(self, "buffer_numels", tuple(self.buffer_numels))
        object.__setattr__(self, "spans", ordered)
        end_rank, end, end_name = -1, 0, ""
        for span in ordered:
            name, start, rank, offset, numel = span
            if not 0 <= rank < self.world_size:
                raise ValueError(f"{name!r}: rank {rank} is not below the world size {self.world_size}")
            if start < 0 or offset < 0 or numel < 0 or offset + numel > self.buffer_numels[rank]:
                raise ValueError(f"{name!r}: {span} is outside the {self.buffer_numels[rank]} elements of rank {rank}")
            if rank == end_rank and offset < end:
                raise ValueError(f"{name!r} and {end_name!r} overlap at element {offset} of the buffer of rank {rank}")
            end_rank, end, end_name = rank, offset + numel, name

    @cached_property
    def _by_rank(self) -> tuple[tuple[Span, ...], ...]:
        rows: list[list[Span]] = [[] for _ in range(self.world_size)]
        for span in self.spans:
            rows[span.rank].append(span)
        return tuple(tuple(row) for row in rows)

    @cached_property
    def _by_param(self) -> dict[str, tuple[Span, ...]]:
        rows: dict[str, list[Span]] = {}
        for span in self.spans:
            rows.setdefault(span.name, []).append(span)
        return {name: tuple(sorted(row, key=lambda s: (s.start, s.rank, s.offset))) for name, row in rows.items()}

    @property
    def names(self) -> tuple[str, ...]:
        """Parameter names, in the order of their first appearance by rank and offset."""
        return tuple(self._by_param)

    def of_rank(self, rank: int) -> tuple[Span, ...]:
        """The spans in the buffer of ``rank``, by offset."""
        if not 0 <= rank < self.world_size:
            raise ValueError(f"rank {rank} is not below the world size {self.world_size}")
        return self._by_rank[rank]

    def of_param(self, name: str) -> tuple[Span, ...]:
        """The spans of parameter ``name`` on all ranks, by first element, then by rank."""
        try:
            return self._by_param[name]
        except KeyError:
            raise ValueError(f"the layout has no parameter {name!r}; it has {_some(self.names)}") from None

    def numel_of(self, name: str) -> int:
        """Elements of parameter ``name``, as far as the layout reaches."""
        return max(span.stop for span in self.of_param(name))

    def gaps(self, name: str) -> tuple[tuple[int, int], ...]:
        """``(start, stop)`` runs below ``numel_of(name)`` that no rank holds; empty when the parameter is complete."""
        holes, reached = [], 0
        for span in self.of_param(name):
            if span.start > reached:
                holes.append((reached, span.start))
            reached = max(reached, span.stop)
        return tuple(holes)

    @cached_property
    def padding(self) -> tuple[int, ...]:
        """Elements of each rank's buffer that belong to no parameter."""
        used = [0] * self.world_size
        for span in self.spans:
            used[span.rank] += span.numel
        return tuple(numel - taken for numel, taken in zip(self.buffer_numels, used, strict=True))


def numels_of(shapes: Mapping[str, Sequence[int]]) -> dict[str, int]:
    """Element counts of named shapes, in their order; a scalar (empty shape) has one element."""
    return {name: prod(shape) for name, shape in shapes.items()}


def contiguous(numels: Mapping[str, int], world_size: int, *, align: int = 1) -> ShardLayout:
    """The stage 1 and 2 *file* format: one flat vector a group, cut into ``world_size`` equal pieces.

    The parameters follow each other in mapping order without gaps; the end is padded to a multiple of ``world_size *
    align`` elements. Example: 3459 elements on 2 ranks are 1730 each, the last one of rank 1 being padding.
    """
    _check_numels(numels, world_size)
    if align < 1:
        raise ValueError(f"align must be at least 1 element, got {align}")
    piece = _ceil_div(sum(numels.values()), world_size * align) * align
    spans: list[Span] = []
    begin = 0
    for name, numel in numels.items():
        spans.extend(_cut(name, begin, numel, piece, world_size))
        begin += numel
    return ShardLayout(world_size, (piece,) * world_size, tuple(spans))


def per_param(numels: Mapping[str, int], world_size: int) -> ShardLayout:
    """The stage 3 contract: each parameter alone is cut into pieces of ``ceil(numel / world_size)`` elements.

    A rank's buffer is its pieces in mapping order, each of that size; what a parameter does not fill is padding, so
    with few elements the last ranks hold nothing else.
    """
    _check_numels(numels, world_size)
    spans: list[Span] = []
    base = 0
    for name, numel in numels.items():
        piece = _ceil_div(numel, world_size)
        spans.extend(_cut(name, 0, numel, piece, world_size, base))
        base += piece
    return ShardLayout(world_size, (base,) * world_size, tuple(spans))


def bucketed(
    buckets: Sequence[Iterable[tuple[str, int, int]]], bucket_numels: Sequence[int], world_size: int
) -> ShardLayout:
    """Stages 1 and 2 in memory: rank r owns slice r of every bucket; its buffer is those slices in bucket order.

    Args:
        buckets: per bucket, ``(name, start_in_bucket, numel)`` of whole parameters; gaps between them are padding.
        bucket_numels: elements of each bucket; each is rounded up to a multiple of ``world_size``.
        world_size: number of ranks.
    """
    if len(buckets) != len(bucket_numels):
        raise ValueError(f"expected one size for each of {len(buckets)} buckets, got {len(bucket_numels)}")
    _check_numels({}, world_size)
    spans: list[Span] = []
    seen: set[str] = set()
    base = 0
    for index, (entries, bucket_numel) in enumerate(zip(buckets, bucket_numels, strict=True)):
        piece = _ceil_div(bucket_numel, world_size)
        for name, begin, numel in entries:
            if name in seen:
                raise ValueError(f"parameter {name!r} is in the buckets twice; buckets hold whole parameters, once")
            seen.add(name)
            if begin < 0 or numel < 0 or begin + numel > bucket_numel:
                raise ValueError(
                    f"{name!r}: elements {begin} to {begin + numel} are outside bucket {index} of {bucket_numel}"
                )
            spans.extend(_cut(name, begin, numel, piece, world_size, base))
        base += piece
    return ShardLayout(world_size, (base,) * world_size, tuple(spans))


def replicated(numels: Mapping[str, int], world_size: int) -> ShardLayout:
    """Every rank holds every parameter whole, one after the other in mapping order."""
    _check_numels(numels, world_size)
    spans: list[Span] = []
    begin = 0
    for name, numel in numels.items():
        spans.extend(Span(name, 0, rank, begin, numel) for rank in range(world_size))
        begin += numel
    return ShardLayout(world_size, (begin,) * world_size, tuple(spans))


def _cut(name: str, begin: int, numel: int, piece: int, world_size: int, base: int = 0) -> Iterable[Span]:
    """Spans of a parameter that begins at element ``begin`` of a vector whose pieces of ``piece`` go to ranks in order.

    ``base`` is where the rank's piece of this vector begins in its buffer.
    """
    if numel == 0:
        rank = min(begin // piece, world_size - 1) if piece else 0
        yield Span(name, 0, rank, base + begin - rank * piece, 0)
        return
    done = 0
    while done < numel:
        rank, offset = divmod(begin + done, piece)
        length = min(numel - done, piece - offset)
        yield Span(name, done, rank, base + offset, length)
        done += length


def _check_numels(numels: Mapping[str, int], world_size: int) -> None:
    if world_size < 1:
        raise ValueError(f"a layout needs a world size of at least 1, got {world_size}")
    for name, numel in numels.items():
        if numel < 0:
            raise ValueError(f"{name!r}: expected a number of elements of at least 0, got {numel}")


def _ceil_div(numel: int, parts: int) -> int:
    return -(-numel // parts)


def _some(names: Sequence[str], limit: int = 5) -> str:
    """The first few names for a message, and how many more there are."""
    shown = ", ".join(repr(name) for name in names[:limit]) or "none"
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"
