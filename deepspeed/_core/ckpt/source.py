"""Where the bytes of a checkpoint's tensors come from, a tile at a time: live training state that is copied only if need be.

A tensor of a checkpoint is a :class:`Source`. Writing it asks for its tiles in order, so that neither the state nor a file
is ever in memory a second time. While a checkpoint is written in the background, training goes on; before it changes
the state, it freezes the sources, and what has not been written by then is copied. (The same idea: DataStates-LLM,
HPDC 2024, "lazy non-blocking copies".)
"""

from __future__ import annotations

import bisect
import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from math import prod
from typing import Protocol, TypeVar, cast

import torch
import torch.distributed

from deepspeed._core.ckpt import groups
from deepspeed._core.ckpt.neighbours import Neighbours
from deepspeed._core.layout.reshard import Copy, reshard
from deepspeed._core.layout.spans import ShardLayout
from deepspeed._core.pages import empty_flat

T = TypeVar("T")

__all__ = ["Blank", "Exchanged", "Live", "Part", "Rope", "Source"]

# Long enough for large writes, short enough that who freezes a source waits for milliseconds only.
_TILE_NBYTES = 16 << 20

# What is read from neighbours at a time: it is summed and copied while a core's cache has it.
_SIP_NBYTES = 1 << 20


class Part(Protocol):
    """A run of elements that can be read piece by piece; see :class:`Live`."""

    torn: bool
    error: OSError | None
    dtype: torch.dtype
    numel: int

    def read(self, begin: int, end: int, use: Callable[[torch.Tensor], None]) -> None: ...

    def freeze(self) -> None: ...

    def drop(self, before: int) -> None: ...

    def place(self) -> int | None: ...


def _part(given: torch.Tensor | Part) -> Part:
    return Live(given) if isinstance(given, torch.Tensor) else given


class Live:
    """The elements of one tensor, wherever it is, until it is frozen; then as they were at that moment."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._lock = threading.Lock()
        flat = tensor.detach().resolve_conj().resolve_neg().reshape(-1)
        self._flat: torch.Tensor | None = flat
        self._copied = flat.data_ptr() != tensor.data_ptr()
        self._version = _version_of(flat)
        #: Whether the tensor was changed before all of it was read or copied, so that what was read is no state it ever had.
        self.torn = False
        #: Why what was read is no state at all: reading goes on, since other ranks wait for it.
        self.error: OSError | None = None
        #: First element of the tensor that is still there: those before were read for the last time.
        self._base = 0
        self.dtype = tensor.dtype
        self.numel = tensor.numel()

    def read(self, begin: int, end: int, use: Callable[[torch.Tensor], None]) -> None:
        """Gives ``use`` the elements ``[begin, end)``, 1-D on the CPU, which it must not keep."""
        with self._lock:
            if self._flat is None:
                raise AssertionError("a source was read after it was dropped")
            use(self._flat[begin - self._base : end - self._base].cpu())
            self.torn |= not self._copied and _version_of(self._flat) != self._version

    def freeze(self) -> None:
        """Copies what is still to be read, unless that was done; the tensor may be changed from then on."""
        with self._lock:
            if self._flat is None or self._copied:
                return
            self.torn |= _version_of(self._flat) != self._version
            copy = empty_flat(self._flat.numel(), self.dtype)
            self._flat = copy.copy_(self._flat)
            self._copied = True

    def place(self) -> int | None:
        """Where the elements are in this process's memory, one after the other; None if they are not."""
        with self._lock:
            flat = self._flat
            return flat.data_ptr() if flat is not None and flat.device.type == "cpu" and flat.is_contiguous() else None

    def drop(self, before: int) -> None:
        """Elements before this one will not be read again."""
        with self._lock:
            if self._flat is None:
                return
            if before >= self.numel:
                self._flat = None
            elif not self._copied:
                self._flat, self._base = self._flat[before - self._base :], before


def _version_of(tensor: torch.Tensor) -> int:
    """Counts changes in place, where torch does."""
    return 0 if tensor.is_inference() else tensor._version


