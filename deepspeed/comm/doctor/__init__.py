"""The hang doctor: says on every rank which rank ran off, instead of a job that waits for half an hour.

When ranks diverge (another order or number of collectives, a rank that stops early, gathers alone, raises or dies), the
ranks that wait print, within ``timeout_s``, what each rank was doing (state, last collective, step, phase, module,
parameter), the last common step, who differs and a hint, and exit with code 76 (:data:`EXIT_CODE`) unless their wait
has raised an exception of its own, which then ends them. A rank that merely computes is never ended, and neither are
those that wait for it: it is named, with its Python stack, in a warning that repeats in doubling intervals.

The time is ``DS_HANG_TIMEOUT_S`` seconds, 10 by default, 0 for no doctor. A rank's part is a thread that looks once a
second, and marks around what blocks. Ranks talk through the rendezvous store, and only when one of them has waited for
long. What a rank does is told with :func:`at` (or ``now``), what it waits for with :func:`waiting` and
:func:`collective`; everything in :mod:`deepspeed.comm` is marked already, and unmarked calls of torch.distributed are
recognised by their stack. NCCL's operations do not block the host: that the device has not come to the end of the last
one is seen and told as well, but ends nothing, since it may be computing; NCCL's own watchdog ends such a hang.
"""

from __future__ import annotations

import os

import torch.distributed as dist

from ...errors import ConfigError
from ...utils.logging import logger
from .board import open_board
from .record import Wait, at, collective, now, operation, waiting
from .watch import EXIT_CODE, Doctor

__all__ = [
    "DEFAULT_TIMEOUT_S",
    "EXIT_CODE",
    "Wait",
    "at",
    "collective",
    "finished",
    "is_running",
    "now",
    "operation",
    "raised",
    "start",
    "stop",
    "waiting",
]

#: Safe although short: a long wait alone is not what ends a process, see verdict.py.
DEFAULT_TIMEOUT_S = 10.0


class _Process:
    doctor: Doctor | None = None
    users = 0


_process = _Process()  # torch.distributed is one per process, and so is its doctor


def start(timeout_s: float | None = None) -> bool:
    """Starts this process's doctor if there is more than one rank, and says whether it runs. Not collective.

    Each call wants a :func:`stop` of its own; the doctor ends with the last. It watches the calling thread and its
    collectives. ``timeout_s`` (seconds, 0 = off) goes before the environment's ``DS_HANG_TIMEOUT_S``; a doctor that
    runs keeps its own. Nothing happens where the ranks share no store (MPI).

    Raises:
        ConfigError: the time is not a number of seconds from 0 on.
    """
    timeout_s = _timeout(timeout_s)
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1 or not timeout_s:
        return False
    if _process.doctor is not None and not _process.doctor.serves_this_group:
        stop(everyone=True)
    if _process.doctor is None:
        doctor = _make(timeout_s)
        if doctor is None:
            return False
        _process.doctor, _process.users = doctor, 0
    _process.users += 1
    return True


def _make(timeout_s: float) -> Doctor | None:
    """A doctor that runs. What it needs may be missing in more ways than one; training goes on without it."""
    try:
        board = open_board()
        if board is None:
            raise ConnectionError("this process group has no store that a thread can share")
        doctor = Doctor(board, timeout_s)
        doctor.start()
        return doctor
    except Exception as error:
        now.reset()
        logger.debug(f"the hang doctor does not run: {type(error).__name__}: {error}")
        return None


def stop(everyone: bool = False) -> None:
    """Ends the doctor if every :func:`start` has been answered, or for ``everyone``: its thread, its connection to the
    store and its hooks. Without one nothing happens."""
    _process.users = 0 if everyone else max(0, _process.users - 1)
    if _process.doctor is not None and not _process.users:
        doctor, _process.doctor = _process.doctor, None
        doctor.stop()


def is_running() -> bool:
    """Whether this process has a doctor."""
    return _process.doctor is not None


def raised(error: BaseException) -> None:
    """Tells the other ranks that this rank's program ends with ``error``.

    Uncaught exceptions of a script are told by ``sys.excepthook``; this is for programs that catch everything and end
    by other means, such as ``os._exit``. It may stay for 4 s, so that others can read why this rank goes.
    """
    if _process.doctor is not None:
        _process.doctor.raised(error)


def finished() -> None:
    """Tells the other ranks that this rank's program ends well. For programs that leave by ``os._exit``, see
    :func:`raised`; scripts do it at exit."""
    doctor, _process.doctor = _process.doctor, None
    if doctor is not None:
        doctor.finished()


def _timeout(given: float | None) -> float:
    source, value = "timeout_s", given
    if value is None:
        text = os.environ.get("DS_HANG_TIMEOUT_S", "")
        if not text:
            return DEFAULT_TIMEOUT_S
        source = "DS_HANG_TIMEOUT_S"
        try:
            value = float(text)
        except ValueError:
            raise ConfigError(f"DS_HANG_TIMEOUT_S={text!r} is not a number of seconds (0 = no hang doctor)") from None
    if not 0 <= value < float("inf"):
        raise ConfigError(f"{source}={value!r}: expected a number of seconds from 0 (no hang doctor) on")
    return float(value)


def _forget() -> None:
    """In a forked child: the doctor's thread is the parent's, and so are its words."""
    _process.doctor, _process.users = None, 0
    now.reset()
    now.waits.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
