"""Memory for large flat buffers on the CPU, in huge pages where the system has them.

[Note: huge pages] Linux gives memory out a page of 4 KiB at its first touch, which costs more than filling it does: 0.4 s a
GiB were measured on a virtual machine, 0.1 s with pages of 2 MiB. By default (``madvise``) programs must ask for those.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import sys
from typing import Any

import torch

__all__ = ["empty_flat", "in_huge_pages", "zeros_flat"]

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
