"""Memory for large flat buffers on the CPU, in huge pages where the system has them.

[Note: huge pages] Linux gives memory out a page of 4 KiB at its first touch, which costs more than filling it does: 0.4 s a
GiB were measured on a virtual machine, 0.1 s with pages of 2 MiB. By default (``madvise``) programs must ask for those.
Where a host takes back what its guests do not use, whole pages of 2 MiB are just what it has taken: there 4 s a GiB were
measured with huge pages, and 0.6 s with small ones, which come from what is left between others. So the first two pages of
a buffer are touched at once, and where both come slowly this process asks for no more for a second.

[Note: huge pages and disks] Direct I/O gives a disk a list of pieces of memory, one for each run of pages that follow each
other, and more work with every piece: a virtual disk read 0.8 to 1.0 GB/s into buffers of small pages, and 1.7 to 1.9 into
the same in huge ones. Such buffers are few and used over and over, so they wait for them.

[Note: freed memory] The C library gives freed memory at the end of its heap back to the system, from some 64 MiB on.
A training step frees activations of that size, the next one asks for them again, and every page is handed out and cleared
once more: 16 000 page faults and 0.05 to 0.1 s of a 1.5 s step were measured. So some more of it is kept.
"""

from __future__ import annotations

import ctypes
import functools
import math
import mmap
import os
import sys
import time
from typing import Any

import torch

__all__ = ["empty_flat", "in_huge_pages", "keep_freed_memory", "zeros_flat"]

_PAGE_NBYTES = mmap.PAGESIZE

# Below this there is nothing to gain, and rounding to huge pages may keep memory that nobody uses.
_LEAST_NBYTES = 4 << 20

_HUGE_NBYTES = 2 << 20
_PROBES = 2  # one may be slow because another process had the core
_SLOW_S = 1.0  # after which it may be otherwise: another process has left some
_SLOW_PAGE_S = 2e-3  # to hand out one huge page; small pages of as much memory take 0.5 to 1.2 ms


@functools.cache
def _madvise() -> Any:
    """The C library's ``madvise``; ``None`` where it has none, or no advice about huge pages."""
    if sys.platform != "linux" or not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    try:
        function = ctypes.CDLL(None).madvise
    except (OSError, AttributeError):
        return None
    function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return function


class _HugePages:
    """Asks for huge pages as long as this process gets them in good time."""

    def __init__(self) -> None:
        self.slow_until = -math.inf

    def insist(self, begin: int, end: int) -> None:
        """For the memory at these addresses, which nobody has written to yet, however long they take."""
        advise = _madvise()
        if advise is not None:
            begin, end = _whole_pages(begin, end)
            advise(begin, end - begin, mmap.MADV_HUGEPAGE)

    def ask(self, begin: int, end: int) -> None:
        """The same, as long as they come in good time."""
        advise = _madvise()
        if advise is None or time.monotonic() < self.slow_until:
            return
        begin, end = _whole_pages(begin, end)
        advise(begin, end - begin, mmap.MADV_HUGEPAGE)
        first = -(-begin // _HUGE_NBYTES) * _HUGE_NBYTES
        probed = range(first, min(first + _PROBES * _HUGE_NBYTES, end - _HUGE_NBYTES + 1), _HUGE_NBYTES)
        if len(probed) == _PROBES and all(_touch(address) > _SLOW_PAGE_S for address in probed):
            self.slow_until = time.monotonic() + _SLOW_S
            rest = probed[-1] + _HUGE_NBYTES
            if rest < end:
                advise(rest, end - rest, mmap.MADV_NOHUGEPAGE)


def _whole_pages(begin: int, end: int) -> tuple[int, int]:
    return -(-begin // _PAGE_NBYTES) * _PAGE_NBYTES, end // _PAGE_NBYTES * _PAGE_NBYTES


def _touch(address: int) -> float:
    """Seconds until the page there can be written to."""
    started = time.perf_counter()
    ctypes.memset(address, 0, 1)
    return time.perf_counter() - started


_huge_pages = _HugePages()


def in_huge_pages(tensor: torch.Tensor, *, wait: bool = False) -> torch.Tensor:
    """``tensor``, new and with unknown content, whose memory the system is asked to give out in huge pages.

    Only advice: nothing happens off Linux, on other devices than the CPU, or for little memory.

    Args:
        tensor: on any device.
        wait: ask even where huge pages come slowly: for what is filled many times, or what a disk fills.
    """
    storage = tensor.untyped_storage()
    if tensor.device.type == "cpu" and storage.nbytes() >= _LEAST_NBYTES:
        ask = _huge_pages.insist if wait else _huge_pages.ask
        ask(storage.data_ptr(), storage.data_ptr() + storage.nbytes())
    return tensor


def empty_flat(numel: int, dtype: torch.dtype, device: torch.device | str = "cpu") -> torch.Tensor:
    """``torch.empty(numel)``, in huge pages where that is possible."""
    return in_huge_pages(torch.empty(numel, dtype=dtype, device=device))


def zeros_flat(numel: int, dtype: torch.dtype, device: torch.device | str = "cpu") -> torch.Tensor:
    """``torch.zeros(numel)``, in huge pages where that is possible: asked for before the zeros are written."""
    return empty_flat(numel, dtype, device).zero_()


# mallopt(3): what to set, then what environment variable sets it for those who know better.
_TRIM_THRESHOLD = (-1, "MALLOC_TRIM_THRESHOLD_")
_MMAP_THRESHOLD = (-3, "MALLOC_MMAP_THRESHOLD_")
_KEPT_NBYTES = 256 << 20
_HEAP_BLOCK_NBYTES = 32 << 20  # the most that the library allows, and what it arrives at by itself


@functools.cache
def keep_freed_memory() -> bool:
    """Makes the C library keep up to 256 MiB of freed memory for the next step; see the note on freed memory above.

    Once a process; whether it was done. Other C libraries and preloaded allocators stay as they are, and so does a
    process whose ``MALLOC_TRIM_THRESHOLD_`` or ``MALLOC_MMAP_THRESHOLD_`` is set.
    """
    if sys.platform != "linux" or any(name in os.environ for _, name in (_TRIM_THRESHOLD, _MMAP_THRESHOLD)):
        return False
    try:
        library = ctypes.CDLL(None)
        library.gnu_get_libc_version  # noqa: B018 - musl has a mallopt of its own meaning
        adjust = library.mallopt
    except (OSError, AttributeError):
        return False
    # Setting one ends the library's own adjustment of both, so both are set.
    return bool(adjust(_TRIM_THRESHOLD[0], _KEPT_NBYTES) and adjust(_MMAP_THRESHOLD[0], _HEAP_BLOCK_NBYTES))
