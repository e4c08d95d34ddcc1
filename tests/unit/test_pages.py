"""Memory that the C library keeps for the next step instead of giving it back."""

from __future__ import annotations

import subprocess
import sys

import pytest

from deepspeed._core import pages

# In an interpreter of its own: the heap of this one has been through other tests.
PROGRAM = """
import resource
import torch
from deepspeed._core import pages

def faults():
    'Of taking, filling and freeing 128 MiB.'
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [torch.ones(4 << 20) for _ in range(8)]
    del blocks
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

done = pages.keep_freed_memory()
print(done, sum([faults() for _ in range(8)][4:]))
"""


@pytest.fixture(autouse=True)
def no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator")
def test_freed_memory_is_there_for_the_next_step() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    kept, faults = done.stdout.split()
    assert kept == "True"
    assert int(faults) < 1_000


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator")
def test_both_thresholds_are_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """What lies at the end of the heap decides whether memory goes back at all, so the settings are looked at, too."""
    told = []

    class Library:
        gnu_get_libc_version = None

        @staticmethod
        def mallopt(option: int, value: int) -> int:
            told.append((option, value))
            return 1

    monkeypatch.setattr("ctypes.CDLL", lambda name: Library)
    assert pages.keep_freed_memory.__wrapped__()
    assert told == [(-1, 256 << 20), (-3, 32 << 20)]  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD of malloc.h


@pytest.mark.parametrize("name", ["MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_"])
def test_what_the_user_set_stays(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "1000000")
    assert not pages.keep_freed_memory.__wrapped__()
