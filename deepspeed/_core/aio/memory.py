"""Host memory for direct I/O: it begins at a page, has no byte too many, and can be kept from leaving for swap."""

from __future__ import annotations

import ctypes
import functools
import mmap
import os
from typing import Any

import torch

from deepspeed._core.pages import in_huge_pages

__all__ = ["PAGE_NBYTES", "aligned_empty", "lock_pages", "unlock_pages"]

PAGE_NBYTES = mmap.PAGESIZE


def aligned_empty(numel: int, dtype: torch.dtype = torch.uint8, *, reused: bool = False) -> torch.Tensor:
    """A flat CPU tensor that begins at a page, with a mapping of its own (so its memory goes back when it is freed).

    Args:
        numel: elements, >= 0. The mapping is rounded up to pages of 4 KiB, not to a power of two.
        dtype: any. The values are 0, but cost nothing until a page is touched (of large ones, which ask for huge pages, the
            first two pages are).
        reused: it is to be filled over and over, so that huge pages are worth any wait for them.

    Raises:
        ValueError: ``numel`` is negative.
        OSError: the system has no such memory (ENOMEM).
    """
    if numel < 0:
        raise ValueError(f"aligned_empty: numel must be >= 0, but is {numel}")
    if numel == 0:
        return torch.empty(0, dtype=dtype)
    nbytes = numel * dtype.itemsize
    # Private: Python's default is a shared mapping, which counts as /dev/shm memory and gets no huge pages.
    mapping = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return in_huge_pages(torch.frombuffer(mapping, dtype=dtype, count=numel), wait=reused)


@functools.cache
def _libc() -> Any:
    library = ctypes.CDLL(None, use_errno=True)
    for name in ("mlock", "munlock"):
        getattr(library, name).argtypes = (ctypes.c_void_p, ctypes.c_size_t)
    return library


def lock_pages(tensor: torch.Tensor) -> None:
    """Keeps the memory of a host tensor from being swapped out (``mlock``), until it is freed or unlocked.

    Raises:
        OSError: the limit on locked memory is reached (ENOMEM or EPERM); ``ulimit -l`` shows and raises it.
    """
    nbytes = tensor.numel() * tensor.element_size()
    if nbytes and _libc().mlock(tensor.data_ptr(), nbytes) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"cannot lock {nbytes} bytes of memory ({os.strerror(code)}); raise the limit (ulimit -l)")


def unlock_pages(tensor: torch.Tensor) -> None:
    """Undoes :func:`lock_pages`."""
    nbytes = tensor.numel() * tensor.element_size()
    if nbytes:
        _libc().munlock(tensor.data_ptr(), nbytes)
