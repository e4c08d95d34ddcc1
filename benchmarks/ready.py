"""Memory that the machine has ready when a measurement begins.

A virtual machine may give memory that nobody uses back to its host within seconds, and getting it again takes 1 to 4 s a GB
where an ordinary machine takes a quarter of a second. That is no property of the software that is measured. So another
process touches as much as will be needed, and lets go of it at the moment that the measurement begins.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator

_HOLD = """
import mmap, os, sys
held = mmap.mmap(-1, int(sys.argv[1]), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
for at in range(0, len(held), mmap.PAGESIZE):
    held[at] = 1
print("held", flush=True)
sys.stdin.read()
os._exit(0)
"""


@contextlib.contextmanager
def memory_ready(nbytes: int) -> Iterator[None]:
    """Has ``nbytes`` touched and given back as the block begins; all ranks wait for each other. 0: does nothing."""
    import torch.distributed as dist

    if nbytes:
        command = [sys.executable, "-c", _HOLD, str(nbytes)]
        holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        holder.stdout.readline()  # type: ignore[union-attr]
        dist.barrier()
        holder.communicate()
    yield
