"""Memory that the machine has ready when a measurement begins.

A virtual machine may give memory that nobody uses back to its host within seconds, and getting it again takes 1 to 4 s a GB
where an ordinary machine takes a quarter of a second. That is no property of the software that is measured. So another
process touches as much as will be needed, in huge pages, lets go of a quarter of it at the moment that the measurement
begins, and of the rest bit by bit within the three seconds after: Linux looks every two seconds for what it can give back.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import IO, cast

_HOLD = """
import mmap, os, sys, time
SLICES, AT_ONCE, SECONDS = 16, 4, 3
held = [mmap.mmap(-1, int(sys.argv[1]) // SLICES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) for _ in range(SLICES)]
for one in held:
    one.madvise(mmap.MADV_HUGEPAGE)
    for at in range(0, len(one), mmap.PAGESIZE):
        one[at] = 1
print("held", flush=True)
sys.stdin.readline()
for _ in range(AT_ONCE):
    held.pop().close()
print("begun", flush=True)
while held:
    time.sleep(SECONDS / (SLICES - AT_ONCE))
    held.pop().close()
"""


@contextlib.contextmanager
def memory_ready(nbytes: int, before: Callable[[], object]) -> Iterator[None]:
    """Has ``nbytes`` touched and given back as the block begins; calls ``before`` right before that.

    All ranks wait for each other. 0: calls ``before`` only.
    """
    import torch.distributed as dist

    if nbytes == 0:
        before()
        yield
        return
    command = [sys.executable, "-c", _HOLD, str(nbytes)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        go, told = cast("IO[bytes]", holder.stdin), cast("IO[bytes]", holder.stdout)
        told.readline()
        dist.barrier()
        before()
        dist.barrier()
        go.write(b"go\n")
        go.flush()
        told.readline()
        yield
