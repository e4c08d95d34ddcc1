"""Memory for large flat buffers on the CPU, in huge pages where the system has them.

[Note: huge pages] Linux gives memory out a page of 4 KiB at its first touch, which costs more than filling it does: 0.4 s a
GiB were measured on a virtual machine, 0.1 s with pages of 2 MiB. By default (``madvise``) programs must ask for those.

[Note: freed memory] The C library gives freed memory at the end of its heap back to the system, from some 64 MiB on.
A training step frees activations of that size, the next one asks for them again, and every page is handed out and cleared
once more: 16 000 page faults and 0.05 to 0.1 s of a 1.5 s step were measured. So some more of it is kept.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import os
import sys
from typing import Any

import torch

__all__ = ["empty_flat", "in_huge_pages", "keep_freed_memory", "zeros_flat"]

_PAGE_NBYTES = mmap.PAGESIZE

# Below this there is nothing to gain, and rounding to huge pages may keep memory that nobody uses.
_LEAST_NBYTES = 4 << 20


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


def in_huge_pages(tensor: torch.Tensor) -> torch.Tensor:
    """``tensor``, whose memory the system is asked to give out in huge pages when it is first touched.

    Only advice: nothing happens off Linux, on other devices than the CPU, or for little memory.
    """
    storage = tensor.untyped_storage()
    if tensor.device.type != "cpu" or storage.nbytes() < _LEAST_NBYTES:
        return tensor
    advise = _madvise()
    if advise is not None:
        begin = -(-storage.data_ptr() // _PAGE_NBYTES) * _PAGE_NBYTES
        end = (storage.data_ptr() + storage.nbytes()) // _PAGE_NBYTES * _PAGE_NBYTES
        advise(begin, end - begin, mmap.MADV_HUGEPAGE)
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
