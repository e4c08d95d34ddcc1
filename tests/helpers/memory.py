"""How much memory a piece of code takes at its worst, as the system counts it: heap, mapped files and all."""

from __future__ import annotations

import gc
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

MALLOC_GIVES_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
"""Environment of a process that is to be measured: what was freed before the measurement must not serve in it."""


def _status(key: str) -> int:
    with open("/proc/self/status") as file:
        found = re.search(rf"^{key}:\s+(\d+) kB", file.read(), re.MULTILINE)
    assert found is not None, key
    return int(found[1]) * 1024


def can_measure() -> bool:
    return sys.platform == "linux" and os.access("/proc/self/clear_refs", os.W_OK)


def peak_nbytes(action: Callable[[], Any]) -> int:
    """The most memory this process had during ``action`` minus what it had before. The result is dropped."""
    gc.collect()
    before = _status("VmRSS")
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # sets VmHWM to VmRSS
    action()
    return _status("VmHWM") - before


@contextmanager
def measured_environment() -> Iterator[None]:
    """Sets :data:`MALLOC_GIVES_BACK` for child processes; skips the test where memory cannot be measured."""
    import pytest  # measured processes do not need it

    if not can_measure():
        pytest.skip("needs Linux's /proc/self/clear_refs")
    with pytest.MonkeyPatch.context() as patch:
        for key, value in MALLOC_GIVES_BACK.items():
            patch.setenv(key, value)
        yield
