"""What a process can learn about itself and its neighbours without asking anyone. Only looked at under an alarm."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import sys
import traceback
from collections.abc import Iterator
from types import FrameType
from typing import Any

import torch.distributed as dist

from ...accelerator import get_accelerator

__all__ = [
    "DeviceMark",
    "birth_of",
    "host_id",
    "is_gone",
    "make_device_mark",
    "position_of",
    "sockets",
    "stack_of",
    "tcp_nbytes",
    "torch_operation",
]

#: In Linux's ``struct tcp_info``: two 64-bit counters of the bytes that the peer has acknowledged and that have come.
_TCP_COUNTERS_AT = 120
_TORCH_DISTRIBUTED = dist.distributed_c10d.__file__ if dist.is_available() else None


def host_id() -> str:
    """Tells hosts (and containers, whose process ids mean nothing outside) apart."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            return f"{file.read().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def birth_of(pid: int) -> int:
    """When the process was started, in the kernel's ticks, so that a reused id is not taken for it; 0 if unknown.

    Raises:
        ProcessLookupError: it has ended (also if its parent has not asked for its exit code yet).
    """
    if not os.path.exists("/proc/self/stat"):
        os.kill(pid, 0)
        return 0
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as file:
            fields = file.read().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        raise ProcessLookupError(f"no process {pid}") from None
    if fields[0] in ("Z", "X"):
        raise ProcessLookupError(f"process {pid} has ended")
    return int(fields[19])


def is_gone(pid: int, birth: int) -> bool:
    """Whether the process of this host has certainly ended."""
    try:
        return birth_of(pid) != birth
    except ProcessLookupError:
        return True
    except (OSError, ValueError):  # not ours to look at, or told in an unknown way: no proof
        return False


def _frame_of(thread: int) -> FrameType | None:
    return sys._current_frames().get(thread)


def position_of(thread: int) -> int:
    """A number that changes when the thread's Python code moves on (rarely, it may not)."""
    frame, places = _frame_of(thread), []
    while frame is not None:
        places.append((id(frame.f_code), frame.f_lasti))
        frame = frame.f_back
    return hash(tuple(places))


def stack_of(thread: int, limit: int = 40) -> str:
    """The thread's Python stack as a traceback shows it, the innermost frame last."""
    frame = _frame_of(thread)
    return "".join(traceback.format_stack(frame, limit)) if frame is not None else "  (the thread has ended)\n"


def torch_operation(thread: int) -> str:
    """The function of torch.distributed in which the thread is right now; empty if it is elsewhere."""
    frame, name = _frame_of(thread), ""
    if frame is None or frame.f_code.co_filename != _TORCH_DISTRIBUTED:
        return name
    while frame is not None and "torch/distributed" in frame.f_code.co_filename.replace(os.sep, "/"):
        if frame.f_code.co_filename == _TORCH_DISTRIBUTED:
            name = frame.f_code.co_name
        frame = frame.f_back
    return name


class DeviceMark:
    """A place in the queue of the current device stream, moved on with every :meth:`put`."""

    def __init__(self, event: Any) -> None:
        self._event = event
        self._works = True

    def put(self) -> None:
        """Called by the thread that trains, so it must not fail: it gives up instead."""
        if self._works:
            try:
                self._event.record()
            except RuntimeError:
                self._works = False

    def is_behind(self) -> bool:
        """Whether the device has not come to the last :meth:`put` yet."""
        try:
            return self._works and not self._event.query()
        except RuntimeError:  # e.g. during the capture of a graph
            return False


def make_device_mark() -> DeviceMark | None:
    """``None`` where operations block the host, so that a wait that has returned is over."""
    accelerator = get_accelerator()
    return None if accelerator.is_synchronized_device() else DeviceMark(accelerator.Event())


def sockets() -> Iterator[tuple[int, socket.socket]]:
    """(file descriptor, socket) of this process's connected TCP sockets; the socket is a copy for the loop's body."""
    try:
        names = os.listdir("/proc/self/fd")
    except OSError:
        return
    for name in names:
        with contextlib.suppress(OSError):
            if not os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(int(name))) as copy:
                if copy.family in (socket.AF_INET, socket.AF_INET6) and copy.type == socket.SOCK_STREAM:
                    copy.getpeername()
                    yield int(name), copy


def tcp_nbytes(except_port: int | None = None) -> int | None:
    """Bytes that this process's TCP connections have moved, but for those of ``except_port``; ``None`` if unknown."""
    if not os.path.isdir("/proc/self/fd") or not hasattr(socket, "TCP_INFO"):
        return None
    total = 0
    for _, each in sockets():
        with contextlib.suppress(OSError):  # closed meanwhile
            if except_port in (each.getpeername()[1], each.getsockname()[1]):
                continue
            info = each.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_COUNTERS_AT + 16)
            if len(info) < _TCP_COUNTERS_AT + 16:
                return None
            total += sum(struct.unpack_from("=QQ", info, _TCP_COUNTERS_AT))
    return total
