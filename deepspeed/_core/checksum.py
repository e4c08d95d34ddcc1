"""CRC-32, the checksum of zip archives and of manifests, by the fastest routine that is installed; and fingerprints.

Every byte of a checkpoint is summed once when it is written, for its block and its record (:class:`BlockSums`), and once
when it is read. ``zlib`` did 2.3 GB/s where a disk did 2.0; ISA-L's routine, with the carry-less multiplication of the
processor, 8 to 14.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterable
from types import ModuleType
from typing import Any, NamedTuple

__all__ = ["BlockSums", "Mark", "crc32", "crc32_combine", "fingerprint"]


@functools.cache
def _routines() -> ModuleType:
    try:
        return importlib.import_module("isal.isal_zlib")
    except ImportError:  # processors that ISA-L does not know
        return importlib.import_module("zlib")


def crc32(data: Any, value: int = 0) -> int:
    """Of anything with the buffer protocol, going on from ``value``; lets other threads run meanwhile."""
    found: int = _routines().crc32(data, value)
    return found


def crc32_combine(first: int, second: int, second_nbytes: int) -> int:
    """Of bytes with the checksum ``first`` followed by ``second_nbytes`` bytes with the checksum ``second``."""
    routine = getattr(_routines(), "crc32_combine", None)
    if routine is not None:
        return int(routine(first, second, second_nbytes))
    return _times(_shift(second_nbytes), first) ^ second


@functools.lru_cache(maxsize=16)  # of a file, nearly all blocks have the same length
def _shift(nbytes: int) -> int:
    """What so many bytes behind a message multiply its polynomial by: ``x**8`` for each."""
    shift, square, left = _ONE, _X, 8 * nbytes
    while left:
        if left & 1:
            shift = _times(shift, square)
        square = _times(square, square)
        left >>= 1
    return shift


# Polynomials over GF(2) modulo that of CRC-32, the highest bit first: bit 31 is 1, bit 30 is x.
_POLYNOMIAL, _ONE, _X = 0xEDB88320, 1 << 31, 1 << 30


def _times(a: int, b: int) -> int:
    product = 0
    for bit in range(31, -1, -1):
        if a >> bit & 1:
            product ^= b
        b = b >> 1 ^ (_POLYNOMIAL if b & 1 else 0)
    return product


class Mark(NamedTuple):
    """A place in a stream, and the checksum of its block up to there."""

    position: int
    crc32: int


class BlockSums:
    """CRC-32 of each block of a stream, and of any stretch of it that begins at a mark, from one look at its bytes.

    Attributes:
        position: how many bytes there were so far.
        blocks: the checksums, of the last block as far as it is there.
    """

    def __init__(self, block_nbytes: int) -> None:
        self.position = 0
        self.blocks: list[int] = []
        self._block_nbytes = block_nbytes

    def update(self, data: Any) -> None:
        """Goes on with bytes: anything with the buffer protocol, contiguous."""
        view = memoryview(data).cast("B") if memoryview(data).nbytes else memoryview(b"")
        while view:
            before = self.position % self._block_nbytes
            part = view[: self._block_nbytes - before]
            if not before:
                self.blocks.append(0)
            self.blocks[-1] = crc32(part, self.blocks[-1])
            self.position += len(part)
            view = view[len(part) :]

    def mark(self) -> Mark:
        """The place that the stream is at, for :meth:`since`."""
        return Mark(self.position, self.blocks[-1] if self.position % self._block_nbytes else 0)

    def since(self, mark: Mark) -> int:
        """The CRC-32 of all bytes from the mark to here."""
        at, total = mark.position, 0
        for block in range(at // self._block_nbytes, -(-self.position // self._block_nbytes)):
            nbytes = min((block + 1) * self._block_nbytes, self.position) - at
            found = self.blocks[block]
            if at == mark.position:  # of what was before the mark in its block, nothing must be left
                found ^= crc32_combine(mark.crc32, 0, nbytes)
            total, at = crc32_combine(total, found, nbytes), at + nbytes
        return total


def fingerprint(parts: Iterable[Any]) -> int:
    """63 bits of all parts' bytes, one after the other: CRC-32 beside Adler-32, which have nothing in common.

    Against chance, not against forgery: different contents have the same one with a probability of 2**-63.
    """
    crc, adler = 0, 1
    for part in parts:
        crc, adler = crc32(part, crc), _routines().adler32(part, adler)
    return (crc << 32 | adler) & (1 << 63) - 1
