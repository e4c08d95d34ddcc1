"""How much memory a piece of code takes at its worst, as the system counts it: heap, mapped files and all."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import re
import sys
from collections.abc import Callable
from typing import Any

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


def can_measure() -> bool:
    return sys.platform == "linux" and os.access("/proc/self/clear_refs", os.W_OK)


def _status(key: str) -> int:
    with open("/proc/self/status") as file:
        found = re.search(rf"^{key}:\s+(\d+) kB", file.read(), re.MULTILINE)
    assert found is not None, key
    return int(found[1]) * 1024


def peak_nbytes(action: Callable[[], Any]) -> int:
    """The most memory this process had during ``action`` minus what it had before. The result is dropped.

    For processes that do nothing else: freed memory goes back to the system at once from then on, so that what was freed
    before the measurement does not serve in it.
    """
    gc.collect()
    with contextlib.suppress(AttributeError):  # another C library
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_THRESHOLD, 1 << 16)
        libc.mallopt(_M_TRIM_THRESHOLD, 1 << 16)
        libc.malloc_trim(0)
    before = _status("VmRSS")
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # sets VmHWM to VmRSS
    action()
    return _status("VmHWM") - before
