"""Memory that the C library keeps for the next step instead of giving it back."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from deepspeed._core import pages
from deepspeed._core.aio import aligned_empty
from deepspeed._core.ckpt.filereader import FileReader

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


class _Advice:
    """Stands for the system: takes advice about addresses, and says how long each page took."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, seconds: list[float]) -> None:
        self.given: list[tuple[int, int, int]] = []
        self.touched: list[int] = []
        monkeypatch.setattr(pages, "_madvise", lambda: lambda *advice: self.given.append(advice))
        monkeypatch.setattr(pages, "_touch", lambda address: self.touched.append(address) or seconds.pop(0))
        self.now = 7.0
        monkeypatch.setattr(pages.time, "monotonic", lambda: self.now)


PAGE = 2 << 20


def test_huge_pages_are_asked_for_while_they_come_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    system, huge = _Advice(monkeypatch, [0.0002] * 2), pages._HugePages()
    for begin, system.now in ((3 * PAGE + 4096, 7.0), (64 * PAGE, 8.0)):
        huge.ask(begin, begin + 8 * PAGE)
    assert system.given == [
        (3 * PAGE + 4096, 8 * PAGE, pages.mmap.MADV_HUGEPAGE),
        (64 * PAGE, 8 * PAGE, pages.mmap.MADV_HUGEPAGE),
    ]
    assert system.touched == [4 * PAGE, 64 * PAGE]  # whole huge pages within; one that is fast is enough


def test_no_more_huge_pages_where_they_come_slowly(monkeypatch: pytest.MonkeyPatch) -> None:
    system, huge = _Advice(monkeypatch, [0.009, 0.008]), pages._HugePages()
    huge.ask(4 * PAGE, 20 * PAGE)
    huge.ask(40 * PAGE, 60 * PAGE)
    assert huge.slow_until > system.now
    assert system.given == [
        (4 * PAGE, 16 * PAGE, pages.mmap.MADV_HUGEPAGE),
        (6 * PAGE, 14 * PAGE, pages.mmap.MADV_NOHUGEPAGE),  # behind the two that were probed
    ]


def test_what_was_found_out_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    system, huge = _Advice(monkeypatch, [0.009, 0.008, 0.0002, 0.0003]), pages._HugePages()
    for system.now, probes in ((7.0, 2), (7.9, 2), (8.1, 3), (8.1, 4)):
        huge.ask(4 * PAGE, 20 * PAGE)
        assert len(system.touched) == probes, system.now


def test_one_slow_page_proves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    system, huge = _Advice(monkeypatch, [0.009, 0.0003]), pages._HugePages()
    huge.ask(4 * PAGE, 20 * PAGE)
    assert huge.slow_until < system.now
    assert len(system.given) == 1


def test_buffers_that_disks_fill_wait_for_huge_pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    system, huge = _Advice(monkeypatch, [0.009, 0.008]), pages._HugePages()
    monkeypatch.setattr(pages, "_huge_pages", huge)
    huge.ask(4 * PAGE, 20 * PAGE)
    assert huge.slow_until > system.now
    system.given.clear()
    system.touched.clear()
    aligned_empty(8 << 20)
    assert system.given == []
    begin = aligned_empty(8 << 20, reused=True).data_ptr()
    assert system.given == [(begin, 8 << 20, pages.mmap.MADV_HUGEPAGE)]
    assert system.touched == []
    path = tmp_path / "file"
    path.write_bytes(bytes(4096))
    with FileReader() as reader:
        [part] = reader.parts(path, [(0, 4096)])
        assert part.data.data_ptr() == system.given[1][0]


@pytest.mark.parametrize("numel", [(4 << 20) // 4, (4 << 20) // 4 + 1, (9 << 20) // 4])
def test_memory_is_usable_to_its_last_element(numel: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the probe says, and wherever the buffer begins."""
    for seconds in (0.0, 1.0):
        monkeypatch.setattr(pages, "_huge_pages", pages._HugePages())
        real = pages._touch
        monkeypatch.setattr(pages, "_touch", lambda address, real=real, seconds=seconds: real(address) * 0 + seconds)
        flat = pages.empty_flat(numel, pages.torch.float32).fill_(3.0)
        assert float(flat.sum()) == 3.0 * numel
        assert (pages.zeros_flat(numel, pages.torch.float32) == 0).all()
