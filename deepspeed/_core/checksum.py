"""CRC-32, the checksum of zip archives and of manifests, by the fastest routine that is installed; and fingerprints.

Every byte of a checkpoint is summed twice when it is written and once when it is read. ``zlib`` did 2.3 GB/s where a disk
did 2.0; ISA-L's routine, with the carry-less multiplication of the processor, 8 to 14.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterable
from types import ModuleType
from typing import Any

__all__ = ["crc32", "fingerprint"]


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


def fingerprint(parts: Iterable[Any]) -> int:
    """63 bits of all parts' bytes, one after the other: CRC-32 beside Adler-32, which have nothing in common.

    Against chance, not against forgery: different contents have the same one with a probability of 2**-63.
    """
    crc, adler = 0, 1
    for part in parts:
        crc, adler = crc32(part, crc), _routines().adler32(part, adler)
    return (crc << 32 | adler) & (1 << 63) - 1
