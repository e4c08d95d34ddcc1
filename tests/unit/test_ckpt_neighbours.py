"""Reading the memory of another process."""

from __future__ import annotations

import errno
import os

import pytest
import torch

from deepspeed._core.ckpt import neighbours
from deepspeed._core.ckpt.neighbours import Neighbours
from deepspeed._core.ckpt.staging import host_key


def _allowed() -> bool:
    return neighbours._readv() is not None and neighbours._can_read(
        host_key(), os.getpid(), neighbours.ctypes.addressof(neighbours._proof), neighbours._proof.raw
    )


pytestmark = pytest.mark.skipif(not _allowed(), reason="the system does not let processes read each other's memory")


def test_what_another_process_holds_arrives() -> None:
    held = torch.zeros(300_000)
    ready, done = os.pipe(), os.pipe()
    pid = os.fork()
    if not pid:
        held.copy_(torch.arange(300_000))  # in its own memory only
        os.write(ready[1], b".")
        os.read(done[0], 1)
        os._exit(0)
    os.read(ready[0], 1)
    found = torch.full((1000,), -1.0)
    Neighbours([os.getpid(), pid]).read(1, held.data_ptr() + 4 * 250_000, found[10:990])
    assert torch.equal(found[10:990], torch.arange(250_000.0, 250_980.0))
    assert bool((found[:10] == -1).all() and (found[990:] == -1).all())
    assert not held.any()
    with pytest.raises(OSError, match=f"the memory of process {pid} cannot be read") as caught:
        Neighbours([pid]).read(0, 64, found)
    assert caught.value.errno == errno.EFAULT
    os.write(done[1], b".")
    os.waitpid(pid, 0)
    with pytest.raises(OSError, match="No such process"):
        Neighbours([pid]).read(0, held.data_ptr(), found)
    for end in (*ready, *done):
        os.close(end)


def test_who_is_no_neighbour(monkeypatch: pytest.MonkeyPatch) -> None:
    address, content = neighbours.ctypes.addressof(neighbours._proof), neighbours._proof.raw
    can_read = neighbours._can_read
    assert not can_read("another host", os.getpid(), address, content)
    assert not can_read(host_key(), os.getpid(), address, bytes(16)), "another process has that number here"
    monkeypatch.setattr(neighbours, "_read", lambda *a: (_ for _ in ()).throw(PermissionError(errno.EPERM, "no")))
    assert not can_read(host_key(), os.getpid(), address, content)
