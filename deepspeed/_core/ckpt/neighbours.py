"""Memory of other ranks on the same host, read without their help.

Between processes of one host a message is copied four times, through sockets, and keeps both of them busy. Where the kernel
allows it (``process_vm_readv``: Linux, the same user, no ``ptrace_scope`` against it) a rank copies what it wants by itself,
once. Whether it does is tried out, so that nothing else has to be known.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed

from deepspeed._core.ckpt import groups
from deepspeed._core.ckpt.staging import host_key

__all__ = ["Neighbours", "find_neighbours"]


class _Span(ctypes.Structure):
    """The system's ``iovec``."""

    _fields_ = (("base", ctypes.c_void_p), ("nbytes", ctypes.c_size_t))


@functools.cache
def _readv() -> Any:
    """The C library's ``process_vm_readv``; None where it has none."""
    if not sys.platform.startswith("linux"):
        return None
    try:
        function = ctypes.CDLL(None, use_errno=True).process_vm_readv
    except (OSError, AttributeError):
        return None
    span, count = ctypes.POINTER(_Span), ctypes.c_ulong
    function.argtypes = (ctypes.c_int, span, count, span, count, count)
    function.restype = ctypes.c_ssize_t
    return function


def _read(pid: int, address: int, room: int, nbytes: int) -> None:
    """Copies bytes of another process to the address ``room``. Raises ``OSError``."""
    done = 0
    while done < nbytes:
        here, there = _Span(room + done, nbytes - done), _Span(address + done, nbytes - done)
        count = _readv()(pid, ctypes.byref(here), 1, ctypes.byref(there), 1, 0)
        if count <= 0:
            code = ctypes.get_errno()
            raise OSError(code, f"the memory of process {pid} cannot be read: {os.strerror(code)}")
        done += count


class Neighbours:
    """The processes of a group of ranks on one host.

    Args:
        pids: by rank.
    """

    def __init__(self, pids: Sequence[int]) -> None:
        self._pids = list(pids)

    def read(self, rank: int, address: int, out: torch.Tensor) -> None:
        """Fills ``out`` (contiguous, on the CPU) from an address of another rank, which keeps the memory as it is.

        Raises:
            OSError: that process has ended, or has no memory there.
        """
        _read(self._pids[rank], address, out.data_ptr(), out.numel() * out.element_size())


# What others read to see whether they can.
_proof = ctypes.create_string_buffer(os.urandom(16), 16)


def find_neighbours(group: torch.distributed.ProcessGroup) -> Neighbours | None:
    """All ranks of a group, if each can read the memory of every other; the same answer on all. Collective."""
    every = groups.all_gather_values((host_key(), os.getpid(), ctypes.addressof(_proof), _proof.raw), group)
    able = _readv() is not None and all(_can_read(*one) for one in every)
    if not all(groups.all_gather_values(able, group)):
        return None
    return Neighbours([pid for _, pid, *_ in every])


def _can_read(host: str, pid: int, address: int, content: bytes) -> bool:
    if host != host_key():
        return False
    room = ctypes.create_string_buffer(len(content))
    try:
        _read(pid, address, ctypes.addressof(room), len(content))
    except OSError:
        return False
    return room.raw == content
