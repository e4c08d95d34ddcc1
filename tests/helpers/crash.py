"""Kills processes at a chosen moment of a save: before the n-th call that touches files or other ranks."""

from __future__ import annotations

import contextlib
import functools
import io
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch.distributed

from deepspeed._core.ckpt import groups

_OF_FILES = ("open", "pwrite", "fsync", "ftruncate", "close", "chmod", "mkdir", "rename", "replace", "unlink", "rmdir")
_OF_RANKS = ("all_gather_values", "exchange")

FOREVER = 1 << 30


def kill_all(pids: Sequence[int]) -> None:
    """SIGKILL to these processes, the own one last."""
    for pid in sorted(pids, key=lambda pid: pid == os.getpid()):
        os.kill(pid, signal.SIGKILL)
    time.sleep(60)


class Moments:
    """Counts the calls of a save in this process; ``action`` runs before the ``at``-th, counted from 1.

    A write counts twice: before it, and when half of it is on the disk.
    """

    def __init__(self, at: int = FOREVER, action: Callable[[], Any] | None = None) -> None:
        self.at, self.count = at, 0
        self._action = action
        self._lock = threading.Lock()
        self._undo = contextlib.ExitStack()

    def _pass(self) -> None:
        with self._lock:
            self.count += 1
            now = self.count == self.at
        if now and self._action is not None:
            self._action()

    def __enter__(self) -> Moments:
        for place, names in (
            (os, _OF_FILES),
            (io, ("open",)),
            (torch.distributed, ("all_gather_object", "all_reduce")),
            (groups, _OF_RANKS),
        ):
            for name in names:
                self._watch(place, name)
        return self

    def __exit__(self, *_: Any) -> None:
        self._undo.close()

    def _watch(self, place: Any, name: str) -> None:
        real = getattr(place, name)

        @functools.wraps(real)
        def watched(*args: Any, **kwargs: Any) -> Any:
            self._pass()
            return real(*args, **kwargs)

        def halved(handle: int, data: Any, offset: int) -> int:
            self._pass()
            half = len(data) // 2 // 4096 * 4096
            if half:
                done = real(handle, data[:half], offset)
                self._pass()
                return int(done)  # a short write, which the caller continues
            return int(real(handle, data, offset))

        setattr(place, name, halved if name == "pwrite" else watched)
        self._undo.callback(setattr, place, name, real)


@contextlib.contextmanager
def failing(
    place: Any, name: str, error: OSError, after: int = 0, when: Callable[..., bool] = lambda *_, **__: True
) -> Iterator[None]:
    """``place.name`` raises for calls with such arguments, but for the first ``after`` of them."""
    real, calls = getattr(place, name), 0

    def broken(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        if when(*args, **kwargs):
            calls += 1
            if calls > after:
                raise error
        return real(*args, **kwargs)

    setattr(place, name, broken)
    try:
        yield
    finally:
        setattr(place, name, real)