class Source:
    """A tensor of a checkpoint: what it is, and its elements in order.

    Attributes:
        shape, dtype: as the checkpoint stores it.
        collective: whether reading takes part in communication, so that all ranks of a group must read, and read all.
    """

    collective = False
    _parts: Sequence[Part] = ()

    def __init__(self, shape: Sequence[int], dtype: torch.dtype) -> None:
        self.shape = tuple(shape)
        self.dtype = dtype

    @property
    def numel(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.numel * self.dtype.itemsize

    @property
    def torn(self) -> bool:
        """Whether the tensors it comes from were changed while they were read, without :meth:`freeze`."""
        return any(part.torn for part in self._parts)

    @property
    def error(self) -> OSError | None:
        """Why some of the elements could not be read; what was given instead is nothing."""
        return next((part.error for part in self._parts if part.error is not None), None)

    def write(self, use: Callable[[torch.Tensor], None]) -> None:
        """Gives ``use`` all elements in order, in tiles: 1-D on the CPU, which it must not keep. Once only."""
        raise NotImplementedError

    def freeze(self) -> None:
        """Makes what is still to be read independent of the tensors it comes from.

        From the end, while another thread goes on writing from the beginning: they meet.
        """
        for part in reversed(self._parts):
            part.freeze()


class Rope(Source):
    """Tensors of one dtype, one after the other."""

    def __init__(self, parts: Sequence[torch.Tensor | Part], shape: Sequence[int] | None = None) -> None:
        dtype = parts[0].dtype if parts else torch.float32
        self._parts = [_part(part) for part in parts]
        super().__init__((sum(part.numel for part in self._parts),) if shape is None else shape, dtype)
        if any(part.dtype != dtype for part in self._parts) or sum(p.numel for p in self._parts) != self.numel:
            raise AssertionError(
                f"parts of {[(p.numel, p.dtype) for p in self._parts]} cannot be {self.shape}, {dtype}"
            )

    def write(self, use: Callable[[torch.Tensor], None]) -> None:
        """See :meth:`Source.write`."""
        tile = _TILE_NBYTES // self.dtype.itemsize
        for part in self._parts:
            for begin in range(0, part.numel, tile):
                end = min(begin + tile, part.numel)
                part.read(begin, end, use)
                part.drop(end)


class Blank(Source):
    """As many zeros, which nobody keeps."""

    def __init__(self, numel: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__((numel,), dtype)

    def write(self, use: Callable[[torch.Tensor], None]) -> None:
        """See :meth:`Source.write`."""
        tile = _TILE_NBYTES // self.dtype.itemsize
        blank = torch.zeros(min(tile, self.numel), dtype=self.dtype)
        for begin in range(0, self.numel, tile):
            use(blank[: min(tile, self.numel - begin)])


class Exchanged(Source):
    """This rank's buffer in another layout than the one in memory: each tile comes from all ranks that hold a part of it.

    They send it to each other, unless they can read each other's memory: see :meth:`share`.

    Args:
        parts: this rank's buffer in ``held``, in consecutive 1-D tensors.
        held: the layout in memory, over the ranks of ``group``.
        wanted: the layout to write; buffers of the same size on all ranks.
        group: a group whose backend takes CPU tensors, and that nobody else uses meanwhile; None for a single rank.
        rank: this rank in both layouts.
        numel: the first so many elements only (the end of a buffer is padding).
    """

    def __init__(
        self,
        parts: Sequence[torch.Tensor | Part],
        held: ShardLayout,
        wanted: ShardLayout,
        group: torch.distributed.ProcessGroup | None,
        rank: int,
        numel: int | None = None,
    ) -> None:
        super().__init__((wanted.buffer_numels[rank] if numel is None else numel,), parts[0].dtype)
        self._parts = [_part(part) for part in parts]
        self._wanted, self._group, self._rank = wanted, group, rank
        self._outgoing: list[list[Copy]] = [[] for _ in range(held.world_size)]
        self._incoming: list[list[Copy]] = [[] for _ in range(held.world_size)]
        for copy in sorted(reshard(held, wanted), key=lambda c: c.dst_offset):
            if copy.src_rank == rank:
                self._outgoing[copy.dst_rank].append(copy)
            if copy.dst_rank == rank:
                self._incoming[copy.src_rank].append(copy)
        self._last_read = self._ends_of_reading()
        self._neighbours: Neighbours | None = None
        self._places: Sequence[Sequence[tuple[int, int]]] = ()

    @property
    def collective(self) -> bool:  # type: ignore[override]
        """See :class:`Source`."""
        return self._neighbours is None

    def places(self) -> list[tuple[int, int]] | None:
        """Address and number of elements of each part; None if one is not in this process's memory."""
        found = [(part.place(), part.numel) for part in self._parts]
        return None if any(place is None for place, _ in found) else cast("list[tuple[int, int]]", found)

    def share(self, neighbours: Neighbours, places: Sequence[Sequence[tuple[int, int]]]) -> None:
        """From now on this rank reads by itself what others hold.

        Nobody may change or give up the tensors until all ranks have written. Not for saves in the background.

        Args:
            neighbours: the ranks of the group.
            places: what :meth:`places` gave on each rank.
        """
        self._neighbours, self._places = neighbours, places

    def _ends_of_reading(self) -> list[int]:
        """For each part, the element of the written buffers before which all copies from it end."""
        ends = list(itertools.accumulate(part.numel for part in self._parts))
        last = [0] * len(ends)
        for copy in (copy for copies in self._outgoing for copy in copies):
            first = bisect.bisect_right(ends, copy.src_offset)
            behind = bisect.bisect_left(ends, copy.src_offset + copy.numel)
            for index in range(first, behind + 1):
                last[index] = max(last[index], copy.dst_offset + min(copy.numel, ends[index] - copy.src_offset))
        return last

    def write(self, use: Callable[[torch.Tensor], None]) -> None:
        """See :meth:`Source.write`. Collective over the group, unless memory is shared."""
        if self._neighbours is not None:
            self._write_alone(self._neighbours, use)
            return
        size = self._wanted.buffer_numels[self._rank]
        tile = _TILE_NBYTES // self.dtype.itemsize
        windows = [_Windows(copies) for copies in self._outgoing], [_Windows(copies) for copies in self._incoming]
        # One tile is on its way while the one before is used; rooms are used again, since fresh memory costs more than
        # what is done with it.
        rooms = itertools.cycle([_Rooms(self.dtype), _Rooms(self.dtype)])
        coming: _Tile | None = None
        try:
            for begin in range(0, size, tile):
                ready, coming = coming, self._begin(begin, min(begin + tile, size), windows, next(rooms))
                if ready is not None:
                    self._use(ready, use)
            if coming is not None:
                ready, coming = coming, None
                self._use(ready, use)
        finally:
            if coming is not None:  # it goes on in memory that must not go
                coming.wait()
        for part in self._parts:
            part.drop(part.numel)

    def _write_alone(self, neighbours: Neighbours, use: Callable[[torch.Tensor], None]) -> None:
        sip = _SIP_NBYTES // self.dtype.itemsize
        room = torch.empty(min(sip, self.numel), dtype=self.dtype)
        at = 0
        for copy in sorted((c for copies in self._incoming for c in copies), key=lambda c: c.dst_offset):
            Blank(min(copy.dst_offset, self.numel) - at, self.dtype).write(use)  # padding
            at = min(copy.dst_offset + copy.numel, self.numel)
            for begin in range(copy.dst_offset, at, sip):
                offset, count = copy.src_offset + begin - copy.dst_offset, min(sip, at - begin)
                if copy.src_rank != self._rank:
                    self._fetch(neighbours, copy.src_rank, offset, room[:count])
                    use(room[:count])
                    continue
                for part, low, high in _cut(self._parts, [part.numel for part in self._parts], offset, count):
                    part.read(low, high, use)
        Blank(self.numel - at, self.dtype).write(use)

    def _fetch(self, neighbours: Neighbours, rank: int, offset: int, out: torch.Tensor) -> None:
        """Elements of another rank's buffer, across its parts."""
        places, filled, itemsize = self._places[rank], 0, self.dtype.itemsize
        for place, low, high in _cut([a for a, _ in places], [numel for _, numel in places], offset, out.numel()):
            neighbours.read(rank, place + low * itemsize, out[filled : filled + high - low])
            filled += high - low

    def _use(self, tile: _Tile, use: Callable[[torch.Tensor], None]) -> None:
        tile.wait()
        if tile.begin < self.numel:
            use(tile.values[: self.numel - tile.begin])

    def _begin(self, begin: int, end: int, windows: tuple[list[_Windows], list[_Windows]], rooms: _Rooms) -> _Tile:
        """Begins to exchange the elements from ``begin`` to ``end`` of every rank's buffer."""
        outgoing, incoming = ([list(one.until(end)) for one in direction] for direction in windows)
        own, outgoing[self._rank], incoming[self._rank] = outgoing[self._rank], [], []
        values = rooms.take("values", end - begin)
        works: list[torch.distributed.Work] = []
        if self._group is not None:
            # Neighbouring elements in one message, straight to their place.
            arriving = [
                (rank, values[low - begin : high - begin])
                for rank, copies in enumerate(incoming)
                for low, high in _runs(copies)
            ]
            works = groups.exchange(arriving, self._packed(outgoing, rooms), self._group)
        for copy in own:  # stays here
            self._read(copy.src_offset, values[copy.dst_offset - begin : copy.dst_offset - begin + copy.numel])
        filled = begin
        for low, high in sorted(stretch for copies in (own, *incoming) for stretch in _runs(copies)):
            values[filled - begin : low - begin].zero_()  # padding
            filled = high
        values[filled - begin :].zero_()
        for part, last in zip(self._parts, self._last_read, strict=True):
            if begin < last <= end:
                part.drop(part.numel)
        return _Tile(begin, values, works)

    def _packed(self, outgoing: Sequence[Sequence[Copy]], rooms: _Rooms) -> list[tuple[int, torch.Tensor]]:
        """Copies of what goes to other ranks, in the pieces that they expect: what training changes must not go out."""
        room = rooms.take("sent", sum(c.numel for copies in outgoing for c in copies))
        pieces = []
        at = 0
        for rank, copies in enumerate(outgoing):
            begin = at
            for copy in copies:
                self._read(copy.src_offset, room[at : at + copy.numel])
                at += copy.numel
            for low, high in _runs(copies):
                pieces.append((rank, room[begin : begin + high - low]))
                begin += high - low
        return pieces

    def _read(self, offset: int, out: torch.Tensor) -> None:
        """Elements of this rank's buffer, across its parts."""
        for part, low, high in _cut(self._parts, [part.numel for part in self._parts], offset, out.numel()):
            part.read(low, high, _into(out[: high - low]))
            out = out[high - low :]


def _cut(parts: Sequence[T], numels: Sequence[int], begin: int, count: int) -> Iterator[tuple[T, int, int]]:
    """Where ``count`` elements from ``begin`` on lie in consecutive parts: part, first and end in it."""
    for part, numel in zip(parts, numels, strict=True):
        low, high = max(begin, 0), min(begin + count, numel)
        if low < high:
            yield part, low, high
        begin -= numel


class _Tile:
    """Elements of this rank's buffer from ``begin`` on, which are there after :meth:`wait`."""

    def __init__(self, begin: int, values: torch.Tensor, works: Sequence[torch.distributed.Work]) -> None:
        self.begin, self.values, self._works = begin, values, works

    def wait(self) -> None:
        for work in self._works:
            work.wait()


def _runs(copies: Sequence[Copy]) -> Iterator[tuple[int, int]]:
    """Where copies, in the order of their destination, adjoin there: first and end of each stretch."""
    begin = end = 0
    for copy in copies:
        if copy.dst_offset != end:
            if begin < end:
                yield begin, end
            begin = copy.dst_offset
        end = copy.dst_offset + copy.numel
    if begin < end:
        yield begin, end


class _Rooms:
    """Buffers by name."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._held: dict[str, torch.Tensor] = {}

    def take(self, name: str, numel: int) -> torch.Tensor:
        """So many elements of unknown content."""
        held = self._held.get(name)
        if held is None or held.numel() < numel:
            held = self._held[name] = empty_flat(numel, self._dtype)
        return held[:numel]


def _into(room: torch.Tensor) -> Callable[[torch.Tensor], None]:
    def take(held: torch.Tensor) -> None:
        room.copy_(held)

    return take


class _Windows:
    """Copies in the order of their destination, taken a window at a time and cut at its end."""

    def __init__(self, copies: Sequence[Copy]) -> None:
        self._copies = copies
        self._next = 0
        self._done = 0

    def until(self, end: int) -> Iterator[Copy]:
        """What remains before element ``end`` of the destination."""
        while self._next < len(self._copies):
            copy = self._copies[self._next]
            begin = copy.dst_offset + self._done
            if begin >= end:
                return
            count = min(copy.numel - self._done, end - begin)
            yield copy._replace(src_offset=copy.src_offset + self._done, dst_offset=begin, numel=count)
            self._done += count
            if self._done < copy.numel:
                return
            self._next, self._done = self._next + 1, 0
