"""A zip archive of uncompressed records, written from front to back at the speed of the stream.

``zipfile`` does the same, but sums with ``zlib``, which is slower than the disk, and what a sink has summed already.
Fields as in PKWARE's APPNOTE 6.3.3: 4.3.7 (local header), 4.3.9 (data descriptor), 4.3.12 (central directory), 4.3.14 to
4.3.16 (its end).
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

from deepspeed._core.checksum import BlockSums

__all__ = ["Sink", "SummingSink", "ZipWriter"]

_PADDING_ID = 0x4246  # the extra field with which torch aligns records, too
_SIZES_ID = 0x0001  # 4.5.3
_VERSION = 45  # 64-bit sizes
_FLAGS = 0x0008  # sizes and checksum come after the data
_LARGE = 0xFFFFFFFF
_BLOCK_NBYTES = 1 << 30  # of a sink that sums no blocks
_DATE = 0x0021  # 1980-01-01, as early as the format goes: equal contents make equal files


class Sink(Protocol):
    """Where an archive goes."""

    def write(self, data: Any) -> int:
        """Takes bytes (anything with the buffer protocol), which may be reused afterwards; returns how many."""


@runtime_checkable
class SummingSink(Sink, Protocol):
    """One that sums what it takes, such as :class:`~deepspeed._core.ckpt.blockfile.BlockFile`."""

    sums: BlockSums


class _Summing:
    """Any other sink."""

    def __init__(self, sink: Sink) -> None:
        self._sink = sink
        self.sums = BlockSums(_BLOCK_NBYTES)

    def write(self, data: Any) -> int:
        self.sums.update(data)
        return self._sink.write(data)


class _Entry(NamedTuple):
    name: bytes
    offset: int
    nbytes: int
    sum: int


class ZipWriter:
    """Writes records one after the other; :meth:`close` writes their directory.

    All entries have 64-bit sizes, so that no size has to be known before it is written.

    Args:
        sink: takes the bytes.
        alignment: of the records' data, in bytes.
    """

    def __init__(self, sink: Sink, alignment: int) -> None:
        self._sink = sink if isinstance(sink, SummingSink) else _Summing(sink)
        self._alignment = alignment
        self._position = 0
        self._entries: list[_Entry] = []

    def record(self, name: str, fill: Callable[[Callable[[Any], None]], None]) -> int:
        """Writes a record; ``fill`` is given a function that takes its bytes. Returns their number."""
        encoded, begin = name.encode("ascii"), self._position
        sizes = struct.pack("<HHQQ", _SIZES_ID, 16, 0, 0)
        plain = 30 + len(encoded) + len(sizes) + 4
        padding = -(begin + plain) % self._alignment
        extra = sizes + struct.pack("<HH", _PADDING_ID, padding) + b"Z" * padding
        header = (b"PK\x03\x04", _VERSION, _FLAGS, 0, 0, _DATE, 0, _LARGE, _LARGE, len(encoded), len(extra))
        self._put(struct.pack("<4s5H3L2H", *header) + encoded + extra)
        start, mark = self._position, self._sink.sums.mark()
        fill(self._put)
        nbytes, total = self._position - start, self._sink.sums.since(mark)
        self._put(struct.pack("<4sLQQ", b"PK\x07\x08", total, nbytes, nbytes))
        self._entries.append(_Entry(encoded, begin, nbytes, total))
        return nbytes

    def close(self) -> None:
        """Writes what tells readers where the records are."""
        begin = self._position
        for entry in self._entries:
            extra = struct.pack("<HHQQQ", _SIZES_ID, 24, entry.nbytes, entry.nbytes, entry.offset)
            fixed = (b"PK\x01\x02", _VERSION, _VERSION, _FLAGS, 0, 0, _DATE, entry.sum, _LARGE, _LARGE)
            rest = (len(entry.name), len(extra), 0, 0, 0, 0, _LARGE)
            self._put(struct.pack("<4s6H3L5H2L", *fixed, *rest) + entry.name + extra)
        end, count = self._position, len(self._entries)
        self._put(
            struct.pack("<4sQ2H2L4Q", b"PK\x06\x06", 44, _VERSION, _VERSION, 0, 0, count, count, end - begin, begin)
        )
        self._put(struct.pack("<4sLQL", b"PK\x06\x07", 0, end, 1))
        small = min(count, 0xFFFF)
        self._put(struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, small, small, _LARGE, _LARGE, 0))

    def _put(self, data: Any) -> None:
        self._position += self._sink.write(data)
