"""Starts the ranks of a node and sees to their end: none outlives the job, and the first failure is what is reported.

[Note: who kills whom] Each rank leads a session of its own, so a signal sent to its group reaches what it started, too,
and a terminal's Ctrl-C reaches this process alone, which passes it on once. A lone rank at a terminal stays in the
terminal's group instead: there it can read the keyboard (``breakpoint()``). On Linux the kernel kills a rank when this
process dies, however that happens.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from ..errors import ConfigError
from .plan import RankPlan

__all__ = ["LADDERS", "logger", "run_ranks", "set_up_logging"]

#: The launcher's own: deepspeed.utils.logging would load torch, which this process can do without.
logger = logging.getLogger("DeepSpeedLauncher")

#: What is sent to ranks that must end, as (seconds since the cause, signal). A further signal from the user skips to
#: the next rung. SIGTERM leaves time for a last checkpoint.
LADDERS: dict[str, Sequence[tuple[float, signal.Signals]]] = {
    "failure": ((0, signal.SIGTERM), (5, signal.SIGKILL)),
    # A rank that was killed could say nothing: the others get a moment to tell what it was doing (the hang doctor).
    "killed": ((3, signal.SIGTERM), (8, signal.SIGKILL)),
    "SIGINT": ((0, signal.SIGINT), (10, signal.SIGTERM), (15, signal.SIGKILL)),
    "SIGTERM": ((0, signal.SIGTERM), (30, signal.SIGKILL)),
    "SIGHUP": ((0, signal.SIGTERM), (30, signal.SIGKILL)),
}
_PR_SET_PDEATHSIG = 1
_TAIL_LINES = 40


@dataclass
class _Rank:
    plan: RankPlan
    process: subprocess.Popen[bytes]
    own_session: bool
    log: Path | None

    def send(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if self.own_session:
                os.killpg(self.process.pid, number)
            else:
                os.kill(self.process.pid, number)


def run_ranks(
    plans: Sequence[RankPlan],
    log_folder: Path | None = None,
    on_start: Callable[[list[int]], None] = lambda pids: None,
) -> int:
    """Runs all ranks to their end and returns the job's exit code.

    The code is 0 if every rank's is, else that of the rank that failed first (128 + number for one that a signal
    killed). After a signal from the user it is 128 + its number, unless all ranks ended in peace (0). Must be called in
    the main thread. With ``log_folder`` the output of rank r goes to a file there, named for the start time and the
    rank, and the end of a failed rank's file is logged. ``on_start`` gets the ranks' process ids once all run.

    Raises:
        ConfigError: a rank's program or log file cannot be opened; no rank is left running then.
    """
    with _SignalInbox() as inbox:
        ranks: list[_Rank] = []
        try:
            _start(plans, ranks, log_folder)
            on_start([rank.process.pid for rank in ranks])
            return _Supervisor(ranks).run(inbox)
        finally:
            for rank in ranks:
                if rank.process.poll() is None:
                    rank.send(signal.SIGKILL)
                    rank.process.wait()


def set_up_logging(level: str) -> None:
    """Lines of the launcher go to stderr, so that a rank's standard output can be piped on."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("[deepspeed] %(message)s"))
    logger.handlers[:] = [handler]
    logger.propagate = False
    logger.setLevel(level.upper())


class _SignalInbox:
    """Signals as something to wait for, instead of code that interrupts: they arrive as bytes in a pipe."""

    _WANTED = ("SIGCHLD", "SIGINT", "SIGTERM", "SIGHUP")

    def __enter__(self) -> _SignalInbox:
        self._read, self._write = os.pipe()
        os.set_blocking(self._read, False)
        os.set_blocking(self._write, False)
        self._before: dict[int, Any] = {}
        self._wakeup_before = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        for name in self._WANTED:
            number = getattr(signal, name)
            if name == "SIGHUP" and signal.getsignal(number) is signal.SIG_IGN:
                continue  # nohup: the job is to outlive its terminal
            self._before[number] = signal.signal(number, lambda *_: None)
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup_before)
        os.close(self._read)
        os.close(self._write)

    def wait(self, timeout_s: float | None) -> list[str]:
        """Names of the signals that came, in order; empty after ``timeout_s`` seconds. SIGCHLD only ends the wait."""
        select.select([self._read], [], [], timeout_s)
        try:
            arrived = os.read(self._read, 4096)
        except BlockingIOError:
            return []
        return [signal.Signals(number).name for number in arrived if number != signal.SIGCHLD]


