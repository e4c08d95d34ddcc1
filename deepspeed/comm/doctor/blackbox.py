"""What a rank did last, kept where it outlives the rank: memory that the other ranks of its host hold, too.

A process that is killed, or that gloo ends because two ranks' collectives had different sizes, leaves no last word; and
those that rank 0 keeps may go with it. The memory is an anonymous file (``memfd``): it has no name, and is gone with the
last process that holds it. Linux only.
"""

from __future__ import annotations

import mmap
import os
import struct
from typing import Any

__all__ = ["Page", "make_page", "open_page"]

# The first half is the record, the second the last word.
_HALF = mmap.PAGESIZE
_NBYTES = 2 * _HALF
_SIZE = struct.Struct("<i")
_NUMBERS = struct.Struct("<qqqi")
_TEXTS = ("op", "phase", "module", "parameter")


class Page:
    """The record of one rank: its own to write, others' to read."""

    def __init__(self, descriptor: int, memory: mmap.mmap) -> None:
        self.descriptor = descriptor
        self._memory = memory

    def write(self, count: int, nbytes: int, step: int, *texts: str) -> None:
        """Notes the collective that starts: its number, bytes, step; then op, phase, module and parameter."""
        text = "\n".join(texts).encode()[: _HALF - _NUMBERS.size]
        try:
            _NUMBERS.pack_into(self._memory, 0, count, nbytes, step, len(text))
            self._memory[_NUMBERS.size : _NUMBERS.size + len(text)] = text
        except ValueError:
            pass  # another thread has closed it in this moment

    def read(self) -> dict[str, Any]:
        """What was written last, by the names of :class:`~deepspeed.comm.doctor.verdict.Status`."""
        count, nbytes, step, size = _NUMBERS.unpack_from(self._memory, 0)
        if not size:
            return {}
        text = self._memory[_NUMBERS.size : _NUMBERS.size + size].decode(errors="replace")
        return {"count": count, "nbytes": nbytes, "step": step} | dict(zip(_TEXTS, text.split("\n"), strict=False))

    def write_word(self, word: str) -> None:
        """Leaves the last word; an empty one takes it back."""
        text = word.encode()
        if len(text) <= _HALF - _SIZE.size:
            self._memory[_HALF + _SIZE.size : _HALF + _SIZE.size + len(text)] = text
            _SIZE.pack_into(self._memory, _HALF, len(text))

    def read_word(self) -> str:
        """The last word, if there is one."""
        (size,) = _SIZE.unpack_from(self._memory, _HALF)
        return self._memory[_HALF + _SIZE.size : _HALF + _SIZE.size + size].decode(errors="replace")

    def close(self) -> None:
        self._memory.close()
        os.close(self.descriptor)


def make_page() -> Page | None:
    """This process's page; ``None`` where the system has no such memory."""
    if not hasattr(os, "memfd_create"):
        return None
    try:
        descriptor = os.memfd_create("deepspeed-doctor", os.MFD_CLOEXEC)
        os.ftruncate(descriptor, _NBYTES)
        return Page(descriptor, mmap.mmap(descriptor, _NBYTES))
    except OSError:
        return None


def open_page(pid: int, descriptor: int) -> Page | None:
    """The page of another process of this host; ``None`` if it cannot be had."""
    try:
        own = os.open(f"/proc/{pid}/fd/{descriptor}", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        return Page(own, mmap.mmap(own, _NBYTES, prot=mmap.PROT_READ))
    except (OSError, ValueError):
        os.close(own)
        return None
