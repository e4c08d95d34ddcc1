"""Memory that the C library keeps for the next step instead of giving it back."""

from __future__ import annotations

import subprocess
import sys

import pytest

from deepspeed._core import pages

# In an interpreter of its own: the heap of this one has been through other tests.
PROGRAM = """
import ctypes
import resource
import torch
from deepspeed._core import pages

def faults():
    'Of taking, filling and freeing 128 MiB.'
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [torch.ones(4 << 20) for _ in range(8)]
    del blocks
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

ctypes.CDLL(None).mallopt(-1, 1 << 20)  # a small threshold to give memory back from: no luck with what lies at the end
ctypes.CDLL(None).mallopt(-3, 32 << 20)
plain = [faults() for _ in range(6)]
done = pages.keep_freed_memory()
print(sum(plain[2:]), done, sum([faults() for _ in range(6)][2:]))
"""


@pytest.fixture(autouse=True)
def no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator")
def test_freed_memory_is_there_for_the_next_step() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    plain, kept, after = done.stdout.split()
    assert int(plain) > 10_000
    assert kept == "True"
    assert int(after) < 1_000


@pytest.mark.parametrize("name", ["MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_"])
def test_what_the_user_set_stays(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "1000000")
    assert not pages.keep_freed_memory.__wrapped__()
