"""The end of a process that has a gloo group.

[Note: exit with gloo] gloo's worker threads let go of a tensor after the caller's ``wait()`` has returned, and need the
interpreter for it. If it ends at that moment, which is likely in a script whose last call is a collective, C++ ends the
process with "terminate called without an active exception" and the exit code of an abort (seen with torch 2.13 in every
third rank). So the exit waits a few milliseconds until these threads rest.

Destroying the groups would help as well, but has two costs: it blocks while an operation is pending, and it closes the
connections some 100 ms before a failing rank is gone, so that its peers fail first and are blamed for it.
"""

from __future__ import annotations

import atexit
import glob
import time

__all__ = ["settle_at_exit"]

_PAUSE_S = 0.002
_LONGEST_S = 1.0
#: Looks in a row that must find the threads at rest: one may have slept because the look itself held the interpreter.
_LOOKS = 3


def settle_at_exit() -> None:
    """Makes the exit of this process wait for gloo's threads; any number of calls counts once."""
    atexit.unregister(_settle)
    atexit.register(_settle)


def _settle() -> None:
    deadline = time.monotonic() + _LONGEST_S
    rested = 0
    while rested < _LOOKS and time.monotonic() < deadline:
        time.sleep(_PAUSE_S)  # without the interpreter lock, which the threads need
        rested = 0 if _gloo_is_running() else rested + 1


def _gloo_is_running() -> bool:
    """Whether a gloo thread of this process is on a core or waits for one. Only Linux tells; elsewhere no."""
    for path in glob.glob("/proc/self/task/*/stat"):
        try:
            with open(path, encoding="ascii", errors="replace") as stat:
                name, _, rest = stat.read().partition("(")[2].rpartition(")")
        except OSError:
            continue  # the thread has ended
        if name.startswith("pt_gloo") and rest.split()[0] == "R":
            return True
    return False