class _Supervisor:
    def __init__(self, ranks: Sequence[_Rank]) -> None:
        self._ranks = ranks
        self._running = list(ranks)
        self._cause: str | None = None  # key of LADDERS, once the ranks are to end
        self._since_s = 0.0
        self._rung = 0
        self._code = 0

    def run(self, inbox: _SignalInbox) -> int:
        while self._running:
            for name in inbox.wait(self._seconds_to_next_rung()):
                self._on_signal(name)
            self._reap()
            while self._seconds_to_next_rung() == 0:
                self._climb()
        return self._code

    def _on_signal(self, name: str) -> None:
        if self._cause is None:
            logger.warning(f"got {name}; passing it on to {len(self._running)} rank(s)")
            # At a terminal, the kernel gave a lone rank its SIGINT already.
            self._begin(name, rung=1 if name == "SIGINT" and not self._ranks[0].own_session else 0)
        else:
            logger.warning(f"got {name} while the ranks are ending; not waiting any longer")
            self._climb()

    def _begin(self, cause: str, rung: int = 0) -> None:
        self._cause, self._since_s, self._rung = cause, time.monotonic(), rung

    def _seconds_to_next_rung(self) -> float | None:
        ladder = LADDERS[self._cause] if self._cause is not None else ()
        if self._rung >= len(ladder) or not self._running:
            return None
        return max(0.0, self._since_s + ladder[self._rung][0] - time.monotonic())

    def _climb(self) -> None:
        ladder = LADDERS[self._cause] if self._cause is not None else ()
        if self._rung >= len(ladder):
            return
        number = ladder[self._rung][1]
        if self._rung > 0 or ladder[0][0] > 0:
            late = ", ".join(str(rank.plan.rank) for rank in self._running)
            logger.warning(f"rank(s) {late} did not end; sending {number.name}")
        self._rung += 1
        for rank in self._running:
            rank.send(number)

    def _reap(self) -> None:
        for rank in list(self._running):
            returned = rank.process.poll()
            if returned is None:
                continue
            self._running.remove(rank)
            code = returned if returned >= 0 else 128 - returned
            if code == 0:
                continue
            if rank.own_session:
                # What it started and left behind. The number of a group is not given anew while a member lives, and for
                # an empty group this comes a moment after its end, long before numbers come round again.
                rank.send(signal.SIGTERM)
            if self._cause is None:
                self._code = code
                self._report(rank, returned)
                self._begin("failure" if returned > 0 else "killed")
            elif self._cause not in ("failure", "killed"):
                self._code = 128 + signal.Signals[self._cause]

    def _report(self, rank: _Rank, returned: int) -> None:
        if returned >= 0:
            how = f"exited with code {returned}"
        else:
            how = f"was killed by {signal.Signals(-returned).name}"
            if -returned == signal.SIGKILL:
                how += " (the system does that when memory runs out)"
        if rank.log is not None:
            with open(rank.log, errors="replace") as file:
                tail = "".join(file.readlines()[-_TAIL_LINES:])
            logger.error(f"end of {rank.log}:\n{tail}".rstrip())
        others = len(self._running)
        stopping = f"; stopping the other {others}" if others else ""
        logger.error(f"rank {rank.plan.rank} (pid {rank.process.pid}) {how}{stopping}")


def _start(plans: Sequence[RankPlan], ranks: list[_Rank], log_folder: Path | None) -> None:
    """Appends to ``ranks`` one by one, so that the caller can end those that run if a later one fails to start."""
    own_session = not (len(plans) == 1 and sys.stdin is not None and sys.stdin.isatty())
    stamp = time.strftime("%Y%m%d-%H%M%S")
    for plan in plans:
        log = None if log_folder is None else log_folder / f"{stamp}_rank{plan.rank}.log"
        try:
            with _output(log) as stream:
                process = subprocess.Popen(
                    plan.argv,
                    env=plan.environment,
                    stdout=stream,
                    stderr=None if stream is None else subprocess.STDOUT,
                    start_new_session=own_session,
                    preexec_fn=_in_the_child(plan.cores),
                )
        except OSError as error:
            raise ConfigError(f"rank {plan.rank} cannot be started ({' '.join(plan.argv[:3])} ...): {error}") from error
        ranks.append(_Rank(plan, process, own_session, log))


@contextlib.contextmanager
def _output(log: Path | None) -> Iterator[IO[bytes] | None]:
    if log is None:
        yield None
        return
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "wb") as stream:
        yield stream


def _in_the_child(cores: list[int] | None) -> Callable[[], None] | None:
    """What runs between fork and exec. This process has one thread, so a fork leaves no lock behind."""
    if sys.platform != "linux":
        return None
    libc = ctypes.CDLL(None, use_errno=True)
    parent = os.getpid()

    def prepare() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:  # it died before the kernel knew
            os._exit(1)
        if cores is not None:
            os.sched_setaffinity(0, cores)

    return prepare
