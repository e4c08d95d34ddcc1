"""From one layout to another: which elements to copy from where to where. A pure intersection of intervals.

World-size changes, memory to file format and back, and reading a part of a checkpoint are all this one function; what
moves the elements (a collective, a file read, ``copy_``) is the caller's choice.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from deepspeed._core.layout.spans import ShardLayout, Span

__all__ = ["Copy", "reshard"]


class Copy(NamedTuple):
    """Copy ``numel`` elements of parameter ``name`` from a buffer of the source to a buffer of the destination."""

    name: str
    src_rank: int
    src_offset: int
    dst_rank: int
    dst_offset: int
    numel: int


def reshard(src: ShardLayout, dst: ShardLayout, rank: int | None = None) -> list[Copy]:
    """The copies that fill the spans of ``dst`` from those of ``src``, sorted by destination rank and offset.

    Where several source ranks hold an element, the destination's own rank wins (no traffic), then the lowest rank.
    Adjacent copies between the same buffers are merged. Padding is never written. The result depends on the two values
    only, so that all ranks agree on it without talking. Cost: a sort, then a bisection per destination span.

    Args:
        src: where the elements are.
        dst: where they should be; may name fewer parameters, or parts of them.
        rank: only the copies into this rank's buffer; None is all ranks.

    Raises:
        ValueError: when ``dst`` wants an element that ``src`` does not hold; the message names the parameter.
    """
    wanted = dst.spans if rank is None else dst.of_rank(rank)
    covers: dict[str, tuple[_Cover, dict[int, _Cover]]] = {}
    copies: list[Copy] = []
    for want in wanted:
        if want.name not in covers:
            held = src.of_param(want.name)
            by_rank: dict[int, list[Span]] = {}
            for span in held:
                by_rank.setdefault(span.rank, []).append(span)
            covers[want.name] = (_Cover(held), {r: _Cover(spans) for r, spans in by_rank.items()})
        if not want.numel:
            continue
        everyone, of_rank = covers[want.name]
        reached = want.start
        own = of_rank.get(want.rank)
        for piece in own.within(want.start, want.stop) if own is not None else ():
            _take(everyone, want, reached, piece.start, copies)
            _append(copies, want, piece)
            reached = piece.stop
        _take(everyone, want, reached, want.stop, copies)
    return copies


class _Cover:
    """Spans of one parameter, without overlaps: of two that hold an element, the one that begins earlier keeps it."""

    def __init__(self, spans: Sequence[Span]) -> None:
        self._spans: list[Span] = []
        reached = 0
        for span in spans:
            if span.numel and span.stop > reached:
                self._spans.append(_clip(span, max(span.start, reached), span.stop))
                reached = span.stop
        self._starts = [span.start for span in self._spans]

    def within(self, start: int, stop: int) -> Iterable[Span]:
        """The parts of the spans inside ``[start, stop)``, in order."""
        index = max(bisect_right(self._starts, start) - 1, 0)
        while index < len(self._spans) and self._starts[index] < stop:
            span = self._spans[index]
            if span.stop > start:
                yield _clip(span, max(span.start, start), min(span.stop, stop))
            index += 1


def _clip(span: Span, start: int, stop: int) -> Span:
    return Span(span.name, start, span.rank, span.offset + start - span.start, stop - start)


def _take(cover: _Cover, want: Span, start: int, stop: int, copies: list[Copy]) -> None:
    """Append the copies of elements ``[start, stop)`` of ``want`` from ``cover``, which must hold all of them."""
    if start >= stop:
        return
    reached = start
    for piece in cover.within(start, stop):
        if piece.start > reached:
            break
        _append(copies, want, piece)
        reached = piece.stop
    if reached < stop:
        raise ValueError(
            f"parameter {want.name!r}: the destination wants elements {want.start} to {want.stop}, "
            f"but no rank of the source holds element {reached}"
        )


def _append(copies: list[Copy], want: Span, piece: Span) -> None:
    """Add the copy of ``piece`` into its place in ``want``, merging it with the copy before where both sides adjoin."""
    new = Copy(want.name, piece.rank, piece.offset, want.rank, want.offset + piece.start - want.start, piece.numel)
    if copies:
        last = copies[-1]
        if (
            last.name == new.name
            and last.src_rank == new.src_rank
            and last.dst_rank == new.dst_rank
            and last.src_offset + last.numel == new.src_offset
            and last.dst_offset + last.numel == new.dst_offset
        ):
            copies[-1] = last._replace(numel=last.numel + new.numel)
            return
    copies.append(new)
