"""Parts of files, in the order they are asked for, read past the page cache into a few buffers that are used again."""

from __future__ import annotations

import itertools
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch

from deepspeed._core.aio import DataFile, FileIO, aligned_empty
from deepspeed._core.aio.engine import Transfer
from deepspeed._core.aio.memory import PAGE_NBYTES
from deepspeed._core.ckpt.pieces import Extent, merged
from deepspeed.errors import CheckpointError

__all__ = ["FileReader", "Part", "spans_of"]

T = TypeVar("T")

_PART_NBYTES = 8 << 20
_AHEAD = 4
_GAP_NBYTES = 64 << 10  # what lies between two extents is read with them: sooner done than another request


class Part(NamedTuple):
    """Bytes ``begin`` to ``end`` of a file."""

    begin: int
    end: int
    data: torch.Tensor


class _Read(NamedTuple):
    """Bytes ``begin`` to ``end`` of a file, on their way into ``room``."""

    path: Path
    begin: int
    end: int
    room: torch.Tensor
    transfer: Transfer


def spans_of(extents: Iterable[Extent], nbytes: int) -> Iterator[Extent]:
    """What to read at a time, of a file of ``nbytes`` bytes, to have the extents: whole pages, in order, none twice."""
    pages = ((low // PAGE_NBYTES * PAGE_NBYTES, -(-high // PAGE_NBYTES) * PAGE_NBYTES) for low, high in extents)
    for begin, end in merged(pages, _GAP_NBYTES):
        for at in range(begin, min(end, nbytes), _PART_NBYTES):
            yield at, min(at + _PART_NBYTES, end, nbytes)


class FileReader:
    """Reads parts of files in the order they are asked for, some of them ahead. Use as a context, from one thread at a time.

    Args:
        ahead: how many parts are read ahead; the reader has one buffer more than that, of 8 MiB each.
    """

    def __init__(self, ahead: int = _AHEAD) -> None:
        self._ahead = ahead
        self._io = FileIO()
        self._free: list[torch.Tensor] = []
        self._under_way = deque[tuple[int, _Read]]()
        self._files: dict[Path, DataFile] = {}
        self._users = Counter[Path]()

    def __enter__(self) -> FileReader:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Waits for reads that nobody wants any more. Can be called again."""
        self._settle(read for _, read in _taken(self._under_way))
        self._io.close()
        while self._files:
            self._files.popitem()[1].close()

    def parts(self, path: Path, spans: Iterable[Extent]) -> Iterator[Part]:
        """Gives the bytes of each span of :func:`spans_of`; they are there until the next one is taken.

        Raises:
            CheckpointError: the file cannot be read, or ends before.
        """
        return (part for _, part in self._stream([(path, spans)]))

    def each(self, wanted: Iterable[tuple[Path, Iterable[Extent]]]) -> Iterator[Iterator[Part]]:
        """For each file and some spans of it, in turn, its :meth:`parts`; those of the next are read ahead, too.

        Each is to be used up before the next is taken.
        """
        for expected, (index, parts) in enumerate(itertools.groupby(self._stream(wanted), key=itemgetter(0))):
            if index != expected:
                raise AssertionError(f"nothing is wanted of file {expected}; please report this")
            yield (part for _, part in parts)

    def _stream(self, wanted: Iterable[tuple[Path, Iterable[Extent]]]) -> Iterator[tuple[int, Part]]:
        """The parts, with the index of what they are wanted for."""
        coming = ((index, path, *span) for index, (path, spans) in enumerate(wanted) for span in spans)
        under_way = self._under_way = deque[tuple[int, _Read]]()

        def read_ahead() -> bool:
            while len(under_way) < self._ahead and (request := next(coming, None)) is not None:
                index, path, begin, end = request
                with _explained(path):
                    under_way.append((index, self._begin(path, begin, end)))
            return bool(under_way)

        try:
            while read_ahead():
                index, read = under_way[0]
                with _explained(read.path):
                    read.transfer.wait()
                under_way.popleft()
                try:
                    read_ahead()
                    yield index, Part(read.begin, read.end, read.room[: read.end - read.begin])
                finally:
                    self._let_go(read)
        finally:
            self._settle(read for _, read in _taken(under_way))

    def _begin(self, path: Path, begin: int, end: int) -> _Read:
        file = self._files.get(path)
        if file is None:
            for idle in [other for other in self._files if not self._users[other]]:
                self._files.pop(idle).close()
            file = self._files[path] = DataFile(path)
        room = self._free.pop() if self._free else aligned_empty(_PART_NBYTES, reused=True)
        transfer = self._io.read(room[: end - begin], file, begin)
        self._users[path] += 1
        return _Read(path, begin, end, room, transfer)

    def _settle(self, reads: Iterable[_Read]) -> None:
        """Waits for reads that nobody wants any more."""
        for read in reads:
            with suppress(OSError):  # the first error is the one to tell
                read.transfer.wait()
            self._let_go(read)

    def _let_go(self, read: _Read) -> None:
        self._users[read.path] -= 1
        if len(self._free) <= self._ahead:
            self._free.append(read.room)


def _taken(reads: deque[T]) -> Iterator[T]:
    while reads:
        yield reads.popleft()


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}. Copy the file again, or load another tag") from error
