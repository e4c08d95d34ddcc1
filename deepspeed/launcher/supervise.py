"""Starts the ranks of a node and sees to their end: none outlives the job, and the first failure is what is reported.

[Note: who kills whom] Each rank leads a session of its own, so a signal sent to its group reaches what it started, too,
and a terminal's Ctrl-C reaches this process alone, which passes it on once. A lone rank at a terminal stays in the
terminal's group instead: there it can read the keyboard (``breakpoint()``). On Linux the kernel kills a rank when this
process dies, however that happens.

[Note: the leash] A node that ``deepspeed`` started from another host has a leash: its standard input. A line there is the
name of a signal to pass on; its end means that the launching side is gone, by whatever death, and ends the ranks. A remote
shell gives no other way to reach what it started. In the other direction, the first failure of a rank is announced at
once, as a line of JSON on standard error: the node itself ends only after its other ranks, and by then ranks elsewhere
have failed, too, for the loss of their peer.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
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

__all__ = [
    "ANNOUNCEMENT",
    "LADDERS",
    "Ladder",
    "SignalInbox",
    "describe_end",
    "exit_code",
    "logger",
    "run_ranks",
    "set_up_logging",
    "tied_to_parent",
]

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
    "the end of the launching side": ((0, signal.SIGTERM), (5, signal.SIGKILL)),
}
#: What a line of JSON on a leashed node's standard error begins with.
ANNOUNCEMENT = "@deepspeed-node "
_LEASH_END = "the end of the launching side"
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
    leash: int | None = None,
) -> int:
    """Runs all ranks to their end and returns the job's exit code.

    The code is 0 if every rank's is, else that of the rank that failed first (128 + number for one that a signal
    killed). After a signal from the user it is 128 + its number, unless all ranks ended in peace (0). Must be called in
    the main thread. With ``log_folder`` the output of rank r goes to a file there, named for the start time and the
    rank, and the end of a failed rank's file is logged. ``on_start`` gets the ranks' process ids once all run. ``leash`` is
    a file descriptor as the module's note on it says; ranks have no standard input then.

    Raises:
        ConfigError: a rank's program or log file cannot be opened; no rank is left running then.
    """
    with SignalInbox(leash) as inbox:
        ranks: list[_Rank] = []
        try:
            _start(plans, ranks, log_folder, leashed=leash is not None)
            on_start([rank.process.pid for rank in ranks])
            return _Supervisor(ranks, announce=leash is not None).run(inbox)
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


def exit_code(returned: int) -> int:
    """A shell's exit code for what ``Popen.poll`` returned: 128 + number for a process that a signal killed."""
    return returned if returned >= 0 else 128 - returned


def describe_end(returned: int) -> str:
    """How a process ended, from what ``Popen.poll`` returned."""
    if returned >= 0:
        return f"exited with code {returned}"
    how = f"was killed by {signal.Signals(-returned).name}"
    return f"{how} (the system does that when memory runs out)" if -returned == signal.SIGKILL else how


class SignalInbox:
    """Signals as something to wait for, instead of code that interrupts: they arrive as bytes in a pipe.

    ``leash`` is a file descriptor that carries names of signals, too, one a line; see the module's note.
    """

    _WANTED = ("SIGCHLD", "SIGINT", "SIGTERM", "SIGHUP")

    def __init__(self, leash: int | None = None) -> None:
        self._leash = leash
        self._leash_line = b""

    def __enter__(self) -> SignalInbox:
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

    def fileno(self) -> int:
        """Readable when a signal has arrived (a leash is not included)."""
        return self._read

    def wait(self, timeout_s: float | None) -> list[str]:
        """Names of the signals that came, in order; empty after ``timeout_s`` seconds. SIGCHLD only ends the wait."""
        sources = [self._read] if self._leash is None else [self._read, self._leash]
        ready, _, _ = select.select(sources, [], [], timeout_s)
        return self.take() + (self._pull() if self._leash in ready else [])

    def take(self) -> list[str]:
        """As :meth:`wait`, without waiting and without the leash."""
        try:
            arrived = os.read(self._read, 4096)
        except BlockingIOError:
            return []
        return [signal.Signals(number).name for number in arrived if number != signal.SIGCHLD]

    def _pull(self) -> list[str]:
        try:
            arrived = os.read(self._leash, 4096) if self._leash is not None else b""
        except OSError:  # a leash may be a socket, which can break
            arrived = b""
        if not arrived:
            self._leash = None
            return [_LEASH_END]
        *lines, self._leash_line = (self._leash_line + arrived).split(b"\n")
        return [name for name in (line.decode(errors="replace").strip() for line in lines) if name in self._WANTED]


class Ladder:
    """What is sent to processes that must end, and when: rungs of :data:`LADDERS`, climbed as time passes."""

    def __init__(self) -> None:
        #: Key of :data:`LADDERS` once the processes are to end.
        self.cause: str | None = None
        self._since_s = 0.0
        self._rung = 0

    def begin(self, cause: str, rung: int = 0) -> None:
        self.cause, self._since_s, self._rung = cause, time.monotonic(), rung

    @property
    def sent(self) -> bool:
        """Whether the processes have been told to end."""
        return self._rung > 0

    def seconds_to_next_rung(self) -> float | None:
        rungs = self._rungs()
        if self._rung >= len(rungs):
            return None
        return max(0.0, self._since_s + rungs[self._rung][0] - time.monotonic())

    def climb(self) -> tuple[signal.Signals, bool] | None:
        """The signal to send now, and whether the processes were given time before; ``None`` at the ladder's end."""
        rungs = self._rungs()
        if self._rung >= len(rungs):
            return None
        number, had_time = rungs[self._rung][1], self._rung > 0 or rungs[0][0] > 0
        self._rung += 1
        return number, had_time

    def _rungs(self) -> Sequence[tuple[float, signal.Signals]]:
        return LADDERS[self.cause] if self.cause is not None else ()


