"""What is being written in the background, and the call that makes training state safe to change meanwhile."""

from __future__ import annotations

import os
import threading

from deepspeed._core.ckpt.archive import Archive

__all__ = ["before_change", "end_writing", "start_writing"]

_lock = threading.Lock()
_in_flight: list[Archive] = []


def _forget() -> None:
    """In a forked process: the thread that writes is not there, and may have held locks."""
    global _lock, _in_flight
    _lock, _in_flight = threading.Lock(), []


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


def start_writing(archives: list[Archive]) -> None:
    """These archives refer to training state from now on."""
    with _lock:
        _in_flight.extend(archives)


def end_writing(archives: list[Archive]) -> None:
    """They are written, or given up."""
    with _lock:
        _in_flight[:] = [archive for archive in _in_flight if not any(archive is ended for ended in archives)]


def before_change() -> None:
    """To be called before weights, masters or optimizer state change: copies what has not been written yet."""
    if not _in_flight:
        return
    with _lock:
        pending = list(_in_flight)
    for archive in pending:
        archive.freeze()