class _Supervisor:
    def __init__(self, ranks: Sequence[_Rank], announce: bool) -> None:
        self._ranks = ranks
        self._running = list(ranks)
        self._ladder = Ladder()
        self._announce = announce
        self._code = 0

    def run(self, inbox: SignalInbox) -> int:
        while self._running:
            for name in inbox.wait(self._ladder.seconds_to_next_rung()):
                self._on_signal(name)
            self._reap()
            while self._running and self._ladder.seconds_to_next_rung() == 0:
                self._climb()
        return self._code

    def _on_signal(self, name: str) -> None:
        if self._ladder.cause is None:
            if name == _LEASH_END:
                logger.warning(f"the launching side is gone; ending {len(self._running)} rank(s)")
            else:
                logger.warning(f"got {name}; passing it on to {len(self._running)} rank(s)")
            # At a terminal, the kernel gave a lone rank its SIGINT already.
            self._ladder.begin(name, rung=1 if name == "SIGINT" and not self._ranks[0].own_session else 0)
        elif name == _LEASH_END:
            self._ladder.begin(name)  # nobody is left to be told anything, or to send more
        else:
            logger.warning(f"got {name} while the ranks are ending; not waiting any longer")
            self._climb()

    def _climb(self) -> None:
        step = self._ladder.climb()
        if step is None:
            return
        number, had_time = step
        if had_time:
            late = ", ".join(str(rank.plan.rank) for rank in self._running)
            logger.warning(f"rank(s) {late} did not end; sending {number.name}")
        for rank in self._running:
            rank.send(number)

    def _reap(self) -> None:
        for rank in list(self._running):
            returned = rank.process.poll()
            if returned is None:
                continue
            self._running.remove(rank)
            code = exit_code(returned)
            if code == 0:
                continue
            if rank.own_session:
                # What it started and left behind. The number of a group is not given anew while a member lives, and for
                # an empty group this comes a moment after its end, long before numbers come round again.
                rank.send(signal.SIGTERM)
            if self._ladder.cause is None:
                self._code = code
                self._report(rank, returned)
                self._ladder.begin("failure" if returned > 0 else "killed")
            elif self._ladder.cause in signal.Signals.__members__:
                self._code = 128 + signal.Signals[self._ladder.cause]
            elif self._ladder.cause == _LEASH_END:
                self._code = self._code or code

    def _report(self, rank: _Rank, returned: int) -> None:
        if self._announce:
            news = {"who": rank.plan.label, "code": exit_code(returned), "how": describe_end(returned)}
            with contextlib.suppress(OSError):  # nobody may be there to read
                os.write(2, f"{ANNOUNCEMENT}{json.dumps(news)}\n".encode())
        if rank.log is not None:
            with open(rank.log, errors="replace") as file:
                tail = "".join(file.readlines()[-_TAIL_LINES:])
            logger.error(f"end of {rank.log}:\n{tail}".rstrip())
        others = len(self._running)
        stopping = f"; stopping the other {others}" if others else ""
        logger.error(f"{rank.plan.label} (pid {rank.process.pid}) {describe_end(returned)}{stopping}")


def _start(plans: Sequence[RankPlan], ranks: list[_Rank], log_folder: Path | None, leashed: bool) -> None:
    """Appends to ``ranks`` one by one, so that the caller can end those that run if a later one fails to start."""
    own_session = leashed or not (len(plans) == 1 and sys.stdin is not None and sys.stdin.isatty())
    stamp = time.strftime("%Y%m%d-%H%M%S")
    for plan in plans:
        log = None if log_folder is None else log_folder / f"{stamp}_rank{plan.rank}.log"
        try:
            with _output(log) as stream:
                process = subprocess.Popen(
                    plan.argv,
                    env=plan.environment,
                    stdin=subprocess.DEVNULL if leashed else None,
                    stdout=stream,
                    stderr=None if stream is None else subprocess.STDOUT,
                    start_new_session=own_session,
                    preexec_fn=tied_to_parent(plan.cores),
                )
        except OSError as error:
            raise ConfigError(f"{plan.label} cannot be started ({' '.join(plan.argv[:3])} ...): {error}") from error
        ranks.append(_Rank(plan, process, own_session, log))


@contextlib.contextmanager
def _output(log: Path | None) -> Iterator[IO[bytes] | None]:
    if log is None:
        yield None
        return
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "wb") as stream:
        yield stream


def tied_to_parent(
    cores: list[int] | None = None, number: signal.Signals = signal.SIGKILL
) -> Callable[[], None] | None:
    """What runs between fork and exec, so that the child gets the signal if this process dies, and its cores.

    This process has one thread, so a fork leaves no lock behind.
    """
    if sys.platform != "linux":
        return None
    libc = ctypes.CDLL(None, use_errno=True)
    parent = os.getpid()

    def prepare() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, number, 0, 0, 0)
        if os.getppid() != parent:  # it died before the kernel knew
            os._exit(1)
        if cores is not None:
            os.sched_setaffinity(0, cores)

    return prepare
